"""Offline settings before anything reads them, what vLLM and GPU tests need, and the models that tests share."""

import importlib.util
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # One process, so that a test sees errors as errors; a small cache; and the 4-bit kernels without a further
    # quantisation of the activations, which vLLM adds by itself where the CPU has AMX.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",
}

import pytest

REQUIRE_VLLM = os.environ.get("AFFINEQUANT_REQUIRE_VLLM") == "1"


# Warnings that other packages raise about their own insides. Everything else is an error (pyproject.toml).
FOREIGN_WARNINGS = ["ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"]


def pytest_configure(config: pytest.Config) -> None:
    """Let other packages' warnings about themselves pass."""
    for line in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


# Files in the order in which workers take them (tests/run.sh). What forks comes before vLLM has started threads in the
# process, which a child would wait for; the longest come early, so that no worker is left alone with one; and vLLM, which
# changes settings of torch for good, comes last.
FIRST = ("test_resume",)
LAST = ("test_multimodal", "test_evals_vllm", "test_serve_vllm", "test_vllm", "test_vllm_export")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files into that order."""
    place = {name: index - len(FIRST) for index, name in enumerate(FIRST)} | {
        name: 1 + index for index, name in enumerate(LAST)
    }
    items.sort(key=lambda item: place.get(item.path.stem, 0))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why."""
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; tests/run.sh installs its CPU build")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Where vLLM was promised (tests/run.sh), a vLLM test that skips has failed."""
    report = yield
    known = hasattr(report, "wasxfail")
    if REQUIRE_VLLM and report.skipped and not known and item.get_closest_marker("vllm"):
        report.outcome = "failed"
        report.longrepr = f"skipped although AFFINEQUANT_REQUIRE_VLLM=1: {call.excinfo}"
    return report


@pytest.fixture(autouse=True)
def scores(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's scores are kept: not among the user's, and nothing is there yet."""
    folder = tmp_path_factory.getbasetemp() / "scores" / uuid.uuid4().hex
    monkeypatch.setenv("AFFINEQUANT_SCORES", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(tied=True, ...): the folder of that tiny Llama, written once; tests must not change it."""
    from tests.tiny import tiny_llama

    folders: dict[tuple, Path] = {}

    def folder(**shape: Any) -> Path:
        key = tuple(sorted(shape.items()))
        if key not in folders:
            folders[key] = tiny_llama(tmp_path_factory.mktemp("tiny"), **shape)
        return folders[key]

    return folder


NEAREST = {"preset": "fast", "rounding": "nearest", "weight_clip": "none", "activation_clip": "none"}


@pytest.fixture(scope="session")
def mixture(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """mixture(family, scheme, tier, **shape): the finished folder of a tiny mixture of experts, rounded to nearest and written
    once; tests must not change it."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "text.txt").write_text(" ".join(f"{i} brown hares in field {i % 17}" for i in range(1500)))

    def make(family: str, scheme: str = "w4a4", tier: str = "merged", **shape: Any) -> Path:
        import affinequant

        out = folder / "-".join(map(str, (family, scheme, tier, *shape.values())))
        if not out.exists():
            fields: dict[str, Any] = {"samples": 4, "seq_len": 32, "data": folder / "text.txt", **NEAREST}
            affinequant.quantize(tiny(family=family, **shape), scheme=scheme, tier=tier, out=out, **fields)
        return out

    return make


@pytest.fixture
def tiny_copy(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """As `tiny`, but a copy that the test may change."""

    def folder(**shape: Any) -> Path:
        return Path(shutil.copytree(tiny(**shape), tmp_path / "source"))

    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny: Callable[..., Path]) -> Any:
    """Byte-level, 266 tokens, adds no BOS."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny())


@pytest.fixture(scope="module")
def bos_tokenizer(tiny: Callable[..., Path]) -> Any:
    """The same, but it starts each text with its BOS, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    made: Any = AutoTokenizer.from_pretrained(tiny())
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


@pytest.fixture(scope="session")
def smollm2_w4a4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at W4A4 by preset `fast` without its costly search for ranges, merged tier, made once for all
    workers; the folder named in AFFINEQUANT_TEST_SMOLLM2 is used instead."""
    if made := os.environ.get("AFFINEQUANT_TEST_SMOLLM2"):
        return Path(made)
    from filelock import FileLock

    import affinequant

    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2-w4a4"
    with FileLock(f"{out}.lock"):  # whoever comes second finds it finished
        less = {"samples": 4, "weight_clip": "none"}
        affinequant.quantize(model="demo", scheme="w4a4", tier="merged", preset="fast", out=str(out), **less)
    return out
