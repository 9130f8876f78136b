"""The almost-linear RNN: its map, its rollout under teacher forcing, the systems it learns, training to the same bytes."""

import dataclasses

import numpy as np
import pytest
import torch
from affinequant_research.alrnn.model import FAR, AlmostLinear, new_model, packed, unpacked
from affinequant_research.alrnn.rollout import Rollout
from torch import Tensor

from affinequant.errors import AffineQuantError


def some_model(bent: int, size: float = 10.0, units: int = 8) -> AlmostLinear:
    random = np.random.default_rng(bent)
    model = new_model(units, bent, 3, random)
    return dataclasses.replace(model, W=size * model.W, h=random.standard_normal(units))


def step(model: AlmostLinear, z: np.ndarray) -> np.ndarray:
    """The map as it is written down."""
    bent = np.arange(model.M) >= model.M - model.P
    return model.A * z + model.W @ np.where(bent, np.maximum(z, 0), z) + model.h


@pytest.mark.parametrize("bent", [0, 1, 3, 5])
def test_a_free_run_is_the_map_again_and_again(bent: int) -> None:
    model = some_model(bent)
    made = model.free_run(model.start(np.array([1.0, -2.0, 0.5])), 260)
    assert made.shape == (260, 8) and (made[0, :3] == [1.0, -2.0, 0.5]).all()
    np.testing.assert_allclose(made[1:], [step(model, z) for z in made[:-1]], rtol=1e-10, atol=1e-10)


def test_a_run_ends_where_it_diverges() -> None:
    model = some_model(2, size=300.0)
    made = model.free_run(model.start(np.ones(3)), 1000)
    assert len(made) < 100 and np.abs(made).max() <= FAR < np.abs(step(model, made[-1])).max()
    broken = dataclasses.replace(model, h=np.full(8, np.nan))
    assert len(broken.free_run(model.start(np.ones(3)), 10)) == 1


def test_the_start_is_that_of_the_paper() -> None:
    model = new_model(50, 2, 3, np.random.default_rng(0))
    assert model.A.min() > 0 and model.A.max() < 1 and abs(model.W.std() - 0.01) < 0.001 and not model.h.any()
    assert model.L.shape == (47, 3) and abs(np.abs(model.L).max() - (6 / 50) ** 0.5) < 0.02


@pytest.mark.parametrize(("units", "bent", "observed"), [(4, 2, 3), (4, -1, 3), (4, 2, 0)])
def test_what_is_no_such_network_is_refused(units: int, bent: int, observed: int) -> None:
    with pytest.raises(AffineQuantError) as caught:
        new_model(units, bent, observed, np.random.default_rng(0))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("bent", [0, 2])
def test_unpacking_is_the_adjoint_of_packing(bent: int) -> None:
    random, model = np.random.default_rng(0), some_model(bent)
    gradient = random.standard_normal((8, 8 + bent + 1))
    parts = model.A, model.W, model.h
    taken = sum((one * part).sum() for one, part in zip(unpacked(gradient, bent), parts, strict=True))
    assert (packed(*parts, bent) * gradient).sum() == pytest.approx(taken)


def plain(model: AlmostLinear, weights: dict[str, Tensor], window: Tensor, every: int) -> Tensor:
    """The rollout as the paper writes it, by autograd."""
    x = window.transpose(1, 2)
    z, made = torch.cat([x[0], x[0] @ weights["L"].T], dim=1), []
    for now in range(1, len(x)):
        bent = torch.cat([z[:, : model.M - model.P], z[:, model.M - model.P :].relu()], dim=1)
        z = weights["A"] * z + bent @ weights["W"].T + weights["h"]
        made.append(z[:, : model.N])
        if now % every == 0:
            z = torch.cat([x[now], z[:, model.N :]], dim=1)
    return torch.stack(made).transpose(1, 2)


@pytest.mark.parametrize(("bent", "every"), [(2, 4), (0, 4), (5, 1), (2, 6), (1, 99)])
def test_the_rollout_and_its_gradient_are_those_of_autograd(bent: int, every: int) -> None:
    model = some_model(bent, size=5.0)
    weights = {name: torch.from_numpy(getattr(model, name)).requires_grad_() for name in "AWhL"}
    window = torch.from_numpy(np.random.default_rng(1).standard_normal((25, 3, 4)))
    rollout = Rollout(units=8, bent=bent, observed=3, steps=24, batch=4, every=every, dtype=np.float64)
    start = torch.cat([window[0], weights["L"] @ window[0]])
    found = rollout(weights["A"], weights["W"], weights["h"], start, window)
    wanted = plain(model, weights, window, every)
    torch.testing.assert_close(found, wanted)
    losses = [(made - window[1:]).square().mean() for made in (found, wanted)]
    grown, expected = (torch.autograd.grad(loss, list(weights.values())) for loss in losses)
    for one, other in zip(grown, expected, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_rollout_that_was_overwritten_has_no_gradient() -> None:
    rollout = Rollout(units=8, bent=2, observed=3, steps=5, batch=2, every=2)
    A, W, h = (torch.ones(shape, requires_grad=True) for shape in ((8,), (8, 8), (8,)))
    made = rollout(A, W, h, torch.ones(8, 2), torch.ones(6, 3, 2))
    rollout(A, W, h, torch.ones(8, 2), torch.ones(6, 3, 2))
    with pytest.raises(RuntimeError, match="another window"):
        made.sum().backward()
