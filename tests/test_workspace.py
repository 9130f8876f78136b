"""The output folder: what is entered, what is refused untouched, and one process at a time."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from affinequant.errors import AffineQuantError
from affinequant.plan import Plan, plan
from affinequant.run import Run
from affinequant.workspace import check_output, empty, open_workspace

Tiny = Callable[..., Path]


@pytest.fixture
def made(tiny: Tiny, tmp_path: Path) -> Callable[[Path], Plan]:
    """made(out): the plan of a run into that folder."""
    (tmp_path / "text.txt").write_text("some words " * 2000)

    def planned(out: Path) -> Plan:
        return plan(str(tiny()), out=str(out), data=str(tmp_path / "text.txt"), samples=4, seq_len=32)

    return planned


def enter(made: Plan, **options: bool) -> Any:
    with open_workspace(made, **{"overwrite": False, "resume": False} | options) as workspace:
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


def test_overwrite_empties_it(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    (out / "sub").mkdir(parents=True)
    kept.mkdir()
    (kept / "file").write_text("x")
    (out / "sub" / "file").write_text("x")
    (out / "link").symlink_to(kept)
    Run.open(out / ".run", {"seed": 0}).commit("one")
    (out / "report.json").write_text("{}")
    with open_workspace(made(out), overwrite=True, resume=False) as workspace:
        assert not workspace.finished and (out / "link").exists()  # until nothing more can be refused
        empty(workspace)
        assert not Run.exists(out / ".run")
        assert [path.name for path in out.iterdir()] == [".run"]
    assert (kept / "file").exists(), "followed a link out of the folder"


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
    with open_workspace(made(out), overwrite=False, resume=False):
        Run.open(out / ".run", {}).commit("one")
        error = refusal(lambda: enter(made(out), overwrite=overwrite))
        assert "another process" in error.what
        assert Run.open(out / ".run", {}).committed("one"), "emptied under the hands of the first"
    enter(made(out))


def test_the_lock_goes_with_an_error(made: Callable[[Path], Plan], tmp_path: Path) -> None:
    with pytest.raises(KeyError), open_workspace(made(tmp_path / "out"), overwrite=False, resume=False):
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
