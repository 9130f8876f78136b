"""The output folder before, while and after a run works in it."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.plan import Plan
from affinequant.run import Run

RUN_FOLDER = ".run"
"""Where in the output folder a run keeps its stages; engines look at none of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """An output folder that this process alone may write to. `finished`: a run of some recipe is complete in it."""

    out: Path
    finished: bool

    @property
    def run_folder(self) -> Path:
        """The run's own folder."""
        return self.out / RUN_FOLDER


@contextmanager
def open_workspace(made: Plan, *, overwrite: bool, resume: bool) -> Iterator[Workspace]:
    """Make or enter the output folder and lock it.

    Raises:
        AffineQuantError: it holds other files, cannot be written, is in use, or (with `resume`) holds no run.
    """
    out = made.recipe.output_folder()
    check_output(out, made.source.folder, overwrite=overwrite, resume=resume)
    there_before = out.exists()
    try:
        (out / RUN_FOLDER).mkdir(parents=True, exist_ok=True)
        handle = (out / RUN_FOLDER / "lock").open("a")
    except OSError as problem:
        raise _unwritable(out, problem) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_nlink == 0:  # the other process gave up just now and took its lock along
                raise OSError
        except OSError:
            raise AffineQuantError(
                "another process is working in this folder", str(out), "wait for it, or use another -o"
            ) from None
        done = (out / "report.json").exists() and Run.exists(out / RUN_FOLDER)
        try:
            yield Workspace(out=out, finished=done and not overwrite)
        finally:
            if not Run.exists(out / RUN_FOLDER):
                _leave(out, there_before)


def _leave(out: Path, there_before: bool) -> None:
    """Take away the lock and the folders around it, where no run has begun."""
    (out / RUN_FOLDER / "lock").unlink()
    for folder in (out / RUN_FOLDER, *([] if there_before else [out])):
        if any(folder.iterdir()):
            return
        folder.rmdir()


def empty(workspace: Workspace) -> None:
    """Remove everything but the lock that this process holds: only once nothing about the new run can be refused."""
    out = workspace.out
    inside = [path for path in (out / RUN_FOLDER).iterdir() if path.name != "lock"]
    for path in (*inside, *(path for path in out.iterdir() if path.name != RUN_FOLDER)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_output(out: Path, source: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that must not be written to, without touching it.

    Raises:
        AffineQuantError: see `open_workspace`.
    """
    if out.exists() and not out.is_dir():
        raise AffineQuantError(f"{out} is a file", "-o", "give a folder")
    holds_run = Run.exists(out / RUN_FOLDER)
    if resume and not holds_run:
        raise AffineQuantError(f"no run to resume in {out}", "--resume", "leave --resume out to start one")
    if overwrite:
        protected = [path.resolve() for path in (Path.cwd(), Path(os.path.expanduser("~")), source)]
        if any(path == out.resolve() or out.resolve() in path.parents for path in protected):
            raise AffineQuantError(
                f"--overwrite would empty {out}, which holds the model, this folder or your home",
                "-o",
                "use another folder",
            )
    elif out.is_dir() and not holds_run and any(path.name != RUN_FOLDER for path in out.iterdir()):
        raise AffineQuantError(
            f"{out} is not empty and holds no run", "-o", "use another folder, or --overwrite to empty it first"
        )
    above = out.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise _unwritable(out, None)


def _unwritable(out: Path, problem: OSError | None) -> AffineQuantError:
    why = f": {problem.strerror}" if problem else ""
    return AffineQuantError(f"{out} cannot be written{why}", "-o", "use a folder you may write to", exit_code=PREFLIGHT)
