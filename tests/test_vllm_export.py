"""Stock vLLM on what `export` writes. In a file of its own, late in the order: an engine in this process takes torch's
threads for itself, and what forks after it would wait for them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.test_export import SHAPE, export
from tests.test_export import made as made
from tests.test_vllm import reference_losses, stock_needs_avx512, vllm_losses
from tests.tiny import dense_model, rounded

Tiny = Callable[..., Path]
Make = Callable[..., Path]

VLLM = [
    pytest.param("w4a4", "compressed-tensors", "w4a16", "CompressedTensorsWNA16", marks=stock_needs_avx512),
    ("w4a4", "int-quantized", "w8a8", "CompressedTensorsW8A8Int8"),
    ("w4a16-sym", "int-quantized", "w4a8", "CompressedTensorsW4A8Int"),
    pytest.param("w4a16-sym", "gptq", None, "AutoGPTQLinearMethod", marks=stock_needs_avx512),
]


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("source", "form", "asked", "runs_as"), VLLM, ids=lambda value: str(value))
def test_stock_vllm_computes_an_export(
    source: str, form: str, asked: str | None, runs_as: str, made: Make, tiny: Tiny, tmp_path: Path
) -> None:
    export(made(source), form, tmp_path / "out", asked)
    window = [torch.randint(3, 300, (48,), generator=torch.Generator().manual_seed(0)).tolist()]
    expected = torch.tensor(reference_losses(dense_model(rounded(tiny(**SHAPE), source)), window))
    difference = torch.tensor(vllm_losses(tmp_path / "out", window, runs_as)) - expected
    # bfloat16, and 8-bit activations where they are declared, against weights alone in float32.
    assert float(difference.abs().mean()) < 0.05 * float(expected.std())
