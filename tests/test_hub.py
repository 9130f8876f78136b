"""A model named by its hub id: planned from its config alone, downloaded once, checked like any other."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import affinequant
from affinequant import AffineQuantError
from affinequant.models.source import locate

Make = Callable[..., Path]


@pytest.fixture
def hub(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the hub that holds a sharded model; as the real one, it fetches what the patterns name."""
    state: dict[str, Any] = {"source": tiny(shards=2), "calls": [], "leave": ()}
    cache = tmp_path / "snapshot"
    cache.mkdir()

    def download(model: str, *, allow_patterns: list[str]) -> str:
        state["calls"].append(allow_patterns)
        for path in state["source"].iterdir():
            if any(path.match(pattern) for pattern in allow_patterns) and path.name not in state["leave"]:
                shutil.copy(path, cache / path.name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return state


def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} wild swans on lake {i % 19}" for i in range(1500)))
    return {"preset": "rtn", "data": tmp_path / "text.txt", "seq_len": 32, "out": tmp_path / "out"}


def test_a_sharded_model_is_planned_without_its_weights_and_then_fetched(hub: dict[str, Any], tmp_path: Path) -> None:
    fields = settings(tmp_path)
    affinequant.plan("org/name", **{name: str(v) if isinstance(v, Path) else v for name, v in fields.items()})
    assert not any("*.safetensors" in patterns for patterns in hub["calls"])
    done = affinequant.quantize("org/name", **fields)
    assert done.report["verified"]["passed"] and done.report["model"] == "org/name"
    assert affinequant.quantize("org/name", **fields).report == done.report


def test_a_download_that_was_interrupted_is_taken_up(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["leave"] = ("model-00002-of-00002.safetensors",)
    with pytest.raises(AffineQuantError, match="missing"):
        affinequant.quantize("org/name", **settings(tmp_path))
    hub["leave"] = ()
    assert affinequant.quantize("org/name", **settings(tmp_path)).report["verified"]["passed"]


def test_what_was_fetched_is_checked_against_the_config(hub: dict[str, Any], tmp_path: Path) -> None:
    config = hub["source"] / "config.json"
    wrong = shutil.copytree(hub["source"], tmp_path / "wrong")
    (wrong / "config.json").write_text(
        config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 256')
    )
    hub["source"] = wrong
    with pytest.raises(AffineQuantError, match=r"config\.json says") as caught:
        affinequant.quantize("org/name", **settings(tmp_path))
    assert caught.value.exit_code == 3 and not list((tmp_path / "out").glob(".run/stages/*"))


def test_only_the_weights_that_the_index_names_are_fetched_and_code_only_when_trusted(
    hub: dict[str, Any], tmp_path: Path
) -> None:
    more = shutil.copytree(hub["source"], tmp_path / "more")
    (more / "own.py").write_text("")
    (more / "consolidated.safetensors").write_bytes(b"another copy")
    hub["source"] = more
    fetched = {path.name for path in locate("org/name").iterdir()}
    assert "model-00002-of-00002.safetensors" in fetched and not {"own.py", "consolidated.safetensors"} & fetched
    assert (locate("org/name", weights=False, code=True) / "own.py").exists()
