"""Offline settings: the words that the hub's own library takes for yes, and nothing else."""

import pytest

from affinequant.data.offline import MODELS_OFFLINE, OFFLINE, offline_setting


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OFFLINE:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("value", ["1", "true", "YES", "On", "", "0", "false", "off"])
@pytest.mark.parametrize("name", OFFLINE)
def test_as_the_hub_reads_it(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.constants import _is_true

    monkeypatch.setenv(name, value)
    assert offline_setting() == (name if _is_true(value) else "")


def test_data_sets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert offline_setting() == ""
    monkeypatch.setenv(OFFLINE[-1], "1")
    assert offline_setting() == OFFLINE[-1] and offline_setting(MODELS_OFFLINE) == ""
