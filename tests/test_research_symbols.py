"""What is measured and read off almost-linear RNNs: attractors, symbols, regions, exponents, on cases known by hand."""

import numpy as np
import pytest
from affinequant_research.alrnn.measures import (
    bin_divergence,
    mixture_divergence,
    n_step_error,
    of_attractor,
    short,
    spectra,
    spectrum_distance,
)


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
