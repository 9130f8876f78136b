"""What is measured and read off almost-linear RNNs: attractors, symbols, regions, exponents, on cases known by hand."""

import json
from itertools import product

import numpy as np
import pytest
from affinequant_research.alrnn.codes import (
    agreement,
    along,
    graph_of,
    minimal_graph,
    region_codes,
    share_distance,
    shares,
    topological_entropy,
    transitions,
    visited,
    written,
)
from affinequant_research.alrnn.drawing import drawn, pictures_of
from affinequant_research.alrnn.lyapunov import exponents, spectrum
from affinequant_research.alrnn.measures import (
    bin_divergence,
    mixture_divergence,
    n_step_error,
    of_attractor,
    short,
    spectra,
    spectrum_distance,
)
from affinequant_research.alrnn.model import AlmostLinear, new_model
from affinequant_research.alrnn.regions import (
    cycle_through,
    cycles_near,
    fixed_points,
    jacobian,
)
from affinequant_research.experiment import Found

from affinequant import AffineQuantError


def lorenz(steps: int, start: tuple[float, float, float]) -> np.ndarray:
    """A trajectory of Lorenz's system, [steps, 3], by Runge and Kutta's steps of .01, in units of about one deviation."""

    def flow(at: np.ndarray) -> np.ndarray:
        x, y, z = at
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    at, found = np.array(start), []
    for _ in range(steps):
        a = flow(at)
        b = flow(at + 0.005 * a)
        c = flow(at + 0.005 * b)
        at = at + 0.01 / 6 * (a + 2 * b + 2 * c + flow(at + 0.01 * c))
        found.append(at)
    return (np.array(found) - [0, 0, 23.5]) / [7.9, 9.0, 8.6]


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return lorenz(6000, (1.0, 1.0, 20.0))[500:]


@pytest.fixture(scope="module")
def again() -> np.ndarray:
    return lorenz(6000, (-3.0, 5.0, 20.0))[500:]


def test_the_divergence_of_states_is_the_sum_over_all_bins(truth: np.ndarray, again: np.ndarray) -> None:
    spread = 0.1 * truth.std(0, ddof=1)
    edges = [np.linspace(*ends, 13) for ends in zip(truth.min(0) - spread, truth.max(0) + spread, strict=True)]
    p, q = (np.histogramdd(one, edges)[0] + 1e-5 for one in (truth, again * 1.2))
    p, q = p / p.sum(), q / q.sum()
    assert bin_divergence(truth, again * 1.2, bins=12) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-9)


def test_the_truth_is_nothing_away_from_itself_and_little_from_another_of_its_trajectories(
    truth: np.ndarray, again: np.ndarray
) -> None:
    assert bin_divergence(truth, truth) == 0 and mixture_divergence(truth, truth) == pytest.approx(0, abs=1e-12)
    assert spectrum_distance(truth, truth) < 1e-6
    still = np.repeat(truth[:1], len(truth), 0)
    assert 0 < bin_divergence(truth, again, 12) < 4 < 12 < bin_divergence(truth, still, 12)
    assert 0 < mixture_divergence(truth, again) < 0.2 < 1 < mixture_divergence(truth, still)
    assert spectrum_distance(truth, again) < 0.12 and spectrum_distance(truth, still) == 1


def test_what_diverges_is_as_bad_as_can_be_and_never_nan(truth: np.ndarray) -> None:
    lost = np.where(np.arange(len(truth))[:, None] < 3000, truth, np.nan)
    elsewhere = bin_divergence(truth, truth + 100)
    assert bin_divergence(truth, lost) == elsewhere > bin_divergence(truth, np.repeat(truth[:1], len(truth), 0))
    assert np.isfinite(mixture_divergence(truth, lost)) and mixture_divergence(truth, lost) > 1
    assert spectrum_distance(truth, lost) == 1
    whole, cut = (of_attractor(truth, truth[:steps], steps=5000) for steps in (5000, 4999))
    assert whole.keys() == cut.keys() == {"d_stsp@bins30,T5e3", "d_hellinger@s20,T5e3"}
    assert cut["d_stsp@bins30,T5e3"][1].value > 10 > whole["d_stsp@bins30,T5e3"][1].value
    assert cut["d_hellinger@s20,T5e3"][1].value == 1


def test_many_dimensions_are_compared_by_mixtures(truth: np.ndarray) -> None:
    many = np.tile(truth, 4)
    found = of_attractor(many, many, steps=len(many), variance=0.3, smoothing=1.0)
    assert list(found) == ["d_stsp@gmm0.3,T5500", "d_hellinger@s1,T5500"]


def test_the_divergence_of_mixtures_as_narrow_as_one_gaussian_is_that_of_gaussians() -> None:
    cloud = 0.01 * np.random.default_rng(0).standard_normal((200, 12))
    found = mixture_divergence(cloud, cloud + 0.05, variance=0.01, samples=20_000)
    assert found == pytest.approx(12 * 0.05**2 / (2 * 0.01), rel=0.05)  # |shift|^2 / (2 variance)


def test_a_spectrum_has_its_peak_at_its_frequency_and_sums_to_one() -> None:
    time = np.arange(1000)
    waves = np.stack([np.sin(2 * np.pi * 50 * time / 1000), 7 + 3 * np.cos(2 * np.pi * 200 * time / 1000)], axis=1)
    found = spectra(waves, 2.0)
    assert found.shape == (501, 2) and list(found.argmax(0)) == [50, 200]
    assert found.sum(0) == pytest.approx([1, 1])
    assert spectrum_distance(waves, waves[:, ::-1], 2.0) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="other frequencies"):
        spectrum_distance(waves, waves[:500])


def test_the_error_ahead_is_that_of_the_last_step() -> None:
    series = 2.0 ** np.arange(8)[:, None]
    assert n_step_error(lambda at, steps: at * 2.0**steps, series, 3) == 0
    assert n_step_error(lambda at, steps: at, series, 1) == pytest.approx(np.mean(series[:-1] ** 2))


def test_numbers_of_steps_are_short_in_names() -> None:
    assert [short(n) for n in (100_000, 20_000, 1000, 250, 5500, 360)] == ["1e5", "2e4", "1e3", "250", "5500", "360"]


# Symbols. The regions of a Lorenz attractor in three maps: two lobes, between which the way leads through a third.


LOBES = np.array([1, 1, 3, 2, 2, 2, 3, 1, 3, 3, 2, 3, 1, 1])


def test_a_code_has_a_bit_for_each_unit_with_a_relu() -> None:
    latent = np.array([[9.0, -1, 2], [9, 3, -1], [9, 1, 1], [9, 0, -1]])
    assert list(region_codes(latent, 2)) == [2, 1, 3, 0] and list(region_codes(latent, 0)) == [0] * 4
    assert [written(code, 2) for code in (2, 1, 3, 0)] == ["01", "10", "11", "00"] and written(0, 0) == "-"
    assert region_codes(np.ones((1, 60)), 52)[0] == 2**52 - 1
    with pytest.raises(AffineQuantError, match="at most 52"):
        region_codes(np.ones((1, 60)), 53)


def test_three_regions_leave_open_what_they_must() -> None:
    counts = transitions(LOBES, visited(LOBES))
    assert counts.tolist() == [[2, 0, 2], [0, 2, 2], [2, 2, 1]]
    assert topological_entropy(counts) == pytest.approx(np.log(1 + np.sqrt(2)))
    assert topological_entropy(counts) == pytest.approx(0.881, abs=5e-4)
    assert topological_entropy(counts, loops=False) == pytest.approx(np.log(2) / 2)
    assert topological_entropy(np.array([[0, 1], [0, 0]])) == 0, "what never repeats"


def test_a_code_between_two_does_not_make_them_neighbours() -> None:
    codes = np.array([1] * 150 + [0] + [2] * 150)
    assert visited(codes, 0.01) == [1, 2] and visited(codes) == [0, 1, 2]
    assert transitions(codes, [1, 2]).tolist() == [[149, 0], [0, 149]]


def test_graphs_have_shares_and_the_minimal_one_what_lasts() -> None:
    codes = np.concatenate([[0] * 20, np.tile(LOBES, 40)])  # a start that is left for good
    graph = graph_of(codes, 2)
    assert graph.nodes["11"]["share"] == shares(codes)[3] and graph.has_edge("00", "10")
    assert sum(share for *_, share in graph.edges(data="share")) == pytest.approx(1)
    least = minimal_graph(codes, 2)
    assert sorted(least.edges) == [("01", "11"), ("10", "11"), ("11", "01"), ("11", "10")]


def test_runs_agree_up_to_the_names_of_their_symbols() -> None:
    renamed = np.array([0, 7, 5, 2])[LOBES]
    assert agreement(LOBES, renamed) == 1 and share_distance(shares(LOBES), shares(renamed)) == 0
    flipped = renamed.copy()
    flipped[:2] = 11
    assert agreement(LOBES, flipped) == pytest.approx(12 / 14)
    assert share_distance({0: 0.5, 1: 0.5}, {4: 0.8, 2: 0.1, 3: 0.1}) == pytest.approx(0.3)
    assert share_distance({0: 1.0}, {0: 0.25, 1: 0.25, 2: 0.5}) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one by one"):
        agreement(LOBES, LOBES[:3])


# A tent map x -> x / c, (1 - x) / (1 - c) as an AL-RNN: one ReLU unit at x - c. Everything of it is known.


CORNER = 0.4


def tent() -> AlmostLinear:
    rise, fold = 1 / CORNER, 1 / CORNER + 1 / (1 - CORNER)
    return AlmostLinear(
        A=np.zeros(2),
        W=np.array([[rise, -fold], [rise, -fold]]),
        h=np.array([0, -CORNER]),
        L=np.ones((1, 1)),
        P=1,
    )


def folded(x: float, steps: int) -> np.ndarray:
    """Latent states of the tent, by the map itself."""
    found = [x]
    for _ in range(steps - 1):
        found.append(found[-1] / CORNER if found[-1] < CORNER else (1 - found[-1]) / (1 - CORNER))
    return np.array([[x, x - CORNER] for x in found])


def test_a_tent_has_two_real_fixed_points_and_every_cycle_there_can_be() -> None:
    model, latent = tent(), folded(0.3141592, 4000)
    codes = region_codes(latent, 1)
    assert model.free_run(latent[0], 9) == pytest.approx(latent[:9], abs=1e-6)
    points = fixed_points(model, visited(codes))
    assert points[0].points[0] == pytest.approx([0, -CORNER]) and points[0].radius == pytest.approx(1 / CORNER)
    assert points[1].points[0, 0] == pytest.approx(1 / (2 - CORNER)) and points[1].radius == pytest.approx(1 / 0.6)
    assert points[0].real and points[1].real and not points[1].spirals
    every = (word for length in range(1, 6) for word in product((0, 1), repeat=length))
    words = [word for word in every if all(word < word[n:] + word[:n] for n in range(1, len(word)))]
    assert len(words) == 2 + 1 + 2 + 3 + 6, "cycles of a full shift"
    cycles = [cycle_through(model, word) for word in words]
    assert all(one is not None and one.real for one in cycles)
    two = cycle_through(model, [0, 1])
    assert two is not None and two.radius == pytest.approx(1 / (CORNER * 0.6))
    after = model.free_run(two.points[0], 3)
    assert after[1] == pytest.approx(two.points[1]) and after[2] == pytest.approx(two.points[0])
    assert two.told(1) == {"regions": ["0", "1"], "real": True, "radius": pytest.approx(1 / 0.24), "spirals": False}
    found = cycles_near(model, latent, 4)
    assert [one.codes for one in found if len(one.codes) == 2] in ([(0, 1)], [(1, 0)])
    assert len({one.codes for one in found}) == len(found) and all(one.real for one in found)


def test_what_lies_in_another_region_is_virtual_and_what_has_no_solution_is_not_there() -> None:
    model = tent()
    low = AlmostLinear(A=model.A, W=model.W, h=model.h + np.array([0, 1.0]), L=model.L, P=1)
    found = cycle_through(low, [0])
    assert found is not None and not found.real
    shift = AlmostLinear(A=np.ones(2), W=np.zeros((2, 2)), h=np.ones(2), L=np.ones((1, 1)), P=1)
    assert cycle_through(shift, [0]) is None and fixed_points(shift, [0, 1]) == {}


def test_a_region_s_derivative_is_that_of_a_step() -> None:
    model = new_model(6, 2, 3, np.random.default_rng(3))
    for state in np.random.default_rng(4).standard_normal((8, 6)):
        [code] = region_codes(state[None], 2)
        moved = [model.free_run(state + step, 2)[1] - model.free_run(state - step, 2)[1] for step in 1e-6 * np.eye(6)]
        assert jacobian(model, int(code)) == pytest.approx(np.array(moved).T / 2e-6, abs=1e-7)


def test_led_along_a_series_a_model_sees_it_every_few_steps() -> None:
    model, series = new_model(6, 2, 3, np.random.default_rng(3)), np.random.default_rng(4).standard_normal((20, 3))
    led = along(model, series, 4)
    assert led[0].tolist() == model.start(series[0]).tolist()
    for step in range(1, 20):
        seen = series[step - 1] if (step - 1) % 4 == 0 else led[step - 1, :3]
        assert led[step] == pytest.approx(model.free_run(np.concatenate([seen, led[step - 1, 3:]]), 2)[1])
    assert along(model, series, 100) == pytest.approx(model.free_run(model.start(series[0]), 20))
    wild = AlmostLinear(A=np.full(6, 100.0), W=model.W, h=model.h, L=model.L, P=2)
    assert np.isfinite(along(wild, series, 4)).all()


# Exponents.


def test_exponents_of_a_linear_map_are_the_logs_of_its_eigenvalues() -> None:
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))
    matrix = turn @ np.diag([1.5, 0.9, -0.5, 0.1]) @ np.linalg.inv(turn) + 0.0
    found = exponents([matrix] * 600, 4, 4)
    assert found == pytest.approx(np.log([1.5, 0.9, 0.5, 0.1]), abs=1e-3)
    assert exponents([matrix] * 600, 4, 2) == pytest.approx(found[:2])
    with pytest.raises(ValueError, match="more than 200"):
        exponents([matrix] * 200, 4, 4)


def test_the_exponent_of_a_tent_is_that_of_its_slopes() -> None:
    latent = folded(0.3141592, 8000)
    [first, second] = spectrum(tent(), latent)
    known = -CORNER * np.log(CORNER) - 0.6 * np.log(0.6)
    assert first == pytest.approx(known, abs=0.02) and second < -30, "its two units are one number, but for rounding"
    assert spectrum(tent(), latent, 1, per_time=10) == pytest.approx([10 * first])
    assert topological_entropy(transitions(region_codes(latent, 1), [0, 1])) == pytest.approx(np.log(2))


def test_exponents_of_lorenz_are_the_known_ones(truth: np.ndarray) -> None:
    def flow(at: np.ndarray) -> np.ndarray:
        x, y, z = at * [7.9, 9.0, 8.6] + [0, 0, 23.5]
        return np.array([[-10, 10, 0], [28 - z, -1, -x], [y, x, -8 / 3]])

    halves = (np.eye(3) + 0.005 * flow(at) + (0.005 * flow(at)) @ (0.005 * flow(at)) / 2 for at in truth[:4000])
    found = 100 * exponents((one @ one for one in halves), 3, 3)
    assert found.sum() == pytest.approx(-(10 + 1 + 8 / 3), abs=0.1) and abs(found[1]) < 0.2
    assert found[0] == pytest.approx(0.906, abs=0.3)


# Figures.


def test_figures_show_what_the_runs_did() -> None:
    truth = folded(0.3141592, 3000)
    pictures = pictures_of(tent(), truth, truth[:, [0, 0]][:, :1], interval=8, axes=(0, 0))
    assert json.loads(json.dumps(pictures)) == pictures
    both = tuple({f"P1/{key}": one for key, one in pictures.items()} for _ in range(2))
    found = Found(config=None, seeds=(0, 1), scores=({}, {}), series=({}, {}), pictures=both)
    attractor, graphs, power, agree = drawn(found, "tent", ["P1", "absent"], step=0.1, unit="s", labels=("x", "x"))
    assert [(one.panel, one.name) for one in attractor.series] == [
        ("true", ""),
        ("P1", "0"),
        ("P1", "1"),
        ("P1", "fixed points"),
    ]
    assert (
        all(x is not None and x < CORNER for x in attractor.series[1].x)
        and sum(len(one.x) for one in attractor.series[1:3]) <= 1000
    )
    assert [one.name for one in graphs.series] == ["P1, seed 0", "P1, seed 1"] and graphs.series[0].names == ("0", "1")
    assert np.array(graphs.series[0].cells).sum() == pytest.approx(1, abs=0.01) and len(graphs.series[0].x) == 2
    assert [one.name for one in power.series] == ["true", "P1"] and power.series[0].x[-1] == pytest.approx(5)
    assert power.series[0].y == power.series[1].y and agree.series[0].cells == ((1.0,), (1.0,))
    assert sorted(attractor.series[3].x) == pytest.approx([0, 1 / (2 - CORNER)], abs=1e-3)
    assert sum(len(json.dumps(one.to_json())) for one in (attractor, graphs, power, agree)) < 60_000


def test_what_diverged_at_once_is_drawn_too() -> None:
    truth = folded(0.3141592, 3000)[:, :1]
    pictures = pictures_of(tent(), np.zeros((0, 2)), truth, interval=8, axes=(0, 0))
    one = {f"P1/{key}": value for key, value in pictures.items()}
    figures = drawn(Found(config=None, seeds=(0,), scores=({},), series=({},), pictures=(one,)), "tent", ["P1"])
    assert [figure.kind for figure in figures] == ["scatter", "line"] and len(figures[1].series) == 1
    assert drawn(Found(config=None, seeds=(0,), scores=({},), series=({},), pictures=({},)), "tent", ["P1"]) == []
