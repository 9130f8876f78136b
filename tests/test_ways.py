"""Which rounding wins: judged on samples that it has not seen, and shown."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from affinequant.numbers import grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.numbers.weights import weight_range
from affinequant.recipe.scheme import Scheme
from affinequant.rounding.moments import Inputs, Moments, gather
from affinequant.rounding.replay import Replay
from affinequant.rounding.ways import Way, choose, round_by, ways
from tests.test_gptq import correlated, random
from tests.test_objective import make_job

Tiny = Callable[..., Path]
GRID = grid_of(Scheme.parse("w4a4").weight)


def moments(x: Tensor, target: Tensor) -> Moments:
    return Moments(hessian=x.mT @ x / len(x), drift=(target - x).mT @ x / len(x))


def chosen(fitted: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> tuple[Way, dict[str, float]]:
    weight = random(24, 64)
    scale, zero = GRID.params(*weight_range(weight, GRID))
    seen = moments(*fitted)
    way, errors = choose(weight, Inputs(every=seen, fitted=seen, held=held), scale, zero, GRID, 0.01)
    return way, dict(errors)


def test_gptq_wins_where_unseen_inputs_are_like_those_seen() -> None:
    x = correlated(64, 600)
    way, errors = chosen((x[:500], x[:500]), (x[500:], x[500:]))
    assert way.kind == "gptq" and errors[str(way)] < 0.7 * errors["nearest"]
    assert list(errors) == ["nearest", "gptq 0.01", "gptq 0.1", "gptaq 0.1", "gptaq 1"]


def test_nearest_wins_where_gptq_has_learned_what_does_not_hold() -> None:
    """Three tokens say nothing about independent features; errors spread along them are errors elsewhere."""
    few, other = random(3, 64, seed=4), random(200, 64, seed=5)
    way, errors = chosen((few, few), (other, other))
    assert way == Way(kind="nearest") and errors["gptq 0.01"] > 1.2 * errors["nearest"]


def test_the_full_precision_target_wins_where_inputs_drift_alike() -> None:
    target = correlated(64, 600)
    x = target @ (torch.eye(64) + 0.05 * random(64, 64, seed=8))
    way, errors = chosen((x[:500], target[:500]), (x[500:], target[500:]))
    assert way.kind == "gptaq" and errors[str(way)] < 0.5 * errors["gptq 0.01"]


def test_what_cannot_be_factored_is_out_of_the_running() -> None:
    x = correlated(64)
    bad = Moments(hessian=torch.full((64, 64), torch.nan), drift=torch.zeros(64, 64))
    weight = random(24, 64)
    scale, zero = GRID.params(*weight_range(weight, GRID))
    way, errors = choose(weight, Inputs(every=bad, fitted=bad, held=(x, x)), scale, zero, GRID, 0.01)
    assert way.kind == "nearest" and list(errors) == ["nearest"]


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_every_way_gives_codes_of_the_grid(damping: float) -> None:
    weight, x = random(8, 32), correlated(32)
    scale, zero = GRID.params(*weight_range(weight, GRID))
    for way in ways(damping):
        codes = round_by(way, weight, moments(x, 1.1 * x), scale, zero, GRID)
        assert torch.equal(codes, codes.round().clamp(GRID.fmt.code_min, GRID.fmt.code_max))


@pytest.mark.parametrize("rounding", ["gptq", "gptaq", "auto"])
def test_moments_are_those_of_the_rounded_inputs(tiny: Tiny, rounding: str) -> None:
    """With `auto` the last of four samples is kept out of `fitted`, and is what judges."""
    job, tensors, x = make_job(tiny(), preset="fast", rounding=rounding)
    passing, beside = Replay(job, x, {}), Replay(job, x + 0.1, {})
    passing.reach("mlp_in", tensors, {})
    beside.reach("mlp_in", tensors, {})
    inputs = gather(job, passing, beside if rounding != "gptq" else None, passing.site, 0.9)
    rows, target = (torch.cat([value for _, value in one.values()]).flatten(0, 1) for one in (passing, beside))
    assert job.activation_grid("vo") is not None
    rows = fake_quantize_activation(rows, job.activation_grid("vo"), 0.9)
    held = 24 if rounding == "auto" else 0
    for found, count in ((inputs.every, 96), (inputs.fitted, 96 - held)):
        torch.testing.assert_close(found.hessian, rows[:count].mT @ rows[:count] / count)
        assert (found.drift is None) is (rounding == "gptq")
        if found.drift is not None:
            torch.testing.assert_close(found.drift, (target - rows)[:count].mT @ rows[:count] / count)
    assert (inputs.held is not None) is bool(held)
    if inputs.held is not None:
        torch.testing.assert_close(inputs.held, (rows[-held:], target[-held:]))


def test_what_judges_are_tokens_of_every_position(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four held-out samples as many tokens as of one: each position once, whatever the batches."""
    monkeypatch.setattr("affinequant.rounding.moments.HELD_TOKENS", 24)
    job, tensors, x = make_job(tiny(), preset="fast", rounding="auto", batch_size=3)
    x = torch.cat([x + 0.1 * number for number in range(8)])
    passing, beside = Replay(job, x, {}), Replay(job, x, {})
    for one in (passing, beside):
        one.reach("mlp_in", tensors, {})
    inputs = gather(job, passing, beside, passing.site, 1.0)
    assert inputs.held is not None
    held = torch.cat([value for _, value in beside.values()])[-4:]
    found = (held[:, :, None] == inputs.held[1]).all(-1)
    assert found.sum((1, 2)).tolist() == [6] * 4 and found.sum((0, 2)).tolist() == [1] * 24
