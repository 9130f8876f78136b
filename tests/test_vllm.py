"""Stock vLLM on a CPU, without our plugin, loads what is written and computes it: tiny models, and the real demo."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

WINDOW, WINDOWS = 1024, 4
stock_needs_avx512 = pytest.mark.xfail(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"),
    reason="without AVX512, vLLM's CPU build has no W4A16 kernel, and its sums of int8 products saturate",
    raises=(AttributeError, AssertionError),
    strict=True,
)


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM as it is where our plugin is not installed."""
    from affinequant.serve.vllm_plugin import AffineQuantConfig

    monkeypatch.setattr(AffineQuantConfig, "override_quantization_method", lambda *given, **named: None)


@contextmanager
def engine(folder: Path, length: int) -> Iterator[Any]:
    """A vLLM engine in this process, gone afterwards."""
    from vllm import LLM

    torch.cpu._init_amx()  # see `amx_plugin`

    llm = LLM(
        model=str(folder),
        dtype="bfloat16",
        max_model_len=length,
        enforce_eager=True,
        max_logprobs=1,
        gpu_memory_utilization=0.3,
        disable_log_stats=True,
    )
    try:
        yield llm
    finally:
        del llm
        gc.collect()


def vllm_losses(folder: Path, windows: list[list[int]], runs_as: str) -> list[float]:
    """Negative log-likelihood of every token but the first, by prompt logprobs; `runs_as` is the engine's own word."""
    from vllm import SamplingParams

    losses = []
    with engine(folder, len(windows[0]) + 8) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        linear = model.model.layers[0].mlp.down_proj
        assert type(getattr(linear, "scheme", None) or linear.quant_method).__name__ == runs_as
        prompts = [{"prompt_token_ids": window} for window in windows]
        parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        for window, result in zip(windows, llm.generate(prompts, parameters, use_tqdm=False), strict=True):
            for token, entry in zip(window[1:], result.prompt_logprobs[1:], strict=True):
                losses.append(-entry[token].logprob)
    return losses


def reference_losses(model: Any, windows: list[list[int]]) -> list[float]:
    """The same in transformers."""
    losses: list[float] = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            logits = model(ids).logits[0, :-1].float()
            losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return losses


def weight_only(folder: Path, dtype: torch.dtype) -> Any:
    """The checkpoint as stock transformers reads it: 4-bit weights, 16- or 32-bit activations."""
    from transformers import AutoModelForCausalLM

    from affinequant.serve.transformers_quantizer import stock

    with stock():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model(torch.tensor([[1, 2, 3]]))  # compressed-tensors unpacks at the first forward of the whole model
    return model.eval()


@stock_needs_avx512
@pytest.mark.parametrize(
    ("scheme", "runs_as"),
    [
        ("w4a4", "CompressedTensorsWNA16"),
        ("w4a16-g32", "CompressedTensorsWNA16"),
        ("w4a16-sym", "CompressedTensorsWNA16"),
        ("w8a8", "CompressedTensorsW8A8Int8"),
    ],
)
def test_a_tiny_checkpoint_loads_and_agrees(
    scheme: str, runs_as: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    import affinequant

    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} red foxes and {i % 7} hens" for i in range(2000)))
    out = tmp_path / "out"
    # Heads of 32: the smallest that vLLM's attention on a CPU takes.
    source = tiny(hidden=128, heads=4, kv_heads=2, mlp=256)
    clip = {"activation_clip": "none"} if scheme == "w8a8" else {}
    fields = {"tier": "merged", "preset": "fast", "data": text, "samples": 4, "seq_len": 32} | clip
    affinequant.quantize(source, scheme=scheme, out=out, **fields)
    window = [torch.randint(3, 300, (48,), generator=torch.Generator().manual_seed(0)).tolist()]
    ours, theirs = reference_losses(weight_only(out, torch.float32), window), vllm_losses(out, window, runs_as)
    difference = torch.tensor(ours) - torch.tensor(theirs)
    spread = torch.tensor(ours).std()
    assert float(difference.abs().mean()) < 0.05 * float(spread), (ours[:5], theirs[:5])


@stock_needs_avx512
@pytest.mark.slow
def test_the_real_checkpoint_agrees_in_perplexity(smollm2_w4a4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    from affinequant.data.tokens import encode, evaluation_text

    tokenizer = AutoTokenizer.from_pretrained(smollm2_w4a4)
    ids = encode(tokenizer, evaluation_text("demo")[1])
    windows = [ids[index * WINDOW : (index + 1) * WINDOW] for index in range(WINDOWS)]
    served = vllm_losses(smollm2_w4a4, windows, "CompressedTensorsWNA16")
    assert len(served) >= 4_000
    losses = reference_losses(weight_only(smollm2_w4a4, torch.float32), windows)
    perplexity = [math.exp(sum(one) / len(one)) for one in (served, losses)]
    with capsys.disabled():
        print(f"\n  perplexity over {len(served)} tokens, in vLLM and in transformers: {perplexity}")
    assert perplexity[0] == pytest.approx(perplexity[1], rel=0.01)
