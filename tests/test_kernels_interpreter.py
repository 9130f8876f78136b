"""test_kernels_cases.py in triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


CANNOT_INTERPRET = pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4),
    reason="the interpreter of triton 3.6 cannot loop with NumPy >= 2.4: install numpy<2.4",
)


@CANNOT_INTERPRET
def test_every_kernel_equals_its_reference_in_the_interpreter() -> None:
    root = Path(__file__).parent.parent
    # One thread: the interpreter is Python, and idle threads of torch only get in its way.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels_cases.py"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed.group(1)) > 150 and "skipped" not in done.stdout, done.stdout[-500:]
