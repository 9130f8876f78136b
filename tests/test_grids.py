"""A number format is one class: a third one, known to these tests alone, goes all the way that integers go."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from affinequant.learning.distill import Continuous, Divergence
from affinequant.learning.objective import BlockObjective
from affinequant.learning.selection import select
from affinequant.learning.starts import Watch
from affinequant.numbers import GRIDS, Grid, grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.numbers.weights import codes_of, dequantize, fake_quantize, weight_range
from affinequant.recipe.scheme import NumberFormat, Scheme
from affinequant.rounding.gptq import gptq, refine, search_activation_clip, search_weight_range
from affinequant.transforms.site_input import SiteInput
from tests.test_distill import finished, make
from tests.test_gptq import correlated, output_error, random
from tests.test_objective import make_job
from tests.tiny import quantized_input

Tiny = Callable[..., Path]
CHANNEL = NumberFormat(kind="ternary", bits=2, symmetric=True, granularity="channel")
GROUP = replace(CHANNEL, granularity="group", group_size=16)
TOKEN = replace(CHANNEL, granularity="token", dynamic=True)


@dataclass(frozen=True)
class Ternary:
    """-scale, 0 and scale; the scale is half of what a row spans."""

    WIDER: ClassVar[tuple[float, ...]] = ()
    fmt: NumberFormat

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        reach = x.abs().amax(-1, keepdim=True)
        return -reach, reach

    def params(self, low: Tensor, high: Tensor, store: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        scale = ((high - low) / 4).clamp_min(1e-8)
        scale = scale + (scale.detach().to(store).to(scale) - scale.detach())
        return scale, torch.zeros_like(scale)

    def nearest(self, x: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.div(x, scale, out=out).round_().clamp_(-1, 1)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mul(codes, scale, out=out)

    def kept(self, scale: Tensor, store: torch.dtype = torch.float32) -> Tensor:
        return scale + (scale.detach().to(store).to(scale) - scale.detach())

    def fake(self, x: Tensor, low: Tensor, high: Tensor, store: torch.dtype = torch.float32) -> Tensor:
        scale, _ = self.params(low, high, store)
        inside = (x / scale).clamp(-1, 1)
        return (inside + (inside.round() - inside).detach()) * scale


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "ternary", f"{__name__}:Ternary")


def scheme(weight: NumberFormat, activation: NumberFormat | None = TOKEN) -> Scheme:
    return Scheme(name="ternary", weight=weight, activation=activation)


@pytest.mark.parametrize("fmt", [CHANNEL, GROUP], ids=["channel", "group"])
def test_it_is_rounded_with_second_order_information(fmt: NumberFormat) -> None:
    grid, weight, x = grid_of(fmt), random(24, 64), correlated(64)
    hessian = x.mT @ x / len(x)
    low, high = search_weight_range(weight, hessian, grid, torch.bfloat16)
    whole_low, whole_high = weight_range(weight, grid)
    assert low.shape == whole_low.shape == (24, 64 // (fmt.group_size or 64)) and bool((high < whole_high).any())
    scale, zero = grid.params(low, high, torch.bfloat16)
    codes = codes_of(weight, scale, zero, grid)
    assert torch.equal(dequantize(codes, scale, zero, grid), fake_quantize(weight, low, high, grid, torch.bfloat16))
    found = [codes, gptq(weight, hessian, scale, zero, grid, damping=0.01)]
    found.append(refine(found[-1], weight, hessian, scale, zero, grid, damping=0.01, sweeps=4))
    errors = [output_error(x, weight, dequantize(codes, scale, zero, grid)) for codes in found]
    assert errors[2] < errors[1] < 0.5 * errors[0]
    assert all(set(codes.unique().tolist()) == {-1.0, 0.0, 1.0} for codes in found)


def test_its_activations_are_clipped_by_search() -> None:
    grid, x, weight = grid_of(TOKEN), random(50, 64), random(8, 64, seed=3)
    clip = search_activation_clip(x, weight, SiteInput(grid=grid))
    wrong = [float(((fake_quantize_activation(x, grid, ratio) - x) @ weight.mT).norm()) for ratio in (clip, 1.0)]
    assert clip < 1 and wrong[0] < wrong[1]


@pytest.mark.parametrize("weight", [CHANNEL, GROUP], ids=["channel", "group"])
def test_a_block_learns_its_ranges(tiny: Tiny, weight: NumberFormat) -> None:
    job, tensors, x = make_job(tiny(), preset="rtn", weight_clip="learn", activation_clip="learn")
    job = replace(job, scheme=scheme(weight))
    objective = BlockObjective(job, tensors, {})
    objective.loss((x, job.run_all(tensors, x)))["block"].backward()
    for group in objective.groups():
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in group.parameters)
    rounded = objective.quantized()
    for name in objective.linears:
        low, high = objective.ranges[name](tensors[f"{name}.weight"], job.weight_grid("vo"))
        scale, zero = job.weight_grid("vo").params(low, high, job.store)
        codes = codes_of(tensors[f"{name}.weight"], scale, zero, job.weight_grid("vo"))
        assert torch.equal(rounded[f"{name}.weight"], dequantize(codes, scale, zero, job.weight_grid("vo")))


def test_a_transform_is_chosen_for_it(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), preset="rtn", transforms={"mlp_mid": "auto"}, tier="online", cost_budget=100.0)
    job = replace(job, scheme=scheme(CHANNEL))
    watch = Watch(x.shape[0], x.shape[1], 0)
    job.run_all(tensors, x, watch)
    errors = select(job, tensors, watch.seen())[1]["mlp_mid"]["errors"]
    assert errors["none"] > 0.1 and min(errors.values()) < errors["none"]


@pytest.mark.parametrize(
    ("weight", "activation", "clip"), [(CHANNEL, TOKEN, "search"), (GROUP, TOKEN, "learn"), (CHANNEL, None, "search")]
)
def test_blocks_are_rounded_to_it_and_finished(
    tiny: Tiny, weight: NumberFormat, activation: NumberFormat | None, clip: str
) -> None:
    options: dict[str, Any] = {"weight_clip": clip, "activation_clip": clip, "rounding": "gptq", "sweeps": 2}
    case = make(tiny(), scheme(weight, activation), **options)
    x = case.embedded.double()
    for job, made, stage in zip(case.jobs, case.rounded, case.stages, strict=True):
        codes = [tensor for name, tensor in stage.items() if name.endswith(".codes")]
        assert codes and all(set(tensor.unique().tolist()) == {-1, 0, 1} for tensor in codes)
        assert not any(name.endswith(".zero") for name in stage)
        job = replace(job, decoder=replace(job.decoder, dtype=torch.float64))
        expected = job.run_all(made.tensors, x, quantized_input(job, made.clips, {}))
        torch.testing.assert_close(Continuous(job, stage).run_all(x), expected, rtol=1e-9, atol=1e-9)
    blocks = [Continuous(job, stage) for job, stage in zip(case.jobs, case.stages, strict=True)]
    Divergence(blocks, case.outer, 1e-2).loss((case.embedded, case.full)).backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.any()) for block in blocks for parameter in block.logs
    )
    if activation is None:  # the loss is smooth in all that is trained
        done = finished(case, finish_epochs=2, finish_lr=3e-2)
        assert done.fitted.best < 0.98 * done.fitted.series["held-out"][0]


def test_groups_of_a_token_have_grids_of_their_own() -> None:
    x = random(3, 5, 48)
    for fmt in (NumberFormat(bits=4, symmetric=False, granularity="token", dynamic=True), TOKEN):
        token, group = grid_of(fmt), grid_of(replace(fmt, granularity="group", group_size=8))
        expected = fake_quantize_activation(x.reshape(3, 5, 6, 8), token, 0.9).reshape(x.shape)
        for slices in (1, 2, 6):
            assert torch.equal(fake_quantize_activation(x, group, 0.9, slices), expected)
        with pytest.raises(ValueError, match="48 features has no 4 slices in groups of 8"):
            fake_quantize_activation(x, group, slices=4)


def test_a_checkpoint_names_a_kind_that_is_not_integers() -> None:
    assert TOKEN.stored()["kind"] == "ternary" and NumberFormat(**TOKEN.stored()) == TOKEN
    plain = Scheme.parse("w4a4").weight
    names = ["bits", "symmetric", "granularity", "group_size", "dynamic"]
    assert list(plain.stored()) == names and NumberFormat(**plain.stored()) == plain


def test_a_class_is_a_grid_without_a_word_about_it() -> None:
    grid: Grid = Ternary(CHANNEL)
    assert grid_of(CHANNEL) == grid
