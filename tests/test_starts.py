"""Closed-form starts: diagonals that balance, matrices that level, each on what it will meet."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from affinequant.learning import starts
from affinequant.learning.objective import BlockObjective, folded_exactly
from affinequant.learning.starts import Watch, build_transforms, looks_at_data
from affinequant.recipe.presets import PRESETS
from affinequant.transforms.online import apply_online
from tests.test_objective import make_job, objective_of, started

Tiny = Callable[..., Path]
DIAGONALS = dict.fromkeys(("attn_in", "vo", "mlp_in", "mlp_mid"), "diagonal")


@pytest.mark.parametrize("by", ["maximum", "rms"])
@pytest.mark.parametrize("balance", [0.0, 0.5, 0.8])
def test_a_diagonal_balances_activations_against_weights(tiny: Tiny, balance: float, by: str) -> None:
    job, tensors, x = make_job(tiny(), preset="rtn", transforms=DIAGONALS, balance=balance, balance_by=by)
    found, online = started(job, tensors, x)
    assert not online and set(found) == set(DIAGONALS)
    scales = {name: module.on_activations(torch.ones(job.sites[name].width)) for name, module in found.items()}
    seen: dict[str, Tensor] = {}  # all four samples count, not only the first batch
    job.run(tensors, x, lambda site, value: seen.update({site: value}) or value)
    a, w = seen["mlp_mid"].abs().flatten(0, -2), tensors["mlp.down_proj.weight"].abs()
    a, w = (part.amax(0) if by == "maximum" else part.square().mean(0).sqrt() for part in (a, w))
    expected = w ** (1 - balance) / a**balance
    torch.testing.assert_close(scales["mlp_mid"].detach(), expected / expected.log().mean().exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("samples", [4, 32, 250, 256])
def test_more_text_gives_the_first_token_no_more_weight(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What closed forms see of it is its share of all tokens, one in 16, whatever the batches."""
    monkeypatch.setattr(starts, "ROWS", 64)
    watch = Watch(samples, 16, seed=1)
    value = torch.arange(16.0).expand(samples, 16)[..., None].repeat(1, 1, 3)
    for batch in value.split(6):
        assert watch("mlp_mid", batch) is batch and watch("vo", batch) is batch
    for seen in watch.seen().values():
        counts = seen.rows[:, 0].long().bincount(minlength=16)
        assert counts.min() > 0 and counts.max() - counts.min() <= 1 and len(seen.rows) >= 64
        assert torch.equal(seen.largest, torch.full((3,), 15.0))


def test_a_start_evens_out_what_is_quantised(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), preset="smoothquant", balance=1.0)
    tensors["input_layernorm.weight"][7] *= 50
    objective = objective_of(job, tensors, x)
    before, after = ({}, {})
    job.run_all(tensors, x, lambda site, value: before.setdefault(site, value))
    with torch.no_grad():
        job.run_all(objective.folded(), x, lambda site, value: after.setdefault(site, value))

    def unevenness(value: Tensor) -> float:
        largest = value.abs().flatten(0, -2).amax(0)
        return float(largest.max() / largest.median())

    assert unevenness(before["attn_in"]) > 20 and unevenness(after["attn_in"]) < 2


@pytest.mark.parametrize("tier", ["merged", "online"])
@pytest.mark.parametrize("preset", PRESETS)
def test_transforms_are_built_in_the_order_of_the_sites(tiny: Tiny, preset: str, tier: str) -> None:
    job, tensors, x = make_job(tiny(), preset=preset, tier=tier)
    folded, online = started(job, tensors, x)
    wanted = [name for name in job.sites if name in job.recipe.transforms and name != "residual"]
    assert [name for name in wanted if name in folded] == list(folded)
    assert [name for name in wanted if name in online] == list(online)
    assert {*folded, *online} == set(wanted)
    always = PRESETS[preset].settings.get("tier") == "online"
    assert bool(online) == (always or (tier == "online" and bool(PRESETS[preset].online)))


ONLINE = {
    "kronecker": {"attn_in": "diagonal+kronecker", "vo": "kronecker", "mlp_in": "kronecker", "mlp_mid": "diagonal+kronecker"},
    "hadamard": {"attn_in": "hadamard", "vo": "hadamard+kronecker", "mlp_in": "diagonal+hadamard", "mlp_mid": "hadamard"},
}  # fmt: skip


@pytest.mark.parametrize("shape", [{}, {"bias": True}, {"kv_heads": 1}], ids=str)
@pytest.mark.parametrize("kind", ONLINE)
def test_online_transforms_alone_change_nothing(tiny: Tiny, kind: str, shape: dict[str, int]) -> None:
    job, tensors, x = make_job(tiny(**shape), preset="rtn", tier="online", scheme="w4a16", transforms=ONLINE[kind])
    objective = BlockObjective(job, tensors, *started(job, tensors, x))
    expected = job.run_all(tensors, x)
    with torch.no_grad():
        torch.testing.assert_close(job.run(objective.folded(), x, objective.on_input), expected, rtol=1e-3, atol=2e-4)
        plain = job.run(objective.folded(), x)
    assert (plain - expected).abs().max() > 0.1  # what the sinks owe is paid at run time only
    exact = folded_exactly(objective, {name: tensor.double() for name, tensor in tensors.items()})
    stored = {site: module.online() for site, module in objective.online.items()}
    through = lambda site, value: apply_online(value, stored[site])  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(job.run(exact, x, through), expected, rtol=1e-3, atol=2e-4)


EVERY = {
    "kronecker": {"attn_in": "diagonal+kronecker", "vo": "kronecker", "mlp_in": "kronecker", "mlp_mid": "diagonal+kronecker"},
    "block": {"attn_in": "diagonal+block", "mlp_in": "block", "mlp_mid": "diagonal+block"},
    "dense": {"attn_in": "dense", "mlp_in": "diagonal+dense"},
    "lu": {"attn_in": "diagonal+lu", "mlp_mid": "lu"},
    "orthogonal": {"attn_in": "diagonal+orthogonal", "mlp_mid": "orthogonal"},
}  # fmt: skip
SMALL = {"hidden": 72, "heads": 3, "kv_heads": 1}


@pytest.mark.parametrize("shape", [{}, SMALL], ids=str)
@pytest.mark.parametrize("kind", EVERY)
def test_fixed_rotations_in_place_of_closed_forms(tiny: Tiny, kind: str, shape: dict[str, int]) -> None:
    """Orthogonal, and spread out, whatever the data; a diagonal ahead of them keeps its balance."""
    fields = {"preset": "rtn", "tier": "online", "transforms": EVERY[kind]}
    job, tensors, x = make_job(tiny(**shape), start="hadamard", **fields)
    folded, online = started(job, tensors, x)
    other = started(*make_job(tiny(**shape), **fields))
    assert set(online) == set(EVERY[kind])
    for site, module in online.items():
        eye = torch.eye(x.shape[-1] if site != "mlp_mid" else job.sites[site].width, dtype=torch.float64)
        matrix = module.double().on_activations(eye).detach()
        torch.testing.assert_close(matrix @ matrix.mT, eye, rtol=0, atol=1e-12)
        # Triangular factors have no start but the identity.
        assert (float(matrix.abs().max()) < 0.8) is (kind != "lu")
    assert folded.keys() == other[0].keys()
    for site, module in folded.items():
        ones = torch.ones(job.sites[site].width)
        assert torch.equal(module.on_activations(ones), other[0][site].on_activations(ones))


def test_a_fixed_start_looks_at_no_data(tiny: Tiny) -> None:
    job, tensors, _ = make_job(
        tiny(), preset="rtn", tier="online", start="hadamard", transforms={"vo": "kronecker", "mlp_mid": "hadamard"}
    )
    assert not looks_at_data(job) and looks_at_data(make_job(tiny(), preset="paper")[0])
    _, online = build_transforms(job, tensors, {})
    mixed = online["vo"].online()
    assert mixed["left"].shape == (4, 4)
    torch.testing.assert_close(mixed["left"].abs(), torch.full((4, 4), 0.5))
