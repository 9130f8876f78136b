"""Snapshots: systems against what is known of them, distances against closed forms, files, figures."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from affinequant_evals import Score
from affinequant_research.experiment import Experiment, Found
from affinequant_research.running import found, run_experiment
from affinequant_research.schrodinger import drawing, genes, springs, vortex
from affinequant_research.schrodinger.loading import load_snapshots
from affinequant_research.schrodinger.measures import apart, mmd_rbf, oracle, w1, w2
from affinequant_research.schrodinger.systems import SYSTEMS, Snapshots, System, system
from torch import Tensor

from affinequant.errors import AffineQuantError
from affinequant.report.figure import Figure

LINE = System(
    name="line",
    about="a law that can be solved",
    law=lambda x, p: -p["rate"] * x,
    true={"rate": 0.5},
    low=(2.0,),
    high=(2.0,),
    times=(0.0, 1.0, 2.0),
    particles=4000,
    sigma=0.4,
    axes=("x",),
)


def gaussian(n: int, *mean: float, seed: int = 0) -> Tensor:
    drawn = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn + torch.tensor(mean, dtype=torch.float64)


def seen(*counts: int, d: int = 2, sigma: float = 0.1) -> Snapshots:
    samples = tuple(gaussian(n, *[float(at)] * d, seed=at) for at, n in enumerate(counts))
    return Snapshots(times=tuple(map(float, range(len(counts)))), samples=samples, sigma=sigma)


def test_an_ornstein_uhlenbeck_process_has_its_mean_and_variance() -> None:
    made = LINE.snapshots(0, "data", step=0.01)
    for time, one in zip(made.times[1:], made.samples[1:], strict=True):
        variance = 0.4**2 * (1 - math.exp(-time))
        error = math.sqrt(variance / len(one))
        assert float(one.mean()) == pytest.approx(2 * math.exp(-time / 2), abs=4 * error + 0.005)
        assert float(one.var()) == pytest.approx(variance, rel=0.1)


def test_a_seed_and_a_purpose_make_particles_and_no_other_does() -> None:
    first, again = (LINE.snapshots(1, "data", particles=3, step=0.1) for _ in range(2))
    other = [LINE.snapshots(2, "data", particles=3, step=0.1), LINE.snapshots(1, "oracle", particles=3, step=0.1)]
    assert all(torch.equal(a, b) for a, b in zip(first.samples, again.samples, strict=True))
    assert not any(torch.equal(first.samples[1], one.samples[1]) for one in other)
    assert not torch.equal(first.samples[1], first.samples[2])


def test_particles_of_different_times_are_not_the_same_ones() -> None:
    still = System(
        name="still", about="", law=lambda x, p: 0 * x, low=(0.0,), high=(1.0,), times=(0.0, 1e-9), particles=5,
        sigma=1e-9, axes=("x",),
    )  # fmt: skip
    start, end = still.snapshots(0, "data").samples
    assert float((start - end).abs().min()) > 1e-6


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_seen_as_often_as_it_says(name: str) -> None:
    one = system(name)
    made = one.snapshots(0, "data", particles=4, step=0.05)
    assert made.times == one.times and made.dims == len(one.low) == len(one.high) == len(one.axes)
    assert [len(sample) for sample in made.samples] == [4] * len(one.times)


def test_systems_at_rest_stay_there() -> None:
    """Where the drift of each is known to be nothing."""
    one = torch.float64
    prey = system("lotka-volterra")
    rest = torch.tensor([[prey.true["gamma"] / prey.true["delta"], prey.true["alpha"] / prey.true["beta"]]], dtype=one)
    assert float(prey.law(rest, prey.true).abs().max()) < 1e-12
    ring, x = system("repressilator"), 1.697  # x (1 + x^3) = 10
    assert float(ring.law(torch.full((1, 3), x, dtype=one), ring.true).abs().max()) < 0.02
    swirl = system("vortex")
    centre = torch.tensor([[swirl.true["x0"], swirl.true["y0"]]], dtype=one)
    assert float(swirl.law(centre, swirl.true).abs().max()) < 1e-12


def test_the_repressilator_is_repressed_by_the_gene_before() -> None:
    ring = system("repressilator")
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    expected = [10 / (1 + 27) - 1, 10 / (1 + 1) - 2, 10 / (1 + 8) - 3]
    assert ring.law(x, ring.true)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_vortex_turns_with_the_speed_of_lamb_and_oseen_and_without_divergence() -> None:
    swirl = system("vortex")
    x = gaussian(20, 0.0, 0.0).requires_grad_()
    out = x.detach() - torch.tensor([swirl.true["x0"], swirl.true["y0"]], dtype=x.dtype)
    moved, r = swirl.law(x, swirl.true), out.norm(dim=-1)
    drift = moved.detach()
    speed = 6 / (2 * math.pi * r) * (1 - torch.exp(-((r / swirl.true["core"]) ** 2)))
    assert torch.allclose(drift.norm(dim=-1), speed, rtol=1e-6)
    assert float((drift * out).sum(-1).abs().max()) < 1e-9
    assert bool((out[:, 0] * drift[:, 1] - out[:, 1] * drift[:, 0] < 0).all())  # with the clock
    parts = [torch.autograd.grad(moved[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)]
    assert float((parts[0] + parts[1]).abs().max()) < 1e-6


def test_springs_lose_energy_by_drag_alone() -> None:
    one, x = system("springs"), gaussian(30, 0.0, 0.0, 0.0, 0.0).requires_grad_()
    place, speed = x.chunk(2, -1)
    stretch = place[:, 1] - place[:, 0]
    energy = speed.square().sum(-1) + one.true["wall"] * place[:, 0].square() + one.true["link"] * stretch.square()
    (slope,) = torch.autograd.grad(energy.sum() / 2, x)
    lost = (slope * one.law(x, one.true)).sum(-1)
    assert torch.allclose(lost, -one.true["drag"] * speed.square().sum(-1), atol=1e-12)


def test_genes_follow_a_gradient_and_part() -> None:
    one = system("genes")
    x = gaussian(1, *[0.5] * 5)
    jacobian = torch.autograd.functional.jacobian(lambda at: one.law(at, one.true)[0], x)[:, 0]
    assert torch.allclose(jacobian, jacobian.T, atol=1e-12)  # pyright: ignore[reportAttributeAccessIssue]
    last = one.snapshots(0, "data", times=(0.0, 4.0), step=0.02).samples[1][:, 1]
    assert 0.2 < float((last > 0).double().mean()) < 0.8 and float((last.abs() < 0.3).double().mean()) < 0.15


@pytest.mark.parametrize("distance", [w1, w2])
def test_a_shifted_sample_is_as_far_as_the_shift(distance: Callable[[Tensor, Tensor], float]) -> None:
    one = gaussian(40, 0.0, 0.0, 0.0)
    shift = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
    assert distance(one, one + shift) == pytest.approx(1.3, rel=1e-9)
    assert distance(one, one[torch.randperm(40)]) == pytest.approx(0, abs=1e-7)


def test_wasserstein_distances_on_a_line_are_those_of_sorted_samples() -> None:
    a, b = gaussian(60, 0.0), 2 * gaussian(60, 0.5, seed=1)
    gaps = a.sort(0).values - b.sort(0).values
    assert w1(a, b) == pytest.approx(float(gaps.abs().mean()), rel=1e-9)
    assert w2(a, b) == pytest.approx(float(gaps.square().mean().sqrt()), rel=1e-9)


def test_samples_of_different_sizes_are_compared_as_measures() -> None:
    a = gaussian(7, 0.0, 1.0)
    assert w2(a, torch.cat([a, a])) == pytest.approx(0, abs=1e-7)
    assert mmd_rbf(a, torch.cat([a, a])) == pytest.approx(0, abs=1e-7)
    assert w2(torch.zeros(1, 1), torch.tensor([[0.0], [3.0], [6.0]])) == pytest.approx(math.sqrt(15))


def test_w2_of_gaussians_is_near_its_closed_form() -> None:
    a, b = gaussian(1500, 0.0, 0.0), gaussian(1500, 2.0, 0.0, seed=1) * torch.tensor([1.0, 2.0])
    assert w2(a, b) == pytest.approx(math.sqrt(2**2 + (2 - 1) ** 2), rel=0.05)


def test_mmd_of_gaussians_is_near_its_closed_form() -> None:
    a, b, h = gaussian(600, 0.0), gaussian(600, 1.0, seed=1), 1.5
    expected = 2 * h / math.sqrt(h**2 + 2) * (1 - math.exp(-1 / (2 * (h**2 + 2))))
    assert mmd_rbf(a, b, h) ** 2 == pytest.approx(expected, rel=0.2)
    assert mmd_rbf(a, b) > 5 * mmd_rbf(a, gaussian(600, 0.0, seed=2))


def test_distances_by_time_and_their_mean() -> None:
    held = seen(5, 6)
    shifted = [one + torch.tensor([at, 0.0]) for at, one in zip((0.5, 1.5), held.samples, strict=True)]
    scores = {name: score.value for name, score in apart(shifted, held, ("w2",)).items()}
    assert scores == pytest.approx({"w2": 1.0, "w2@t0": 0.5, "w2@t1": 1.5})


def test_the_oracle_is_at_the_floor_of_sampling() -> None:
    held = LINE.snapshots(0, "data", particles=200, step=0.05).split()[1]
    floor = oracle(LINE, held, 0, names=("w2",))["w2@t1"].value
    assert 0 < floor < 0.1


@pytest.mark.parametrize(
    "a, b",
    [(torch.zeros(0, 2), torch.zeros(3, 2)), (torch.zeros(2, 2), torch.zeros(2, 3)),
     (torch.zeros(2), torch.zeros(2, 1)), (torch.tensor([[math.nan]]), torch.zeros(2, 1))],
)  # fmt: skip
@pytest.mark.parametrize("distance", [w1, w2, mmd_rbf])
def test_what_has_no_distance_is_refused(distance: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor) -> None:
    with pytest.raises(AffineQuantError):
        distance(a, b)


def test_every_second_time_is_held_out_or_those_that_are_named() -> None:
    one = seen(2, 3, 4, 5, 6)
    train, held = one.split()
    assert (train.times, held.times) == ((0.0, 2.0, 4.0), (1.0, 3.0)) and len(held.samples[1]) == 5
    assert one.split((2.0,))[1].times == (2.0,)
    assert seen(2, 2, 2, 2).split()[0].times == (0.0, 2.0, 3.0)
    for wrong in ((0.0,), (4.0,), (1.5,)):
        with pytest.raises(AffineQuantError, match="cannot be held out"):
            one.split(wrong)
    with pytest.raises(AffineQuantError, match="leave none"):
        seen(2, 2).split()


def test_what_are_no_snapshots_is_refused() -> None:
    good = gaussian(3, 0.0)
    for times, samples, sigma in (
        ((0.0,), (good, good), 0.1), ((), (), 0.1), ((1.0, 1.0), (good, good), 0.1), ((0.0, math.nan), (good, good), 0.1),
        ((0.0,), (good.float(),), 0.1), ((0.0,), (good[0],), 0.1), ((0.0, 1.0), (good, gaussian(3, 0.0, 0.0)), 0.1),
        ((0.0,), (good / 0,), 0.1), ((0.0,), (good,), 0.0), ((0.0,), (good[:0],), 0.1),
    ):  # fmt: skip
        with pytest.raises(AffineQuantError):
            Snapshots(times=times, samples=samples, sigma=sigma)


def test_a_system_is_not_seen_before_it_begins_and_is_known_by_name() -> None:
    with pytest.raises(AffineQuantError, match="begins at 0"):
        LINE.snapshots(0, "data", times=(-1.0, 2.0))
    with pytest.raises(AffineQuantError, match="repressilator"):
        system("represilator")


def test_snapshots_come_back_from_both_kinds_of_file(tmp_path: Path) -> None:
    one = seen(4, 2, 3)
    arrays = {f"samples_{index}": sample.numpy() for index, sample in enumerate(one.samples)}
    np.savez(tmp_path / "data.npz", times=np.array(one.times), **arrays)  # pyright: ignore[reportArgumentType]
    lines = [
        f"{x!r},{time:g},{y!r}" for time, sample in zip(one.times, one.samples, strict=True) for x, y in sample.tolist()
    ]
    other = tmp_path / "other"
    other.mkdir()
    (other / "data.csv").write_text("\n".join(["x, time, y", *reversed(lines), ""]))
    for path in (tmp_path / "data.npz", tmp_path, other):
        back = load_snapshots(path, 0.2)
        assert back.times == one.times and back.sigma == 0.2
        for mine, theirs in zip(back.samples, one.samples, strict=True):
            assert torch.equal(mine.sort(0).values, theirs.sort(0).values)
    with pytest.raises(AffineQuantError, match="2 coordinates, and the family's have 5"):
        load_snapshots(other, 0.2, 5)


@pytest.mark.parametrize(
    "text, said",
    [("x,y\n1,2\n", "not `time`"), ("", "not `time`"), ("time,x\n", "no particles"), ("time,x\n0,1\n1,a\n", "line 3"),
     ("time,x\n0,1,2\n", "line 2"), ("time,x\n0,nan\n", "not finite")],
)  # fmt: skip
def test_a_table_that_holds_something_else_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "data.csv"
    file.write_text(text)
    with pytest.raises(AffineQuantError, match=said) as caught:
        load_snapshots(file, 0.1)
    assert str(file) in caught.value.where and caught.value.exit_code == 2


def test_arrays_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    file, one = tmp_path / "data.npz", np.zeros((2, 1))
    for arrays, said in (
        ({"samples_0": one}, "no `times`"),
        ({"times": np.arange(2.0), "samples_0": one}, "samples_1 is not"),
        ({"times": np.arange(1.0), "samples_0": one, "samples_1": one}, "samples_1 is of none"),
        ({"times": np.array(["a"]), "samples_0": one}, "else than numbers"),
        ({"times": np.zeros(1), "samples_0": np.array([{}])}, "cannot be read"),
    ):
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        with pytest.raises(AffineQuantError, match=said):
            load_snapshots(file, 0.1)
    file.write_bytes(b"not a zip")
    with pytest.raises(AffineQuantError, match="cannot be read"):
        load_snapshots(file, 0.1)
    with pytest.raises(AffineQuantError, match=r"no file \.npz or \.csv"):
        load_snapshots(tmp_path / "gone.npz", 0.1)


def looked_at(seeds: int) -> Found:
    """What runs would have found: two kinds of bridges at two held-out times, one parameter over three passes."""
    held = seen(70, 3, d=3)
    paths = gaussian(12 * 2 * 30, 0.0, 0.0, 0.0).view(12, 2, 30, 3)
    pictures = {"a/paths": drawing.lines(paths, (0, 2)), "a/held": drawing.cloud(held, (0, 2))}
    scores = [
        {
            f"{kind}/w2@t{time}": Score(value=value + seed, stderr=None, n=1)
            for kind in "ab"
            for time, value in ((1, 2.0), (3, 4.0))
        }
        for seed in range(seeds)
    ]
    series = ({"a/alpha": ([1, 2, 3], [0.5, 0.7, 0.9]), "b/w2": ([1], [0.1])},) * seeds
    return Found(
        config=None, seeds=tuple(range(seeds)), scores=tuple(scores), series=series, pictures=(pictures,) * seeds
    )


def test_paths_are_drawn_as_lines_that_do_not_touch() -> None:
    found = looked_at(1)
    figure = drawing.trajectories(
        found, "one", {"first": "a/paths", "second": "a/paths"}, "a/held", "a/held", ("x", "z")
    )
    assert Figure.from_json(figure.to_json()) == figure and list(figure.panels) == ["first", "second"]
    paths, trained, _ = figure.panels["first"]
    assert paths.joined and not trained.joined
    assert paths.x.count(None) == paths.y.count(None) == 2 * drawing.PATHS - 1
    assert len(trained.x) == drawing.PARTICLES + 3


def test_distances_are_drawn_with_the_spread_of_seeds() -> None:
    figure = drawing.distances(looked_at(3), "one", {"vanilla": "a", "refined": "b"}, (1.0, 3.0))
    first, _ = figure.series
    assert (first.x, first.y, first.low, first.high) == ((1.0, 3.0), (3.0, 5.0), (2.0, 4.0), (4.0, 6.0))
    assert not drawing.distances(looked_at(1), "one", {"vanilla": "a"}, (1.0, 3.0)).series[0].low
    assert drawing.distances(looked_at(1), "one", {"vanilla": "a"}, (1.0, 2.0)).series[0].y == (2.0, None)


def test_parameters_are_drawn_beside_their_true_values() -> None:
    figure = drawing.parameters(looked_at(2), "one", "a", {"alpha": 1.0, "beta": 2.0})
    assert [(one.name, one.panel) for one in figure.series] == [
        ("seed 0", "alpha"),
        ("seed 1", "alpha"),
        ("true", "alpha"),
    ]
    assert figure.series[2].x == (1, 3) and figure.series[2].y == (1.0, 1.0)


@pytest.mark.parametrize("one", [vortex.EXPERIMENT, genes.EXPERIMENT, springs.EXPERIMENT], ids=lambda one: one.name)
def test_stand_ins_for_measured_data_run_on_the_harness(tmp_path: Path, one: Experiment) -> None:
    config = one.presets["smoke"]
    (result,) = run_experiment("schrodinger", one, config, [0], "smoke", tmp_path)
    values = {name: score["value"] for name, score in result["metrics"].items()}
    assert 0 < values["oracle/w2"] < values["vanilla/w2"] and 0 < values["refined/w2"] < math.inf
    kinds = [figure.kind for figure in one.figures(found(config, [result]))]
    assert kinds == ["scatter", "line", "line"][: 3 if one.name != "genes" else 2]


def test_affine_maps_do_not_part_a_cloud_and_are_not_refined_on(tmp_path: Path) -> None:
    config = dataclasses.replace(genes.EXPERIMENT.presets["smoke"], transport=0.75)
    with pytest.raises(AffineQuantError, match=r"too far from their marginals .* 2 to 4") as caught:
        run_experiment("schrodinger", genes.EXPERIMENT, config, [0], "smoke", tmp_path)
    assert caught.value.exit_code == 4 and not (tmp_path / "seed-0/result.json").exists()


def test_particles_of_another_system_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("time,x\n0,1\n1,2\n2,3\n")
    config = dataclasses.replace(vortex.EXPERIMENT.presets["smoke"], data=str(file))
    with pytest.raises(AffineQuantError, match="1 coordinates, and the family's have 2"):
        run_experiment("schrodinger", vortex.EXPERIMENT, config, [0], "smoke", tmp_path / "run")
