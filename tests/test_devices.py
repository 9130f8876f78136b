"""Every preset and option with its blocks on a GPU that is not there (tests/pretend.py): no operation mixes devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_kernels import reference

from affinequant import pipeline
from affinequant.learning import continuous, rotation
from affinequant.learning.work import Work
from affinequant.numbers import grid_of
from affinequant.plan import plan
from affinequant.progress import Silent
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.recipe import resolve
from affinequant.recipe.scheme import Scheme
from affinequant.run.run import Run
from tests.pretend import CUDA, Pretend, pretend
from tests.tiny import TIERS

Make = Callable[..., Path]
OPTIONS: list[dict[str, Any]] = [
    {"preset": "paper", "judge": "kl"},
    {"preset": "spinquant", "judge": "kl", "epochs": 1},
    {"preset": "fast", "tier": "online", "transforms": {"attn_in": "auto", "mlp_in": "auto", "mlp_mid": "auto"}},
    {"preset": "fast", "tier": "online", "rounding": "auto", "scheme": "w4a4kv4"},
    {"preset": "fast", "tier": "merged", "rounding": "gptaq", "scheme": "w4a16-g32"},
    {"preset": "default", "tier": "online", "tp": 2, "offload": "disk"},
    {"preset": "paper", "aux_loss": True, "loss": "mse"},
]


@pytest.fixture
def blocks(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(500)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 0)
    for module in (continuous, rotation):  # autograd, which runs a block again, knows nothing of the pretence
        monkeypatch.setattr(module, "checkpoint", lambda block, *args, use_reentrant: block(*args))

    def call(**fields: Any) -> Run:
        small = {
            "model": tiny(tied=True, hidden=32, mlp=64),
            "samples": 4,
            "seq_len": 16,
            "data": tmp_path / "text.txt",
        }
        small |= {"device": "cuda", "dtype": "float32", "out": tmp_path / "out"}
        if PRESETS[fields["preset"]].settings.get("epochs"):
            small["epochs"] = 1
        made = plan(resolve(small | fields))
        tokens = pipeline.tokens_of(made, Silent())
        run = Run.open(tmp_path / "run", {})
        with pretend():
            decoder = pipeline.decoder_of(made)
            pipeline.make_stages(Work(made=made, run=run, tokens=tokens, decoder=decoder, listen=Silent()))
        return run

    return call


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda', but CUDA is not available:UserWarning")
@pytest.mark.parametrize(
    "fields",
    [*({"preset": preset, "tier": tier} for preset, tier in TIERS), *OPTIONS],
    ids=lambda fields: "-".join(str(value) for value in fields.values() if not isinstance(value, dict)),
)
def test_nothing_mixes_devices(fields: dict[str, Any], blocks: Callable[..., Run]) -> None:
    run = blocks(**fields)
    assert run.pending(["outer", "block.0000", "block.0001"]) == []
    assert not any(isinstance(tensor, Pretend) for tensor in run.tensors("block.0001").values())


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-sym", "w4a8", "w8a8"])
def test_a_grid_is_the_same_on_every_device(scheme: str) -> None:
    fmt = Scheme.parse(scheme).activation
    assert fmt is not None
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    rows = reference.row_quant(x, bits=fmt.bits, symmetric=fmt.symmetric, clip=0.9)
    grid = grid_of(fmt)
    wanted = grid.params(x.amin(1), x.amax(1))
    with pretend():
        there = x.to("cuda")
        low, high = grid.range(there)
        pair = grid.params(0.9 * low, 0.9 * high)
        codes, scale, zero = (part.cpu() for part in (grid.nearest(there, *pair), *pair))
        got = [part.cpu() for part in grid.params(there.amin(1), there.amax(1))]
        assert not torch.equal((there.amax(1) / 15).cpu(), x.amax(1) / 15), "the pretence divides as CUDA does"
    assert torch.equal(scale[:, 0], rows.scale) and torch.equal(codes.to(torch.int8), rows.q)
    assert torch.equal(zero[:, 0].to(torch.int32), rows.zero)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))


def test_the_pretended_device_refuses_what_a_gpu_does() -> None:
    with pretend():
        here, there = torch.randn(2, 3, device="cuda"), torch.randn(3, 2)
        assert here.device == CUDA and there.device.type == "cpu"
        assert (here @ there.to(here.device)).device == CUDA and (here * torch.tensor(2.0)).device == CUDA
        assert here.cpu().device.type == "cpu" and torch.nn.Linear(3, 2).to("cuda").weight.device == CUDA
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            here @ there
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
