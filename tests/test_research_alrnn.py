"""The almost-linear RNN: its map, its rollout under teacher forcing, the systems it learns, training to the same bytes."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from affinequant_evals import Score
from affinequant_research.alrnn.attractors import BOUNDS, EXPERIMENTS, Attractors, Bounds, kept_to
from affinequant_research.alrnn.freerun import distance, of_run, rank, simplest
from affinequant_research.alrnn.model import FAR, AlmostLinear, new_model, packed, unpacked
from affinequant_research.alrnn.quantised import PARTS, rounded_model
from affinequant_research.alrnn.rollout import Rollout
from affinequant_research.alrnn.systems import SYSTEMS, lorenz96, runge_kutta, trajectories
from affinequant_research.alrnn.training import Learner, Training, phase_of, probes_of, relus_of, windows
from affinequant_research.experiment import Trial
from affinequant_research.running import found, run_experiment
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

    def measure(model: AlmostLinear) -> dict[str, float]:
        seen.append(model)
        return {"d_stsp": [3.0, 1.0, 2.0][len(seen) - 1], "rank": [2.0, 2.0, 1.0][len(seen) - 1]}

    report = fit(*phase_of(learner, series, 0, probes_of(learner, measure, ("d_stsp",))))
    assert report.steps == 4 and report.series["d_stsp"] == [3.0, 1.0, 2.0]
    assert (learner.model().W == seen[1].W).all() and (seen[1].W != seen[2].W).any()
    assert seen[0].L.shape == (3, 3) and (seen[0].L != seen[1].L).any()
    ranked, before = Learner(SMALL, 2, 3, 0), seen[2]
    seen.clear()
    report = fit(*phase_of(ranked, series, 0, probes_of(ranked, measure, ("d_stsp", "rank")), "rank"))
    assert len(seen) == 3, "a checkpoint is measured once"
    assert report.series["rank"] == [2.0, 2.0, 1.0] and report.series["d_stsp"] == [1.0, 2.0], (
        "the start is judged alone"
    )
    assert (ranked.model().W == seen[2].W).all() and (seen[2].W == before.W).all()


def test_of_those_that_are_near_enough_the_simplest_is_best() -> None:
    ordered = [
        rank(found, edges, 5.0) for found, edges in ((4.9, 4), (1.0, 5), (1.1, 5), (0.1, 6), (5.1, 0), (14.0, 0))
    ]
    assert ordered == sorted(ordered) and len(set(ordered)) == 6
    truth = np.random.default_rng(0).standard_normal((2000, 3))
    found = simplest(some_model(2, size=1.0), truth, 2000, 99.0)
    assert found["d_stsp"] == distance(some_model(2, size=1.0), truth, 2000), "a fixed point has one region"
    assert found["rank"] == rank(found["d_stsp"], 0, 99.0) < 0


@pytest.mark.parametrize(("changed", "says"), [({"check_every": 3}, "multiple"), ({"T": 100}, "smaller T")])
def test_settings_that_do_not_fit_are_refused(changed: dict[str, int], says: str) -> None:
    learner = Learner(dataclasses.replace(SMALL, **changed), 2, 3, 0)
    with pytest.raises(AffineQuantError, match=says):
        phase_of(learner, np.zeros((100, 3)), 0, {"d_stsp": lambda: 0.0})


TINY = Attractors(
    arms=("P2",), M=8, T=12, tau=4, batch=4, updates=6, check_every=2, steps=1500, bits=(8, 3), simplest_within=99.0
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("alrnn")
    return out, run_experiment("alrnn", EXPERIMENTS[0], TINY, (0,), "smoke", out)[0]


def test_an_experiment_measures_what_is_claimed(ran: tuple[Path, dict[str, Any]]) -> None:
    metrics, (fit_entry,) = ran[1]["metrics"], ran[1]["fit"]
    assert fit_entry["steps"] == 6 and ran[1]["series"]["P2/rank"][0] == [0, 2, 4, 6]
    bounds = BOUNDS["lorenz63"].claims("P2", 1500, source="")
    assert {claim.metric for claim in bounds} <= metrics.keys()
    values = {name: one["value"] for name, one in metrics.items()}
    assert values["P2/faithful"] == 0.0 and not all(claim.holds(values) for claim in bounds)
    assert values["P2/kept_update"] in (0, 2, 4, 6) and values["P2/d_stsp_last"] == ran[1]["series"]["P2/d_stsp"][1][-1]
    assert {f"P2/{what}@{part}{bits}" for what in ("d_stsp", "regions") for part in PARTS for bits in (8, 3)} <= set(
        values
    )
    keys = [one.key for one in EXPERIMENTS[0].figures(found(TINY, [ran[1]]))]
    assert len(keys) == len(set(keys)) >= 4


def test_training_that_was_cut_short_goes_on_to_the_same_bytes(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    seen = 0

    def dies(config: Attractors, seed: int, arm: str) -> Trial:
        trial = EXPERIMENTS[0].build(config, seed, arm)

        def batches(epoch: int) -> Iterator[Tensor]:
            nonlocal seen
            seen += 1
            if seen == 3:
                raise KeyboardInterrupt
            yield from trial.phase.batches(epoch)

        return dataclasses.replace(trial, phase=trial.phase._replace(batches=batches))

    with pytest.raises(KeyboardInterrupt):
        run_experiment("alrnn", dataclasses.replace(EXPERIMENTS[0], build=dies), TINY, (0,), "smoke", tmp_path)
    again = run_experiment("alrnn", EXPERIMENTS[0], TINY, (0,), "smoke", tmp_path)[0]
    kept = [folder / "seed-0/stages/P2/tensors.safetensors" for folder in (ran[0], tmp_path)]
    assert again["series"] == ran[1]["series"] and kept[0].read_bytes() == kept[1].read_bytes()


def test_what_keeps_to_all_bounds_is_faithful() -> None:
    bounds = Bounds(d_stsp=5.0, d_hellinger=0.2, regions=3, exponent=(0.6, 1.1))
    values = {"d_stsp@bins30,T1e5": 4.0, "d_hellinger@s20,T1e4": 0.1, "regions": 3, "apart": 0, "settled": 0}
    values["exponent"] = 0.9
    scores: Any = {name: ("lower", Score(value=float(one), stderr=None, n=1)) for name, one in values.items()}
    assert kept_to(scores, bounds, 100_000) == 1
    for name, wrong in (
        ("d_stsp@bins30,T1e5", 5.1),
        ("regions", 2.0),
        ("regions", 4.0),
        ("apart", 0.01),
        ("exponent", 1.2),
    ):
        assert kept_to(scores | {name: ("lower", Score(value=wrong, stderr=None, n=1))}, bounds, 100_000) == 0
    assert kept_to({name: one for name, one in scores.items() if name != "exponent"}, bounds, 100_000) == 0


@pytest.mark.parametrize("arm", ["2", "P", "Q2", "P-1"])
def test_arms_that_name_no_number_are_refused(arm: str) -> None:
    with pytest.raises(AffineQuantError) as caught:
        relus_of(arm)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_weights_are_rounded_on_the_grid_and_the_rest_is_left(bits: int) -> None:
    model = some_model(2)
    made = rounded_model(model, bits)
    assert all(len(np.unique(row)) <= 2**bits for row in made.W) and (made.W != model.W).any()
    step = (np.maximum(model.W.max(1), 0) - np.minimum(model.W.min(1), 0)) / (2**bits - 1)
    assert (np.abs(made.W - model.W) <= 0.51 * step[:, None]).all()
    assert made.A is model.A and made.h is model.h and made.L is model.L
    whole = rounded_model(model, bits, PARTS["wah"])
    assert whole.A.shape == whole.h.shape == (8,) and (whole.A != model.A).any() and (whole.h != model.h).any()


def test_a_run_that_diverges_is_measured_all_the_same() -> None:
    model = some_model(2, size=300.0)
    truth = np.random.default_rng(0).standard_normal((2000, 3))
    found = of_run(model, truth, 2000, 0.01)
    assert found["d_stsp@bins30,T2e3"][1].value > 8 and found["d_hellinger@s20,T2e3"][1].value == 1
    assert found["regions"][1].value == 0 and "exponent" not in found


def test_a_fixed_point_that_attracts_is_seen() -> None:
    found = of_run(some_model(2, size=1.0), np.random.default_rng(0).standard_normal((2000, 3)), 2000, 0.1)
    seen = {name: score.value for name, (_, score) in found.items()}
    assert (seen["regions"], seen["settled"], seen["apart"]) == (1, 1, 0) and seen["exponent"] < 0


def test_units_that_switch_together_are_seen() -> None:
    W = np.zeros((4, 4))
    W[2:, 1] = 1.0  # both ReLU units follow one that changes its sign at every step
    model = AlmostLinear(A=np.array([0.5, -1.0, 0, 0]), W=W, h=np.zeros(4), L=np.array([[1.0], [0], [0]]), P=2)
    found = of_run(model, np.ones((2000, 1)) + np.random.default_rng(0).random((2000, 1)), 2000, 1.0)
    assert found["regions"][1].value == 2 and set(found["regions"][1].about) == {"0", "3"}
    assert found["apart"][1].value == 1
    assert found["changes"][1].value == 2 and found["changes"][1].about == {
        "00 to 11": pytest.approx(0.5, abs=1e-3),
        "11 to 00": pytest.approx(0.5, abs=1e-3),
    }


def test_more_than_ten_dimensions_are_compared_by_mixtures() -> None:
    config = dataclasses.replace(TINY, system="lorenz96", M=24, steps=600, bits=(8,))
    trial = EXPERIMENTS[2].build(config, 0, "P4")
    before = trial.phase.probes["d_stsp"]()
    assert np.isfinite(before) and before > 0
    names = [name for part in trial.suite.metrics for name in part(trial.subject)]
    assert "d_stsp@gmm1,T600" in names and "faithful" not in names
