"""The almost-linear RNN: its map, its rollout under teacher forcing, the systems it learns, training to the same bytes."""

import dataclasses

import numpy as np
import pytest
import torch
from affinequant_research.alrnn.model import FAR, AlmostLinear, new_model, packed, unpacked
from affinequant_research.alrnn.rollout import Rollout
from affinequant_research.alrnn.systems import SYSTEMS, lorenz96, runge_kutta, trajectories
from affinequant_research.alrnn.training import Learner, Training, phase_of, windows
from torch import Tensor

from affinequant.errors import AffineQuantError
from affinequant.fit import fit


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


@pytest.mark.parametrize("name", SYSTEMS)
def test_steps_are_of_the_fourth_order(name: str) -> None:
    system = SYSTEMS[name]
    start = np.array(system.start)[:, None] + np.random.default_rng(0).uniform(-1, 1, (len(system.start), 2))

    def after(pieces: int) -> np.ndarray:
        x = start
        for _ in range(pieces):
            x = runge_kutta(system.field, x, 0.08 / pieces)
        return x

    errors = [np.abs(after(pieces) - after(64)).max() for pieces in (2, 4)]
    assert 8 < errors[0] / errors[1] < 40


def test_fields_are_those_of_the_systems() -> None:
    x = np.random.default_rng(0).standard_normal(20)
    ring = [(x[(i + 1) % 20] - x[i - 2]) * x[i - 1] - x[i] + 8 for i in range(20)]
    np.testing.assert_allclose(lorenz96(x[:, None])[:, 0], ring)
    wings = np.array([[1.0, -1.0], [1.0, -1.0], [27.0, 27.0]]) * [[72**0.5], [72**0.5], [1.0]]
    np.testing.assert_allclose(SYSTEMS["lorenz63"].field(wings), 0, atol=1e-12)  # the two foci
    a = (5.7 - (5.7**2 - 4 * 0.2 * 0.2) ** 0.5) / 2
    np.testing.assert_allclose(SYSTEMS["roessler"].field(np.array([a, -a / 0.2, a / 0.2])), 0, atol=1e-12)


def test_trajectories_are_z_scored_and_two() -> None:
    train, other = trajectories("lorenz63", 4000)
    assert train.shape == other.shape == (4000, 3)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(train.std(0), 1)
    assert np.abs(train - other).max() > 1 and np.abs(other).max() < 4
    with pytest.raises(AffineQuantError, match="lorenz63"):
        trajectories("lorenz", 10)


SMALL = Training(M=6, T=12, tau=4, batch=4, updates=4, check_every=2)


def test_windows_are_of_the_series_with_noise_and_belong_to_seed_and_epoch() -> None:
    series = np.arange(300.0).reshape(100, 3)
    quiet = dataclasses.replace(SMALL, noise=0.0)
    made = list(windows(series, quiet, 0, 0))
    assert len(made) == 2 and made[0].shape == (13, 3, 4)
    assert ((made[0][1:] - made[0][:-1]) == 3).all() and ((made[0][:, 1:] - made[0][:, :-1]) == 1).all()
    noisy = [next(windows(np.zeros((5000, 3)), SMALL, *at)) for at in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(noisy[0], noisy[1]) and abs(float(noisy[0].std()) - 0.05) < 0.01
    assert not torch.equal(noisy[0], noisy[2]) and not torch.equal(noisy[0], noisy[3])


def test_training_keeps_the_checkpoint_that_is_judged_best() -> None:
    series = np.random.default_rng(0).standard_normal((100, 3))
    learner, seen = Learner(SMALL, 2, 3, 0), list[AlmostLinear]()

    def judge(model: AlmostLinear) -> float:
        seen.append(model)
        return [3.0, 1.0, 2.0][len(seen) - 1]

    report = fit(*phase_of(learner, series, 0, judge))
    assert report.steps == 4 and report.series["d_stsp"] == [3.0, 1.0, 2.0]
    assert (learner.model().W == seen[1].W).all() and (seen[1].W != seen[2].W).any()
    assert seen[0].L.shape == (3, 3) and (seen[0].L != seen[1].L).any()


@pytest.mark.parametrize(("changed", "says"), [({"check_every": 3}, "multiple"), ({"T": 100}, "smaller T")])
def test_settings_that_do_not_fit_are_refused(changed: dict[str, int], says: str) -> None:
    learner = Learner(dataclasses.replace(SMALL, **changed), 2, 3, 0)
    with pytest.raises(AffineQuantError, match=says):
        phase_of(learner, np.zeros((100, 3)), 0, lambda model: 0.0)
