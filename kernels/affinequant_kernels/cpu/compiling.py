"""How native.c becomes a library: by the machine's own C compiler, with the arithmetic that the CPU has units for."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
UNITS = {
    "native_avx512.h": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "fma", "f16c"),
    "native_avx2.h": ("avx2", "fma", "f16c"),
}
"""By the file with its arithmetic, the best first: what a CPU must have."""
FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-fopenmp"),
    "-fno-tree-pre",  # with it gcc copies sums between registers, of which there are too few
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)


def lacking() -> dict[str, list[str]]:
    """By the file with its arithmetic, the units that this CPU has not."""
    # As Linux names them; elsewhere there are none, and other code does the work.
    facts = Path("/proc/cpuinfo")
    units = facts.read_text().replace("avx512_", "avx512").split() if facts.exists() else []
    return {name: [unit for unit in wanted if unit not in units] for name, wanted in UNITS.items()}


def find_compiler() -> str | None:
    """The C compiler that CC names, or the first that is there."""
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for word in compilers if word and (found := shutil.which(word))), None)


def library(compiler: str, folder: Path, name: str) -> Path:
    """The shared library in the folder; named by all that it was made from, so that a change makes another."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    flags = (*FLAGS, *(f"-m{unit}" for unit in UNITS[name]))
    made_from = "\0".join((SOURCE.read_text(), SOURCE.with_name(name).read_text(), *flags, version))
    path = folder / f"native-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    if not os.path.lexists(path):
        with tempfile.TemporaryDirectory(dir=folder) as building:
            fresh = Path(building) / path.name
            # Threads come from the OpenMP that torch has loaded: two of them would wait for each other's cores.
            subprocess.run(
                [compiler, *flags, "-o", str(fresh), str(SOURCE)], capture_output=True, text=True, check=True
            )
            fresh.chmod(0o600)
            fresh.replace(path)
    return path
