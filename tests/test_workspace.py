"""The output folder: what is entered, what is refused untouched, and one process at a time."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from affinequant.errors import AffineQuantError
from affinequant.plan import Plan, plan
from affinequant.run.run import Run
from affinequant.run.workspace import check_output, empty, expect, open_workspace
from tests.test_run import Stopped, stopped_at

Tiny = Callable[..., Path]


@pytest.fixture
def made(tiny: Tiny, tmp_path: Path) -> Callable[[Path], Plan]:
    """made(out): the plan of a run into that folder."""
    (tmp_path / "text.txt").write_text("some words " * 2000)

    def planned(out: Path) -> Plan:
        return plan(str(tiny()), out=str(out), data=str(tmp_path / "text.txt"), samples=4, seq_len=32)

    return planned


def opened(made: Plan, **options: bool) -> Any:
    return open_workspace(made.recipe.output_folder(), made.source.folder, keep=made.recipe.data, **options)


def enter(made: Plan, **options: bool) -> Any:
    with opened(made, **{"overwrite": False, "resume": False} | options) as workspace:
        return workspace


def refusal(act: Callable[[], Any], code: int = 2) -> AffineQuantError:
    with pytest.raises(AffineQuantError) as caught:
        act()
    assert caught.value.exit_code == code and caught.value.fix
    return caught.value


def test_a_new_folder_is_made_with_its_parents(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    workspace = enter(made(out))
    assert workspace.out == out and workspace.run_folder == out / ".run" and not workspace.finished
    assert not (tmp_path / "a" / "b").exists(), "nothing was begun, nothing is left"
    out.mkdir(parents=True)
    enter(made(out))
    (out / ".run").mkdir()  # of a process that was killed before it began
    assert not enter(made(out)).finished and list(out.iterdir()) == []


def test_a_folder_with_anything_else_is_refused_untouched(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    error = refusal(lambda: enter(made(out)))
    assert "not empty" in error.what and "--overwrite" in error.fix
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def finished(out: Path) -> Path:
    """What a run leaves behind: its own files, and one that it has copied."""
    Run.open(out / ".run", {"seed": 0}).commit("block.0000", tensors={"x": torch.ones(1)})
    (out / "assets").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "assets/voice.json"):
        (out / name).write_text("{}")
    files = ["config.json", "model.safetensors", "tokenizer.json", "assets/voice.json"]
    (out / "report.json").write_text(json.dumps({"schema": 1, "files": dict.fromkeys(files, 2)}))
    return out


def test_overwrite_removes_what_a_run_made(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    with opened(made(out), overwrite=True, resume=False) as workspace:
        assert not workspace.finished and (out / "config.json").exists()  # until nothing more can be refused
        empty(workspace)
        assert not Run.exists(out / ".run")
        assert [path.name for path in out.iterdir()] == [".run"]
        assert [path.name for path in (out / ".run").iterdir()] == ["lock"]


def test_a_run_that_stopped_while_writing_knows_what_it_copied(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(made(out), overwrite=False, resume=False) as workspace:
        Run.open(workspace.run_folder, {"seed": 0})
        expect(workspace, ["chat_template.jinja"])
        for name in ("model-00001.safetensors.tmp", "recipe.toml", "chat_template.jinja", "config.json.tmp"):
            (out / name).write_text("")
    with opened(made(out), overwrite=True, resume=False) as workspace:
        empty(workspace)
    assert not out.exists() or not any(path.name != ".run" for path in out.iterdir())


@pytest.mark.parametrize("kind", ["file", "below", "link", "folder", "run", "none"])
def test_overwrite_refuses_what_no_run_made_and_names_it(
    made: Callable[[Path], Plan], tmp_path: Path, kind: str
) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    if kind == "none":
        out.mkdir()  # a foreign folder: not even what has our names is ours
    else:
        finished(out)
    name = {"below": "assets/mine.txt", "run": ".run/mine.txt", "none": "config.json"}.get(kind, "mine")
    if kind == "link":
        (out / name).symlink_to(kept)
    elif kind == "folder":
        (out / name).mkdir()
    else:
        (out / name).write_text("x")
    before = sorted(out.rglob("*"))
    error = refusal(lambda: enter(made(out), overwrite=True))
    assert name in error.what and "no run made" in error.what and sorted(out.rglob("*")) == before
    assert (kept / "file").exists()


def test_overwrite_protects_the_data(tiny: Tiny, tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    (out / "text.txt").write_text("some words " * 2000)
    chosen = plan(str(tiny()), out=str(out), data=str(out / "text.txt"), samples=4, seq_len=32)
    assert "the data" in refusal(lambda: enter(chosen, overwrite=True)).what and (out / "text.txt").exists()


@pytest.mark.parametrize(
    "problem",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_full_disk_is_said(made: Callable[[Path], Plan], tmp_path: Path, problem: Exception) -> None:
    def work() -> None:
        with opened(made(tmp_path / "out"), overwrite=False, resume=False):
            raise problem

    assert "disk is full" in refusal(work, 3).what


def test_an_overwrite_that_is_cut_short(
    made: Callable[[Path], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any call that changes the disk: the old run is whole, or neither a run nor a model is there."""
    step, ended = 0, False
    seen = set()
    while not ended:
        out = tmp_path / str(step)
        finished(out)
        with opened(made(out), overwrite=True, resume=False) as workspace, stopped_at(monkeypatch, step):
            try:
                empty(workspace)
                ended = True
            except Stopped:
                pass
        whole = Run.exists(out / ".run")
        there = {path.name for path in out.iterdir()} - {".run"}
        if whole:
            assert len(there) == 5 and Run.open(out / ".run", {"seed": 0}).committed("block.0000")
        seen.add((whole, "config.json" in there))
        if not whole:
            assert not enter(made(out)).finished, "a checkpoint without its run passed for a finished one"
            assert not any(path.name != ".run" for path in out.iterdir()), "the rest was left behind"
            assert not Run.open(out / ".run", {"seed": 1}).committed("block.0000"), "a block of another recipe was kept"
        step += 1
    assert step > 6 and {(True, True), (False, False)} <= seen


def test_a_run_is_taken_up_and_a_finished_one_known(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run.open(out / ".run", {"seed": 0}).commit("one")
    (out / "config.json").write_text("{}")
    assert not enter(made(out)).finished and not enter(made(out), resume=True).finished
    (out / "report.json").write_text("{}")
    assert enter(made(out)).finished


def test_resume_insists_on_a_run(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    for out in (tmp_path / "absent", tmp_path):
        error = refusal(lambda out=out: enter(made(out), resume=True))
        assert "no run to resume" in error.what
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_process_at_a_time(made: Callable[[Path], Plan], tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    with opened(made(out), overwrite=False, resume=False):
        Run.open(out / ".run", {}).commit("one")
        error = refusal(lambda: enter(made(out), overwrite=overwrite))
        assert "another process" in error.what
        assert Run.open(out / ".run", {}).committed("one"), "emptied under the hands of the first"
    enter(made(out))


def test_the_lock_goes_with_an_error(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    with pytest.raises(KeyError), opened(made(tmp_path / "out"), overwrite=False, resume=False):
        raise KeyError
    enter(made(tmp_path / "out"))


def test_a_file_is_no_folder(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(lambda: enter(made(tmp_path / "file"))).what
    assert "cannot be written" in refusal(lambda: enter(made(tmp_path / "file" / "below")), 3).what


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot be written" in refusal(lambda: enter(made(locked / "out")), 3).what


def test_a_place_where_nothing_can_be_written(made: Callable[[Path], Plan]) -> None:
    assert "cannot be written" in refusal(lambda: enter(made(Path("/proc/affinequant-out"))), 3).what


def test_overwrite_protects_the_model_this_folder_and_home(
    made: Callable[[Path], Plan], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    source = tiny()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "here")
    for out in (source, source.parent, tmp_path / "here", Path("."), Path(".."), tmp_path / "home", link):
        error = refusal(lambda out=out: check_output(out, source, overwrite=True, resume=False))
        assert "--overwrite would empty" in error.what
    check_output(tmp_path / "elsewhere", source, overwrite=True, resume=False)
