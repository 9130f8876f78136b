"""How near a generated trajectory comes to the true one: where it goes, at which frequencies, how far ahead it knows.

Chaotic trajectories part whatever the model, so that none of the first two compares them step by step: the divergence of
states compares how often which part of the space is visited, the Hellinger distance the spectra. Both depend on how long the
trajectories are and how finely they are looked at, which is why that stands in the names of the metrics. As the code of
arXiv 2410.14240 in Julia has them; its tutorial in Python bins otherwise, and its numbers are not comparable.

A trajectory is [steps, dimensions] in float64, as z-scored as the model was trained on.
"""

from collections.abc import Callable

import numpy as np
from affinequant_evals import Score
from affinequant_evals.harness import Better
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.special import logsumexp

Floats = NDArray[np.floating]
DIVERGED = 1e5
"""A state beyond this has left every attractor of z-scored data."""
MARGIN = 0.1
"""Of the bins about the truth, in its standard deviations."""
ALPHA = 1e-5
"""Laplace: what every bin holds before anything is counted."""
BINNED = 10
"""Dimensions up to which states are binned; beyond, mixtures of Gaussians are compared."""
MIXED = 10_000
"""States of a trajectory that become Gaussians, the first ones."""
FAR = 10.0
"""Standard deviations beyond the truth's range at which generated states are held before mixtures are compared: what has
diverged scores large, and finite."""


def has_diverged(series: Floats) -> bool:
    """Whether a trajectory has gone out of all bounds."""
    return not bool(np.all(np.abs(series) <= DIVERGED))  # NaN compares as out of bounds


def bin_divergence(truth: Floats, generated: Floats, bins: int = 30) -> float:
    """KL(truth || generated) over bins of equal width, in nats.

    The bins reach a tenth of a standard deviation beyond the truth; what is generated outside is not counted, as in the
    authors' code. What has diverged, or was never inside, has its mass elsewhere: it scores as a wrong fixed point does.
    """
    _fit(truth, generated)
    spread = MARGIN * truth.std(0, ddof=1)
    low, high = truth.min(0) - spread, truth.max(0) + spread
    wide = np.where(high > low, high - low, 1.0)
    total = float(bins) ** truth.shape[1]
    places, counts = np.unique(_places(truth, low, wide, bins), return_counts=True)
    inside = np.zeros(0, np.int64) if has_diverged(generated) else _places(generated, low, wide, bins)
    visited, times = np.unique(inside, return_counts=True)
    # Most bins are empty in both: they are not held, but summed as one.
    every = np.union1d(places, visited)
    p, q = np.zeros(len(every)), np.zeros(len(every))
    p[np.searchsorted(every, places)] = counts
    q[np.searchsorted(every, visited)] = times
    mass_p, mass_q = len(truth) + ALPHA * total, (len(inside) or len(generated)) + ALPHA * total
    p, q = (p + ALPHA) / mass_p, (q + ALPHA) / mass_q
    empty = (total - len(every)) * ALPHA / mass_p * np.log(mass_q / mass_p)
    return float(np.sum(p * np.log(p / q)) + empty)


def mixture_divergence(
    truth: Floats, generated: Floats, variance: float = 1.0, samples: int = 1000, seed: int = 0
) -> float:
    """KL(truth || generated) of mixtures with a Gaussian about every state, in nats: for dimensions that bins do not reach.

    By samples of the truth's mixture, hence not without error (Hershey and Olsen, ICASSP 2007). The authors' code leaves
    out samples that the generated mixture's density underflows at; here they count.

    Args:
        variance: of each Gaussian, in every dimension; it is the authors' 1 or .3, and results are comparable for one alone.
    """
    _fit(truth, generated)
    spread = FAR * truth.std(0, ddof=1)
    low, high = truth.min(0) - spread, truth.max(0) + spread
    held = high[None] if has_diverged(generated) else generated[:MIXED].clip(low, high)
    truth, rng = truth[:MIXED], np.random.default_rng(seed)
    drawn = truth[rng.integers(len(truth), size=samples)]
    drawn = drawn + np.sqrt(variance) * rng.standard_normal(drawn.shape)
    return float(np.mean(_log_density(drawn, truth, variance) - _log_density(drawn, held, variance)))


def spectra(series: Floats, smoothing: float = 20.0) -> Floats:
    """[frequencies, dimensions]: the power of each z-scored dimension, smoothed by a Gaussian of so many frequencies, and
    divided by its sum; frequency k is k cycles over the series' length. A constant dimension has none: zeros."""
    spread = series.std(0)
    known = spread > 1e-12 * np.maximum(np.abs(series).max(0), 1.0)
    scored = np.where(known, (series - series.mean(0)) / np.where(known, spread, 1.0), 0.0)
    power = np.abs(np.fft.rfft(scored, axis=0)) ** 2
    smooth = gaussian_filter1d(power, smoothing, axis=0) if smoothing else power
    whole = smooth.sum(0)
    return smooth / np.where(whole > 0, whole, 1.0)


def spectrum_distance(truth: Floats, generated: Floats, smoothing: float = 20.0) -> float:
    """Hellinger distance of the spectra, 0 to 1, mean over dimensions; 1 for what is constant or has diverged.

    Raises:
        ValueError: the lengths differ, so that a frequency is not the same in both.
    """
    _fit(truth, generated)
    if len(truth) != len(generated):
        raise ValueError(f"spectra of {len(truth)} and {len(generated)} steps have other frequencies")
    if has_diverged(generated):
        return 1.0
    shared = np.sqrt(spectra(truth, smoothing) * spectra(generated, smoothing)).sum(0)
    return float(np.sqrt(np.maximum(1.0 - shared, 0.0)).mean())


def n_step_error(predict: Callable[[Floats, int], Floats], series: Floats, steps: int = 20) -> float:
    """Mean squared error `steps` steps ahead, from every state of the series that has so many behind it.

    Args:
        predict: (states [count, dimensions], steps) -> the states so many steps later.
    """
    found = predict(series[:-steps], steps)
    return float(np.mean(np.square(found - series[steps:])))


def of_attractor(
    truth: Floats,
    generated: Floats,
    *,
    steps: int,
    bins: int = 30,
    variance: float = 1.0,
    smoothing: float = 20.0,
    spectrum_steps: int = 10_000,
) -> dict[str, tuple[Better, Score]]:
    """Both distances under the names of their definitions: `d_stsp@bins30,T1e5` (in more than ten dimensions
    `d_stsp@gmm1,T1e4`) and `d_hellinger@s20,T1e4`.

    Args:
        steps: the generated trajectory was to have; one of fewer has diverged.
        spectrum_steps: that spectra are made from, the first ones, or as many as there are.
    """
    return divergence(truth, generated, steps=steps, bins=bins, variance=variance) | spectral(
        truth, generated, smoothing=smoothing, steps=min(spectrum_steps, steps, len(truth))
    )


def divergence(
    truth: Floats, generated: Floats, *, steps: int, bins: int = 30, variance: float = 1.0
) -> dict[str, tuple[Better, Score]]:
    """The divergence of states alone; see `of_attractor`."""
    generated = padded(generated, steps)
    if truth.shape[1] <= BINNED:
        name, value = f"bins{bins},T{short(steps)}", bin_divergence(truth, generated, bins)
    else:
        name = f"gmm{variance:g},T{short(min(steps, MIXED))}"
        value = mixture_divergence(truth, generated, variance)
    return {f"d_stsp@{name}": ("lower", Score(value=value, stderr=None, n=steps))}


def spectral(
    truth: Floats, generated: Floats, *, smoothing: float = 20.0, steps: int = 10_000
) -> dict[str, tuple[Better, Score]]:
    """The Hellinger distance of the first `steps` alone; see `of_attractor`."""
    value = spectrum_distance(truth[:steps], padded(generated, steps), smoothing)
    return {f"d_hellinger@s{smoothing:g},T{short(steps)}": ("lower", Score(value=value, stderr=None, n=steps))}


def padded(series: Floats, steps: int) -> Floats:
    """The first `steps` of a trajectory; NaN, which counts as divergence, where it ends before that."""
    missing = max(steps - len(series), 0)
    return np.pad(series[:steps], ((0, missing), (0, 0)), constant_values=np.nan)


def short(count: int) -> str:
    """`1e5` for 100000, `2e4` for 20000; other numbers as they are."""
    digits = str(count).rstrip("0")
    zeros = len(str(count)) - len(digits)
    return f"{digits}e{zeros}" if zeros >= 3 and len(digits) == 1 else str(count)


def _places(series: Floats, low: Floats, wide: Floats, bins: int) -> NDArray[np.integer]:
    """The bin's number of every state inside."""
    at = np.floor((series - low) / wide * bins).astype(np.int64)
    at = at[((at >= 0) & (at < bins)).all(1)]
    return at @ (bins ** np.arange(at.shape[1], dtype=np.int64))


def _log_density(at: Floats, centres: Floats, variance: float) -> Floats:
    """Of the mixture, without the constant that both mixtures share."""
    squares = (at**2).sum(1)[:, None] - 2 * at @ centres.T + (centres**2).sum(1)
    return logsumexp(-squares / (2 * variance), axis=1) - np.log(len(centres))


def _fit(truth: Floats, generated: Floats) -> None:
    if truth.ndim != 2 or generated.ndim != 2 or truth.shape[1] != generated.shape[1]:
        raise ValueError(f"trajectories are {truth.shape} and {generated.shape}, not [steps, dimensions] of one space")
