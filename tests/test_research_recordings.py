"""Recordings learnt by almost-linear RNNs: what the data are, where a region lies in a beat, an experiment from end to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from affinequant_research.alrnn.empirical import (
    EXPERIMENTS,
    Recording,
    ahead,
    of_beats,
    of_recording,
    onset_region,
    peaks,
)
from affinequant_research.alrnn.model import new_model
from affinequant_research.alrnn.recordings import ecg, embedded, fmri, rate_of, scored
from affinequant_research.running import found, run_experiment

from affinequant import AffineQuantError
from affinequant.report.building import build_page
from affinequant.report.html import to_html
from affinequant.report.reading import Sources


def test_a_row_holds_what_was_some_steps_ago() -> None:
    rows = embedded(np.arange(10.0), (0, 1, 4))
    assert rows[0].tolist() == [4, 3, 0] and rows[-1].tolist() == [9, 8, 5] and len(rows) == 6
    series = scored(np.array([[1.0, 5], [3, 7], [100, 100]]), 2)
    assert series[:2].tolist() == [[-1, -1], [1, 1]] and series[2, 0] == 98


def test_packages_bring_series() -> None:
    train, truth = ecg("pywt", 900)
    assert train.shape == truth.shape == (900, 5) and rate_of("pywt") == 360
    volumes, same = fmri()
    assert volumes is same and volumes.shape == (250, 28) and volumes.std(0) == pytest.approx(np.ones(28))


def test_a_file_is_taken_as_it_is_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "mine.npy"
    np.save(path, np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32))
    assert ecg(str(path), 40)[0].shape == (40, 3) and rate_of(str(path)) == 100
    still = np.random.default_rng(0).standard_normal((50, 3))
    still[:, 1] = 2
    for wrong in (np.zeros(5), np.full((5, 2), np.nan), still, np.array([["a", "b"]])):
        np.save(path, wrong)
        with pytest.raises(AffineQuantError, match="holds no series"):
            ecg(str(path), 40)
    path.write_text("no array")
    for name in (path, tmp_path / "absent.npy"):
        with pytest.raises(AffineQuantError, match="cannot be read"):
            ecg(str(name), 40)
    with pytest.raises(AffineQuantError, match="did you mean 'ecgsyn'"):
        ecg("ecgsin", 40)


@pytest.mark.parametrize("module", ["neurokit2", "pywt", "nitime"])
def test_a_package_that_is_not_there_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AffineQuantError, match=r"pip install 'affinequant\[research\]'") as caught:
        fmri() if module == "nitime" else ecg({"neurokit2": "ecgsyn"}.get(module, module), 40)
    assert caught.value.exit_code == 3


def test_the_region_of_the_onsets_is_the_one_that_tells_them() -> None:
    signal, codes = np.zeros(1000), np.zeros(1000, dtype=np.int64)
    at = np.arange(60, 960, 85)
    signal[at], signal[at + 20] = 4.0, 1.0
    assert peaks(signal, 100, 2.0).tolist() == at.tolist() and not len(peaks(signal, 100, 5.0))
    codes[(at[:, None] - [6, 5, 4]).ravel()] = 3
    codes[: at[1] - 10] = 1
    assert onset_region(codes, at - 5) == (3, pytest.approx(10 / 11), pytest.approx(0.03))
    assert onset_region(codes, np.array([-3])) == onset_region(codes, np.array([], dtype=int)) == (0, 0.0, 1.0)


def test_a_run_without_beats_has_no_region_of_theirs() -> None:
    train, truth = ecg("pywt", 900)
    model = new_model(12, 2, 5, np.random.default_rng(0))  # untrained: it falls to rest
    config = Recording(source="pywt", steps=500)
    found = {name: score.value for name, (_, score) in of_beats(model, truth, 360, config).items()}
    assert (found["qrs_held"], found["qrs_region"], found["beats_a_minute"]) == (0, 1, 0)
    assert found["beats_a_minute_led"] == pytest.approx(60 * 360 * 3 / 900) and found["qrs_held_led"] > 0
    rest = {name: score.value for name, (_, score) in of_recording(model, train, 360, config).items()}
    assert rest["spread"] < 1e-3 and rest["settled"] == 1 and rest["d_hellinger@s20,T500"] == 1


def test_what_is_ahead_is_where_a_free_run_gets() -> None:
    model, seen = new_model(12, 3, 4, np.random.default_rng(0)), np.random.default_rng(1).standard_normal((5, 4))
    for row, reached in zip(seen, ahead(model, seen, 7), strict=True):
        assert reached == pytest.approx(model.free_run(model.start(row), 8)[-1, :4])


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.name)
def test_an_experiment_from_end_to_end(experiment, tmp_path: Path) -> None:
    config = experiment.presets["smoke"]
    torch.set_num_threads(1)
    results = run_experiment("alrnn", experiment, config, [0, 1], "smoke", tmp_path)
    figures = experiment.figures(found(config, results))
    kinds = {figure.key.split("_")[1]: figure.kind for figure in figures}
    expected = {"attractor": "scatter", "spectra": "line", "agreement": "heat"}
    assert expected.items() <= kinds.items() and ("beats" in kinds) == (experiment.name == "ecg")
    names = {name.split("/")[1] for name in results[0]["metrics"]}
    assert {"regions", "exponent", "spread", "n_step_mse@n20", "kept_update"} <= names
    told = {"title": "t", "figures": [json.loads(json.dumps(figure.to_json())) for figure in figures]}
    assert len(to_html(build_page(Sources(place=tmp_path, research=told)))) < 500_000
    for preset in experiment.presets.values():
        assert [stage.name for stage in experiment.stages(preset)] == ["P2"]
        assert preset.updates % preset.check_every == 0
