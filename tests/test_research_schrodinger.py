"""Schroedinger bridges: regressors, half-bridges against closed forms, the refinement, its refusals, and that it resumes."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from affinequant_research.experiment import Experiment
from affinequant_research.running import found, run_experiment
from affinequant_research.schrodinger import METHOD, refine, regression
from affinequant_research.schrodinger.bridge import (
    Bridges,
    Drift,
    Intervals,
    bridge,
    drawn,
    refuse_stalled,
    regress,
    simulate,
    stalled,
)
from affinequant_research.schrodinger.likelihood import increments, least_squares, maximise, path_kl
from affinequant_research.schrodinger.references import FAMILIES, Family, Velocity, gradient_field, numbers, still
from affinequant_research.schrodinger.refine import Settings, passes
from affinequant_research.schrodinger.regression import How
from affinequant_research.schrodinger.scoring import chained
from affinequant_research.schrodinger.systems import SYSTEMS
from torch import Tensor

from affinequant.errors import QUALITY, AffineQuantError

ECOLOGY = METHOD.experiments[0]
SMOKE: Settings = ECOLOGY.presets["smoke"]
S0 = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
S1 = torch.tensor([[0.4, -0.1], [-0.1, 0.8]], dtype=torch.float64)
M0, M1 = torch.tensor([-1.0, 0.5], dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.mT


def gaussian(mean: Tensor, covariance: Tensor, n: int, seed: int) -> Tensor:
    """Samples that have exactly this mean and covariance."""
    white = torch.randn(n, len(mean), generator=generator(seed), dtype=torch.float64)
    white = (white - white.mean(0)) @ torch.linalg.inv(root(white.T.cov(correction=0)))
    return mean + white @ root(covariance)


def made(
    reference: Velocity = still,
    *,
    times: tuple[float, float] = (0.0, 1.0),
    dt: float = 0.01,
    sweeps: int = 4,
    particles: int = 4000,
    sigma: float = 1.0,
    how: str = "affine",
    centred: bool = True,
) -> Bridges:
    """The bridge between both Gaussians."""
    return bridge(
        Intervals.between(times, dt, sigma),
        [gaussian(M0, S0, 4000, 1), gaussian(M1, S1, 4000, 2)],
        reference,
        How(name=how, ridge=1e-6, sigma=sigma, generator=generator()),
        sweeps=sweeps,
        particles=particles,
        centred=centred,
        generator=generator(),
    )


def cross(paths: Tensor) -> Tensor:
    """Covariance of both ends of the first interval's paths."""
    one, other = paths[0, 0], paths[-1, 0]
    return (one - one.mean(0)).T @ (other - other.mean(0)) / len(one)


def exact_cross(shrink: float, noise: float) -> Tensor:
    """Cross-covariance of the bridge between both Gaussians over a kernel N(shrink x, noise I)."""
    r = root(S0 * shrink**2)
    d = root(4 * r @ S1 @ r + noise**2 * torch.eye(2, dtype=torch.float64))
    return (r @ d @ torch.linalg.inv(r) - noise * torch.eye(2, dtype=torch.float64)) / 2 / shrink


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def test_a_brownian_bridge_between_gaussians_is_the_closed_form() -> None:
    found = made()
    assert error(cross(found.ahead), exact_cross(1.0, 1.0)) <= 0.10
    assert error(cross(found.back), exact_cross(1.0, 1.0)) <= 0.10
    assert float((found.ahead[-1, 0].mean(0) - M1).norm()) <= 0.05
    assert float((found.back[0, 0].mean(0) - M0).norm()) <= 0.05


@pytest.mark.parametrize("centred", [True, False])
def test_a_reference_that_changes_in_time_is_met_at_the_right_times(centred: bool) -> None:
    """dX = -a(t) X dt + dW with a that grows: the wrong way round, or from the wrong time on, it is another kernel."""

    def a(t: Tensor) -> Tensor:
        return 3 * (t - 2).square()

    found = made(lambda x, t: -a(t) * x, times=(2.0, 3.0), centred=centred)
    fine = torch.linspace(2, 3, 2001, dtype=torch.float64)
    later = torch.cumulative_trapezoid(a(fine), fine)[-1] - torch.cat(
        [torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(a(fine), fine)]
    )
    shrink, noise = float((-later[0]).exp()), float(torch.trapezoid((-2 * later).exp(), fine))
    true, flipped = exact_cross(shrink, noise), exact_cross(shrink, 1 - noise)
    assert error(cross(found.ahead), true) <= 0.10 < error(flipped, true)
    assert float((found.ahead[-1, 0].mean(0) - M1).norm()) <= 0.05


def test_more_sweeps_meet_the_marginal_better() -> None:
    off = [float((made(dt=0.05, sweeps=n, sigma=0.5).ahead[-1, 0].mean(0) - M1).norm()) for n in (1, 3, 8)]
    assert off[0] > 2 * off[1] > 4 * off[2]


def test_intervals_of_other_lengths_are_one_batch() -> None:
    found = Intervals.between((0.0, 1.0, 3.0), 0.1, 0.2)
    assert found.steps == 20 and torch.allclose(found.dt.flatten(), torch.tensor([0.05, 0.1], dtype=torch.float64))
    assert found.time(20).flatten().tolist() == pytest.approx([1, 3])
    assert Intervals.between((0.0, 1.5, 3.0), 0.01, 0.1).steps == 150


def test_a_path_is_in_physical_time_whichever_way_it_was_simulated() -> None:
    intervals = Intervals.between((0.0, 1.0), 0.01, 1e-6)
    start = torch.ones(1, 3, 2, dtype=torch.float64)

    def growing(x: Tensor, t: Tensor) -> Tensor:
        return 2 * t.expand_as(x)

    ahead = simulate(Drift(intervals=intervals, sign=1, base=growing), start, generator())
    back = simulate(Drift(intervals=intervals, sign=-1, base=growing), start, generator())
    assert float(ahead[0, 0, 0, 0]) == 1 and float(ahead[-1, 0, 0, 0]) == pytest.approx(2, abs=0.02)
    assert float(back[-1, 0, 0, 0]) == 1 and float(back[0, 0, 0, 0]) == pytest.approx(0, abs=0.02)
    for sign in (1, -1):
        drift = regress(ahead, intervals, sign, growing, How())
        assert float(drift(50, ahead[50])[0, 0, 0]) == pytest.approx(sign * 1.0, abs=0.05)


def curved(x: Tensor) -> Tensor:
    return torch.stack([x[..., 1].square(), torch.sin(2 * x[..., 0])], dim=-1)


@pytest.mark.parametrize("name", ["bent", "mlp", "gp"])
def test_what_is_no_affine_map_is_learnt_on_top_of_one(name: str) -> None:
    drawn = torch.randn(3, 2, 300, 2, generator=generator(), dtype=torch.float64)
    times = torch.arange(3, dtype=torch.float64).expand(2, 3)
    seen = curved(drawn) + 0.1 * torch.randn(drawn.shape, generator=generator(1), dtype=torch.float64)
    how = How(name=name, ridge=1e-3, sigma=0.1, generator=generator())
    straight, found = (regression.REGRESSORS[one](drawn, seen, times, how) for one in ("affine", name))
    fresh = torch.randn(2, 200, 2, generator=generator(2), dtype=torch.float64)
    errors = [float((one.at(1, fresh) - curved(fresh)).square().mean()) for one in (straight, found)]
    assert errors[1] < errors[0] / 3
    alone = found.only(1).at(1, fresh[1:])
    assert torch.allclose(alone[0], found.at(1, fresh)[1])


def test_far_from_particles_bumps_leave_the_affine_and_a_process_nothing() -> None:
    drawn = torch.randn(2, 1, 200, 2, generator=generator(), dtype=torch.float64)
    times = torch.zeros(1, 2, dtype=torch.float64)
    far = torch.full((1, 1, 2), 60.0, dtype=torch.float64)
    fits = {one: regression.REGRESSORS[one](drawn, curved(drawn), times, How()) for one in ("affine", "bent", "gp")}
    assert torch.allclose(fits["bent"].at(0, far), fits["affine"].at(0, far))
    assert float(fits["affine"].at(0, far).abs().max()) > 1 > 1e-6 > float(fits["gp"].at(0, far).abs().max())


def test_the_gaussian_process_is_scikit_learns() -> None:
    process = pytest.importorskip("sklearn.gaussian_process")
    drawn = torch.randn(4, 1, 30, 2, generator=generator(), dtype=torch.float64)
    times = torch.tensor([[0.0, 0.1, 0.2, 0.3]], dtype=torch.float64)
    found = regression.process(drawn, curved(drawn), times, 0.5)
    kernel = process.kernels.Matern(length_scale=1.0, nu=0.5)
    other = process.GaussianProcessRegressor(kernel=kernel, alpha=0.5**2 + regression.JITTER, optimizer=None)
    points = torch.cat([drawn[:, 0], times[0, :, None, None].expand(4, 30, 1)], dim=-1).flatten(0, 1)
    other.fit(points.numpy(), curved(drawn)[:, 0].flatten(0, 1).numpy())
    asked = torch.cat([drawn[0, 0] + 0.1, torch.full((30, 1), 0.2, dtype=torch.float64)], dim=-1)
    assert torch.allclose(found.at(2, drawn[0] + 0.1)[0], torch.from_numpy(other.predict(asked.numpy())))


def test_a_process_of_too_many_points_is_refused() -> None:
    drawn = torch.zeros(90, 1, 100, 2, dtype=torch.float64)
    with pytest.raises(AffineQuantError, match="9000 points"):
        regression.process(drawn, drawn, torch.zeros(1, 90, dtype=torch.float64), 0.1)


def test_an_affine_map_is_found_and_a_ridge_draws_its_slope_to_nothing() -> None:
    drawn = torch.randn(2, 3, 50, 2, generator=generator(), dtype=torch.float64) + 4
    slope, shift = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64), torch.tensor([3.0, -2.0])
    found = regression.affine(drawn, drawn @ slope + shift, 1e-9)
    assert torch.allclose(found.slope[1, 2], slope) and torch.allclose(found.shift[1, 2, 0], shift.double())
    flat = regression.affine(drawn, drawn @ slope + shift, 1e9)
    assert torch.allclose(flat.at(0, drawn[0]), (drawn[0] @ slope + shift).mean(1, keepdim=True).expand(3, 50, 2))


def test_a_gradient_field_is_the_gradient_of_its_potential() -> None:
    family = gradient_field("field", 3, 8, 5, seed=1)
    x = torch.randn(4, 3, generator=generator(), dtype=torch.float64, requires_grad=True)
    theta, inside = family.start, x
    for layer in range(2):
        inside = torch.nn.functional.softplus(inside @ theta[f"weight.{layer}"] + theta[f"bias.{layer}"])
    (slope,) = torch.autograd.grad((inside @ theta["out"]).sum(), x)
    assert torch.allclose(family.drift(x, torch.zeros(()), theta), -slope)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_moves_the_states_of_its_system(name: str) -> None:
    family, of = FAMILIES[name], SYSTEMS[name]
    x = of.snapshots(0, "data", particles=5, step=0.1).samples[1]
    assert family.at(family.start)(x, torch.zeros(())).shape == x.shape
    known = numbers(**of.true)
    if set(known) == set(family.start):
        assert torch.allclose(family.at(known)(x, torch.zeros(())), of.law(x, of.true))


@pytest.mark.parametrize("name", ["lotka-volterra", "springs"])
def test_true_paths_give_theta_back(name: str) -> None:
    family, of = FAMILIES[name], SYSTEMS[name]
    intervals = Intervals.between(of.times[::2], 0.02, of.sigma)
    starts = torch.stack(of.snapshots(0, "data", particles=500, step=0.05).samples[:-1:2])
    truth = numbers(**of.true)
    seen = increments(
        intervals, simulate(Drift(intervals=intervals, sign=1, base=family.at(truth)), starts, generator())
    )
    exact = least_squares(family, seen)
    climbed = maximise(family, family.start, seen.some(8000, generator()), updates=300, rate=0.05)
    for key, value in of.true.items():
        assert float(exact.theta[key]) == pytest.approx(value, rel=0.01, abs=0.003)
        assert float(climbed.theta[key]) == pytest.approx(value, rel=0.05, abs=0.01)


def test_least_squares_is_the_least_of_what_adam_climbs() -> None:
    family = FAMILIES["lotka-volterra"]
    seen = increments(
        Intervals.between((0.0, 1.0), 0.1, 0.1), torch.rand(11, 1, 40, 2, generator=generator()).double() + 2
    )
    exact, climbed = (
        least_squares(dataclasses.replace(family, positive=frozenset()), seen),
        maximise(dataclasses.replace(family, positive=frozenset()), family.start, seen, updates=600, rate=0.1),
    )
    assert exact.loss <= climbed.loss + 1e-12
    assert climbed.loss == pytest.approx(exact.loss, rel=1e-3)


def rotation() -> Family:
    """Turning and shrinking: linear in both numbers."""
    turned = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    return Family(
        name="rotation",
        start=numbers(turn=0.0, shrink=0.0),
        drift=lambda x, t, theta: theta["turn"] * (x @ turned) - theta["shrink"] * x,
        linear=True,
    )


def test_refinement_lowers_the_divergence_and_finds_the_truth() -> None:
    family, sigma = rotation(), 0.5
    truth = numbers(turn=1.0, shrink=0.3)
    intervals = Intervals.between((0.0, 1.0, 2.0, 3.0), 0.1, sigma)
    cloud, clouds = gaussian(3 * M0, S0 / 4, 1500, 3), list[Tensor]()
    one = Drift(intervals=intervals.only(0), sign=1, base=family.at(truth))
    for _ in range(4):
        clouds.append(cloud)
        cloud = simulate(one, cloud[None], generator(len(clouds)))[-1, 0]
    reference, kls = still, []
    for _ in range(5):  # by the same random numbers: what changes is the reference
        found = bridge(intervals, clouds, reference, How(ridge=1e-6), sweeps=5, particles=1500, generator=generator())
        theta = least_squares(family, increments(intervals, found.ahead, found.back)).theta
        kls += [float(path_kl(found, one).sum()) for one in (reference, family.at(theta))]
        reference = family.at(theta)
    for before, after in pairwise(kls):
        assert after <= before * 1.01 + 0.01
    assert kls[-1] < 0.05 * kls[0]
    assert float(theta["turn"]) == pytest.approx(1.0, rel=0.05) and float(theta["shrink"]) == pytest.approx(
        0.3, rel=0.15
    )


def far(how: str) -> Bridges:
    """Marginals 24 standard deviations of the noise apart, the second interval; those of the first are the same."""
    near = [
        gaussian(at * torch.ones(2, dtype=torch.float64), 0.01 * S0, 60, seed)
        for seed, at in enumerate((0.0, 0.2, 2.6))
    ]
    how_ = How(name=how, sigma=0.1, generator=generator())
    return bridge(
        Intervals.between((0.0, 1.0, 2.0), 0.1, 0.1), near, still, how_, sweeps=3, particles=60, generator=generator()
    )


def test_bridges_that_stall_are_not_refined_on() -> None:
    """A process without a mean says nothing when it carries no particle over: the ends do."""
    moved, stayed = far("affine"), far("gp")
    assert stalled(moved, 0.75) == []
    refuse_stalled(moved, 0.75, "here")
    assert stalled(stayed, 0.75) == [1]
    with pytest.raises(AffineQuantError, match=r"1 to 2: forward") as caught:
        refuse_stalled(stayed, 0.75, "here")
    assert caught.value.exit_code == QUALITY and "regressor=affine" in caught.value.fix


def test_particles_that_leave_all_bounds_are_told_of() -> None:
    with pytest.raises(AffineQuantError, match="forward drift leave all bounds") as caught:
        made(lambda x, t: 50 * x**3, dt=0.1, particles=50)
    assert caught.value.where == "0 to 1" and caught.value.exit_code == QUALITY


def test_an_end_that_is_no_number_is_stalled() -> None:
    moved = far("affine")
    assert stalled(dataclasses.replace(moved, ends=moved.ends._replace(forward=(math.inf, math.nan))), 0.75) == [0, 1]


def test_particles_that_are_drawn_are_each_sample_as_often() -> None:
    samples = torch.arange(5.0)[:, None]
    found = drawn(samples, 12, generator())
    assert len(found) == 12 and {int((found == one).sum()) for one in range(5)} == {2, 3}


def test_chains_start_at_every_snapshot_and_go_both_ways() -> None:
    intervals = Intervals.between((0.0, 1.0, 2.0, 3.0), 0.1, 0.5)
    marginals = [gaussian(torch.full((2,), float(at), dtype=torch.float64), 0.1 * S0, 200, at) for at in range(4)]
    one = bridge(intervals, marginals, still, How(sigma=0.5), sweeps=5, particles=200, generator=generator())
    at = chained(one, marginals, 50, generator())
    for when in (0.5, 1.5, 2.5):  # forward from all earlier snapshots, backward from all later ones
        assert [len(way) for way in at(when)] == [50 * math.ceil(when), 50 * (4 - math.ceil(when))]
        particles = torch.cat(at(when))
        assert torch.allclose(particles.mean(0), torch.full((2,), when, dtype=torch.float64), atol=0.15)


def run(tmp_path: Path, config: Settings, experiment: Experiment = ECOLOGY) -> dict[str, object]:
    return run_experiment("schrodinger", experiment, config, (0,), "smoke", tmp_path)[0]


def test_an_experiment_measures_oracle_vanilla_and_refined(tmp_path: Path) -> None:
    result = run(tmp_path, SMOKE)
    scores = {name: one["value"] for name, one in result["metrics"].items()}
    assert scores["oracle/w2"] < scores["refined/w2"] < scores["vanilla/w2"]
    for name in ("w2@t1", "w2_chained", "end_forward", "end_mean", "kl", "kl_fitted", "theta.alpha", "theta_error"):
        assert math.isfinite(scores[f"refined/{name}"])
    assert result["series"]["refined/alpha"] == [[1, 2], [scores[f"{one}/theta.alpha"] for one in passes(SMOKE)]]
    figures = ECOLOGY.figures(found(SMOKE, [result]))
    assert [one.kind for one in figures] == ["scatter", "line", "line"]


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMOKE, passes=3)
    whole = run(tmp_path / "whole", config)
    measured = refine.measured
    left = [2]

    def dies(*arguments: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(refine, "measured", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", config)
    monkeypatch.undo()
    assert not (tmp_path / "cut/seed-0/stages/pass.02").exists()
    again = run(tmp_path / "cut", config)
    assert again["metrics"] == whole["metrics"] and again["series"] == whole["series"]
    carried = [(tmp_path / one / "seed-0/stages/refined/carry.safetensors").read_bytes() for one in ("whole", "cut")]
    assert carried[0] == carried[1]


def test_snapshots_of_a_file_stand_in_for_a_system(tmp_path: Path) -> None:
    seen = SYSTEMS["lotka-volterra"].snapshots(3, "elsewhere", particles=20)
    rows = [f"{time},{x},{y}" for time, one in zip(seen.times, seen.samples, strict=True) for x, y in one.tolist()]
    (tmp_path / "seen.csv").write_text("\n".join(["time,prey,hunters", *rows]) + "\n")
    result = run(tmp_path / "run", dataclasses.replace(SMOKE, passes=1, data=str(tmp_path / "seen.csv")))
    assert "vanilla/w2" in result["metrics"] and not any(name.startswith("oracle/") for name in result["metrics"])
    assert "vanilla/theta_error" not in result["metrics"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"system": "lotka"}, "lotka-volterra"),
        ({"regressor": "afine"}, "affine"),
        ({"estimator": "sgd"}, "adam"),
        ({"passes": 0}, "positive"),
        ({"relax": 2.0}, "relax"),
        ({"system": "repressilator", "estimator": "least-squares"}, "not linear"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, object], says: str) -> None:
    with pytest.raises(AffineQuantError, match=says) as caught:
        refine.stages(dataclasses.replace(SMOKE, **changed))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("one", METHOD.experiments, ids=lambda one: one.name)
def test_every_preset_can_be(one: Experiment) -> None:
    for preset, config in one.presets.items():
        names = [stage.name for stage in one.stages(config)]
        known = {claim.metric.split("/")[0] for claim in one.claims.get(preset, ())}
        assert names[0] == "oracle" and known <= set(names)
