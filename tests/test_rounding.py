"""A block from real weights to codes: what is stored is what is computed with, on the inputs that will be seen."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from affinequant.learning.objective import BlockObjective
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.numbers.weights import codes_of, dequantize
from affinequant.rounding import block as rounding
from affinequant.rounding import replay, ways
from affinequant.rounding.block import round_block
from affinequant.rounding.gptq import ACTIVATION_RATIOS, GPTQFailure, gptq
from affinequant.rounding.rounded import Rounded
from affinequant.rounding.ways import Way
from tests.test_objective import make_job, unlearned
from tests.tiny import quantized_input

Tiny = Callable[..., Path]


def rounded(folder: Path, **fields: Any) -> tuple[Rounded, Any, dict[str, Tensor], Tensor]:
    """(result, job, the real tensors, the block's inputs)."""
    job, tensors, x = make_job(folder, **fields)
    objective = BlockObjective(job, tensors, unlearned(job))
    return round_block(job, {n: t.double() for n, t in tensors.items()}, x, objective, x), job, tensors, x


@pytest.mark.parametrize("shape", [{}, {"bias": True}], ids=str)
@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-sym", "w4a16-g32", "w8a8", "w4a8-g16-sym"])
def test_what_is_stored_is_what_is_computed_with(tiny: Tiny, scheme: str, shape: dict[str, Any]) -> None:
    result, job, tensors, _ = rounded(tiny(**shape), preset="fast", scheme=scheme)
    fmt, stored = job.scheme.weight, dict(result.stored)
    for linear in job.decoder.family.linears:
        name = linear.name
        codes, scale = stored.pop(f"{name}.codes"), stored.pop(f"{name}.scale")
        zero = stored.pop(f"{name}.zero") if not fmt.symmetric else torch.zeros_like(scale)
        assert codes.dtype == torch.int8 and codes.shape == tensors[f"{name}.weight"].shape
        assert fmt.code_min <= int(codes.min()) and int(codes.max()) <= fmt.code_max
        assert scale.shape == (len(codes), fmt.groups(codes.shape[1]))
        assert torch.equal(scale.bfloat16().float(), scale)
        assert torch.equal(
            dequantize(codes.float(), scale, zero.float(), job.weight_grid("vo")), result.tensors[f"{name}.weight"]
        )
        if job.scheme.activation is not None:
            assert float(stored.pop(f"{name}.input_clip")) == pytest.approx(result.linears[name]["clip"])
        assert result.linears[name]["sqnr"] > (10 if fmt.bits == 4 else 30)
    assert set(stored) == set(tensors) - {f"{linear.name}.weight" for linear in job.decoder.family.linears}
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), result.tensors[name]), f"{name} is stored otherwise than it was used"
    assert result.events == ()


@pytest.mark.parametrize("clip", ["none", "search", "learn", "learn+search"])
def test_activation_clips_come_from_where_the_recipe_says(tiny: Tiny, clip: str) -> None:
    result, *_ = rounded(tiny(), preset="rtn", activation_clip=clip)
    for ratio in result.clips.values():
        if clip == "none":
            assert ratio == 1.0
        elif clip == "learn":
            assert ratio == pytest.approx(0.9820138)
        else:
            assert ratio in ACTIVATION_RATIOS
    assert clip in ("none", "learn") or min(result.clips.values()) < 1


@pytest.mark.parametrize("room", [0, replay.KEPT_BYTES], ids=["again", "kept"])
def test_activation_clips_are_searched_on_every_sample(tiny: Tiny, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many tokens of each, and on each position once."""
    monkeypatch.setattr(rounding, "SEARCHED_TOKENS", 24)
    monkeypatch.setattr(rounding, "Replay", functools.partial(replay.Replay, room=room))
    seen: list[Tensor] = []
    monkeypatch.setattr(rounding, "search_activation_clip", lambda rows, *_: seen.append(rows) or 1.0)
    job, tensors, x = make_job(tiny(), preset="rtn", activation_clip="search")
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))  # no token is there twice
    round_block(job, tensors, x, BlockObjective(job, tensors, {}))
    reached: list[Tensor] = []
    with torch.no_grad():
        job.run(tensors, x, lambda site, value: reached.append(value) or value)
    found = (reached[0][:, :, None] == seen[0]).all(-1)
    assert len(seen) == 4 and len(seen[0]) == 24
    assert found.sum((1, 2)).tolist() == [6] * 4 and found.sum((0, 2)).tolist() == [1] * 24


def test_hessians_are_those_of_the_rounded_inputs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is taken on what the rounded part of the block before it gives, itself rounded."""
    seen: list[Tensor] = []
    monkeypatch.setattr(
        ways, "gptq", lambda w, hessian, *rest, **kw: seen.append(hessian) or gptq(w, hessian, *rest, **kw)
    )
    result, job, _, x = rounded(tiny(), preset="fast")
    reached: dict[str, list[Tensor]] = {}
    rounding_inputs = quantized_input(job, result.clips, {})

    def note(site: str, value: Tensor) -> Tensor:
        value = rounding_inputs(site, value)
        reached.setdefault(site, []).append(value.flatten(0, -2))
        return value

    job.run_all(result.tensors, x, note)
    assert len(seen) == len(reached) == 4
    for hessian, parts in zip(seen, reached.values(), strict=True):
        inputs = torch.cat(parts)
        torch.testing.assert_close(hessian, inputs.mT @ inputs / len(inputs), rtol=1e-4, atol=1e-4)


def output_noise(result: Rounded, job: Any, tensors: dict[str, Tensor], x: Tensor) -> float:
    target = job.run_all(tensors, x)
    after = job.run_all(result.tensors, x, quantized_input(job, result.clips, {}))
    return float((after - target).square().sum() / target.square().sum())


def test_each_step_from_nearest_to_searched_to_gptq_to_refined_helps_the_block(tiny: Tiny) -> None:
    steps: list[dict[str, Any]] = [{}, {"weight_clip": "search"}, {"rounding": "gptq"}, {"sweeps": 4}]
    asked: list[dict[str, Any]] = [{}]
    for step in steps:
        asked.append(asked[-1] | step)
    noise = [output_noise(*rounded(tiny(), preset="rtn", scheme="w4a16", **fields)) for fields in asked[1:]]
    assert noise[0] > noise[1] > noise[2] > noise[3] > 0


def test_a_hessian_that_cannot_be_factored_is_an_event(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Tensor:
        raise GPTQFailure("no way")

    monkeypatch.setattr(ways, "gptq", fails)
    result, _job, *_ = rounded(tiny(), preset="fast")
    assert len(result.events) == 4
    assert result.events[0] == "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj rounded to nearest: no way"
    assert all(bool(tensor.isfinite().all()) for tensor in result.tensors.values())


def test_nearest_is_nearest(tiny: Tiny) -> None:
    result, job, tensors, _ = rounded(tiny(), preset="rtn")
    for linear in job.decoder.family.linears:
        scale, zero = (result.stored[f"{linear.name}.{part}"].float() for part in ("scale", "zero"))
        nearest = codes_of(tensors[f"{linear.name}.weight"], scale, zero, job.weight_grid("vo"))
        assert torch.equal(result.stored[f"{linear.name}.codes"].float(), nearest)


def test_sites_that_have_no_clip_yet_pass_through(tiny: Tiny) -> None:
    job, _, x = make_job(tiny(), preset="fast")
    on_input = quantized_input(job, {"vo": 0.9}, {})
    assert on_input("mlp_mid", x) is x
    assert job.activation_grid("vo") is not None
    assert torch.equal(on_input("vo", x), fake_quantize_activation(x, job.activation_grid("vo"), 0.9))


def test_the_real_tensors_are_left_as_they_were(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), preset="fast")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    round_block(job, tensors, x, BlockObjective(job, tensors, {}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_each_group_is_rounded_by_what_errs_least_and_says_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    result, *_ = rounded(tiny(), preset="fast", rounding="auto")
    assert list(result.roundings) == ["attn_in", "vo", "mlp_in", "mlp_mid"]
    for one in result.roundings.values():
        assert one["rounding"] == min(one["errors"], key=one["errors"].get)
    # What is chosen is what is done, on all samples.
    for kind in ("nearest", "gptq", "gptaq"):
        way = Way(kind=kind, damping=0.01, pull=1.0)
        monkeypatch.setattr(rounding, "choose", lambda *_, way=way: (way, {str(way): 0.0}))
        forced, plain = (rounded(tiny(), preset="fast", rounding=name)[0] for name in ("auto", kind))
        assert {one["rounding"] for one in forced.roundings.values()} == {str(way)}
        for name, tensor in plain.stored.items():
            torch.testing.assert_close(forced.stored[name], tensor, rtol=1e-2, atol=1)


def test_a_target_needs_the_full_precision_inputs(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), preset="fast", rounding="gptaq")
    with pytest.raises(AssertionError, match="full-precision inputs"):
        round_block(job, tensors, x, BlockObjective(job, tensors, unlearned(job)))
