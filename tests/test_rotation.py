"""Learned rotations: exact where nothing is rounded, the network that is quantised later, better on held-out text, and
undone where they are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant.data.tokens import Tokens
from affinequant.learning import rotation
from affinequant.learning.network import block_job
from affinequant.learning.rotation import Rotations, RoundedInputs
from affinequant.learning.work import Work
from affinequant.models.decoder import Decoder, open_decoder
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.pipeline import tokens_of
from affinequant.plan import Plan, plan
from affinequant.progress import Silent
from affinequant.recipe.recipe import resolve
from affinequant.rounding.job import BlockJob
from affinequant.run.run import Run
from affinequant.stages import ROTATED, run_stages
from affinequant.transforms import LEARNED_ROTATIONS, build
from affinequant.transforms.fold import fold, rotate_block
from affinequant.transforms.site_input import SiteInput

TEXT = " ".join(f"{i} green bottles hang on wall {i * 7 % 13}, and {i % 5} fall down" for i in range(400))
SITES = {"residual": "orthogonal", "vo": "orthogonal", "mlp_mid": "hadamard"}
Tiny = Callable[..., Path]


class Case(NamedTuple):
    made: Plan
    run: Run
    tokens: Tokens
    decoder: Decoder

    def rotations(self, listen: Any = None) -> tuple[Any, Any]:
        """Learned where they are not on disk, and then as the blocks get them."""
        parts: dict[str, Any] = self._asdict() | {"listen": listen or Silent()}
        work = Work(**parts)
        run_stages((stage for stage in self.made.stages if stage.name == ROTATED), self.run, work)
        return work.rotations

    def job(self, index: int) -> BlockJob:
        _, kwargs = self.decoder.embed(self.tokens.ids[:1], self.outer())
        return block_job(self.made, self.decoder, index, kwargs)

    def outer(self) -> dict[str, Tensor]:
        return self.made.source.read(name for name in self.made.source.entries if ".layers." not in name)

    def load(self, index: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{index}."
        return {n[len(prefix) :]: t.float() for n, t in self.made.source.read(self.names(index)).items()}

    def names(self, index: int) -> list[str]:
        return self.made.source.names_under(f"model.layers.{index}")


@pytest.fixture
def case(tiny: Tiny, tmp_path: Path) -> Callable[..., Case]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def make(folder: Path | None = None, **fields: Any) -> Case:
        sizes = {"samples": 10, "seq_len": 48, "rotation_len": 24, "rotation_steps": 30}
        given = {"preset": "rtn", "tier": "online", "transforms": SITES, "data": str(text)} | sizes | fields
        recipe = resolve({"model": str(folder or tiny()), "out": str(tmp_path / "out")} | given)
        made = plan(recipe)
        decoder = open_decoder(made.source, made.family, made.dims, torch.device("cpu"), torch.float32)
        return Case(made, Run.open(tmp_path / "run", {}), tokens_of(made, Silent()), decoder)

    return make


def objective(case: Case) -> tuple[Rotations, tuple[Tensor, Tensor]]:
    """Away from its start, with a batch."""
    jobs = [case.job(index) for index in range(2)]
    blocks = [RoundedInputs(job, case.load) for job in jobs]
    name, recipe = case.made.recipe.transforms["residual"], case.made.recipe
    residual: Any = build(name, case.made.sites["residual"], seed=recipe.seed, alpha=0.0)
    generator = torch.Generator().manual_seed(1)
    made = Rotations(blocks, case.outer(), residual, 0.1)
    with torch.no_grad():
        for group in made.groups():
            for parameter in group.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1])
    x, _ = case.decoder.embed(case.tokens.ids[:2], case.outer())
    full = x
    for job in jobs:
        full = job.run_all(case.load(job.index), full)
    return made, (x, full)


@pytest.mark.parametrize(
    "transforms",
    [SITES, SITES | {"residual": "gram-schmidt", "vo": "gram-schmidt"}, {"residual": "orthogonal", "vo": "kronecker"}],
    ids=str,
)
@pytest.mark.parametrize("shape", [{}, {"bias": True, "kv_heads": 1, "hidden": 96}], ids=str)
def test_without_rounding_nothing_changes(
    tiny: Tiny, case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, transforms: Any, shape: Any
) -> None:
    made, batch = objective(case(tiny(**shape), transforms=transforms, start="hadamard"))
    assert float(made.loss(batch).detach()) > 1e-3
    monkeypatch.setattr(SiteInput, "rounded", lambda _, x, *, through: x)
    assert abs(float(made.loss(batch).detach())) < 1e-7


def test_it_rounds_what_the_rotated_block_rounds(case: Callable[..., Case]) -> None:
    """The block on its own weights, rotating there and back, against the block with rotated weights."""
    here = case()
    made, (x, _) = objective(here)
    block, residual = made.blocks[1], made.residual.double()
    sites, family = here.made.sites, here.made.family
    matrix = residual.on_activations(torch.eye(64, dtype=torch.float64)).detach()
    with torch.no_grad():
        exact = {name: tensor.double() for name, tensor in here.load(1).items()}
        rotated = rotate_block(exact, family, sites["residual"], residual)
        online = block.fixed["mlp_mid"][0]
        rotated = fold(rotated, sites["vo"], block.values.double())  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]
        rotated = fold(rotated, sites["mlp_mid"], online, online=True)
        grid = block.job.activation_grid("vo")
        assert grid is not None

        def on_input(name: str, value: Tensor) -> Tensor:
            return fake_quantize_activation(online.on_activations(value) if name == "mlp_mid" else value, grid)

        expected = block.job.run(rotated, (x.double() @ matrix).float(), on_input)
        got = block(x, matrix.float()) @ matrix.float()
        rough = block(x, torch.eye(64)) @ matrix.float()
    assert float((got - expected).norm() / expected.norm()) < 0.02  # a few roundings fall the other way
    assert float((rough - expected).norm() / expected.norm()) > 0.1


def test_every_rotation_gets_a_gradient(case: Callable[..., Case]) -> None:
    made, batch = objective(case())
    made.loss(batch).backward()
    residual, values = made.groups()
    assert [group.name for group in (residual, values)] == ["residual", "values"]
    assert len(residual.parameters) == 1 and len(values.parameters) == 2
    for parameter in (*residual.parameters, *values.parameters):
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)


@pytest.mark.parametrize("name", LEARNED_ROTATIONS)
def test_the_rate_is_the_angle_of_the_first_steps(case: Callable[..., Case], name: str) -> None:
    here = case(transforms={"residual": name, "vo": name})
    blocks = [RoundedInputs(here.job(index), here.load) for index in range(2)]
    residual: Any = build(name, here.made.sites["residual"], seed=0, alpha=0.0)
    made = Rotations(blocks, here.outer(), residual, 0.1)
    values: Any = blocks[0].values
    for group, module in zip(made.groups(), (residual, values), strict=True):
        start = module.blocks().detach()
        skew = random_signs(*module.params.shape)
        with torch.no_grad():
            module.params.add_(group.lr * (skew if name == "orthogonal" else start @ skew))
        angle = (module.blocks().detach() - start).norm(dim=-1).mean()
        assert float(angle) == pytest.approx(0.1, rel=0.15)


def random_signs(count: int, n: int, _: int) -> Tensor:
    """Skew-symmetric [count, n, n]."""
    upper = torch.randint(0, 2, (count, n, n), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    return upper.triu(1) - upper.triu(1).mT


def test_what_starts_from_data_is_left_to_its_block(case: Callable[..., Case]) -> None:
    here = case(tier="merged", transforms={"residual": "orthogonal", "vo": "hadamard+banded", "mlp_mid": "diagonal"})
    block = RoundedInputs(here.job(0), here.load)
    assert block.left == {"mlp_mid"} and block.values is None and len(block.fixed["vo"]) == 1


def outlier_model(tiny: Tiny, folder: Path, *, spread: bool) -> Path:
    """Every embedding holds one large vector, which the fixed rotation that learning starts from spreads evenly, or
    turns onto an axis."""
    source = tiny()
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    recipe = resolve({"model": str(source), "data": "demo", "seq_len": 32})
    hadamard: Any = build("hadamard", plan(recipe).sites["residual"], seed=0, alpha=0.0)
    eye = torch.eye(64, dtype=torch.float64)
    matrix = eye if spread else hadamard.on_activations(eye)
    state = load_file(source / "model.safetensors")
    embedding = state["model.embed_tokens.weight"].double() + 8 * matrix[:, 5]
    state["model.embed_tokens.weight"] = embedding.bfloat16()
    for name, tensor in state.items():
        if name.endswith("layernorm.weight"):
            state[name] = torch.ones_like(tensor)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Lines(Silent):
    """What was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("name", LEARNED_ROTATIONS)
def test_it_learns_where_the_fixed_rotation_is_poor(
    tiny: Tiny, case: Callable[..., Case], tmp_path: Path, name: str
) -> None:
    here = case(outlier_model(tiny, tmp_path / "model", spread=False), transforms=SITES | {"residual": name})
    listen = Lines()
    residual, starts = here.rotations(listen)
    report = here.run.report(ROTATED)
    assert report["divergence_last"] < 0.7 * report["divergence_first"] and report["events"] == []
    assert report["steps"] == 30 and sum("nats per token" in line for line in listen.lines) == 2
    eye = torch.eye(64, dtype=torch.float64)
    learned, fixed = (
        rotated.on_activations(eye).detach()
        for rotated in (residual, build("hadamard", here.made.sites["residual"], seed=0, alpha=0.0))
    )
    torch.testing.assert_close(learned @ learned.mT, eye, rtol=0, atol=1e-12)
    assert float((learned - fixed).abs().max()) > 0.05
    assert starts.keys() == {0, 1}
    for values in starts.values():
        blocks = values["vo"]
        torch.testing.assert_close(blocks @ blocks.mT, torch.eye(16).double().expand(2, 16, 16), rtol=0, atol=1e-12)
    again, _ = here.rotations(Lines())
    assert torch.equal(again.on_activations(eye), learned)  # taken from the run, not learned anew


def test_what_harms_is_undone_and_said(case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a rate does to the network: held-out text is made to say that what was learned is worse."""
    turned: list[Tensor] = []

    def worse(loss: Any, *_: Tensor) -> float:
        turned.append(loss.__self__.residual.params.detach().clone())
        return float(len(turned))

    monkeypatch.setattr(rotation, "mean_loss", worse)
    here = case(rotation_steps=4, transforms={"residual": "orthogonal"})
    residual, _ = here.rotations()
    report = here.run.report(ROTATED)
    assert len(turned) == 2 and not torch.equal(*turned)
    assert report["divergence_last"] == report["divergence_first"] == 1
    assert any("stays where it starts" in event for event in report["events"])
    eye = torch.eye(64, dtype=torch.float64)
    fixed = build("hadamard", here.made.sites["residual"], seed=0, alpha=0.0)
    torch.testing.assert_close(residual.on_activations(eye), fixed.on_activations(eye), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("samples", "steps"), [(1, 3), (10, 30), (10, 4)])
def test_what_judges_is_not_trained_on(case: Callable[..., Case], samples: int, steps: int) -> None:
    here = case(samples=samples, rotation_steps=steps, seq_len=24)
    pieces, held = rotation._pieces(here.tokens.ids, here.made)
    assert pieces.shape[1] == 24 and 1 <= held < max(2, len(pieces)) and len(pieces) <= samples + (samples == 1)
    if samples > 1:
        assert len(pieces.unique(dim=0)) == len(pieces)


def test_fixed_rotations_leave_no_stage(case: Callable[..., Case]) -> None:
    here = case(transforms={"residual": "hadamard"})
    residual, starts = here.rotations()
    assert residual is not None and starts == {} and not list(here.run.stages.iterdir())
    assert case(transforms={}).rotations() == (None, {})


def test_the_blocks_go_on_from_it_and_the_report_tells(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    done = affinequant.quantize(
        str(tiny(tied=True)),
        preset="quarot",
        transforms=SITES,
        data=str(text),
        samples=6,
        seq_len=32,
        rotation_steps=6,
        rotation_lr=1e-2,
        out=tmp_path / "out",
    )
    told = done.report["rotation"]
    assert len(told["trace"]) == 6 and sum(told["trace"]) / 6 == pytest.approx(told["curve"][0])
    assert told["steps"] == 6 and told["seconds"] > 0 and told["divergence_last"] <= told["divergence_first"]
    assert done.report["verified"]["passed"] and done.report["non_finite"] == 0
    assert done.report["plan"]["sites"][0]["transform"] == "orthogonal"
