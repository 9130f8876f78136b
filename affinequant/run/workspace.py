"""The output folder before, while and after a run works in it."""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from affinequant.errors import PREFLIGHT, AffineQuantError, disk_full
from affinequant.run.durable import write_text
from affinequant.run.pages import is_page
from affinequant.run.run import FINGERPRINT, Run

RUN_FOLDER = ".run"
"""Where in the output folder a run keeps its stages; engines look at none of it."""
REMOVING = "removing.json"
"""In the run's folder: the files that an --overwrite is about to remove."""
COPIED = "copied.json"
"""In the run's folder: the files that are copied from the source, by their names in the output."""
_WRITTEN = re.compile(
    r"((model|affinequant)(-\d{5}(-of-\d{5})?)?\.safetensors(\.index\.json)?|model\.gguf|README\.md|config\.json"
    r"|recipe\.toml|report(\.failed)?\.json)(\.tmp)?|report\.(html|md)\.tmp"
)
"""What a run itself writes."""
_PAGE = re.compile(r"report\.(html|md)")
"""What may also be a person's own: by its beginning it is known which."""


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
def open_workspace(out: Path, source: Path, *, overwrite: bool, resume: bool, keep: str = "") -> Iterator[Workspace]:
    """Make or enter the output folder and lock it. `source` is the model's folder, `keep` what else must not be removed.

    Raises:
        AffineQuantError: it holds other files, cannot be written, is in use, or (with `resume`) holds no run.
    """
    check_output(out, source, overwrite=overwrite, resume=resume, keep=keep)
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
        if (out / RUN_FOLDER / REMOVING).exists():
            _remove_listed(out)
        done = (out / "report.json").exists() and Run.exists(out / RUN_FOLDER)
        try:
            yield Workspace(out=out, finished=done and not overwrite)
        except Exception as problem:
            if disk_full(problem):
                fix = "free some room, then repeat the command, without --overwrite: every finished block is kept"
                raise AffineQuantError("the disk is full", str(out), fix, exit_code=PREFLIGHT) from problem
            raise
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
    """Remove what runs have made, but not the lock that this process holds: only once nothing about the new run can be
    refused.

    What is to go is listed first. A kill before that leaves the old run whole; one after it leaves no run and no model,
    and whoever enters the folder next removes the rest.
    """
    files = _files(workspace.out)
    _check_ours(workspace.out, files)
    write_text(workspace.run_folder / REMOVING, json.dumps(files))
    _remove_listed(workspace.out)


def clear(out: Path) -> None:
    """As `empty`, and the run's own folder with it: for a folder that nobody works in."""
    if out.is_dir():
        (out / RUN_FOLDER).mkdir(exist_ok=True)
        empty(Workspace(out=out, finished=False))
        shutil.rmtree(out / RUN_FOLDER)


def expect(workspace: Workspace, names: list[str]) -> None:
    """Note the files that the run will copy, so that they are known for its own whenever it stops."""
    write_text(workspace.run_folder / COPIED, json.dumps(names))


def _remove_listed(out: Path) -> None:
    """What marks a run or a model as whole goes first, the list of what is to go last."""
    inside, removing = out / RUN_FOLDER, out / RUN_FOLDER / REMOVING
    marks = [inside / FINGERPRINT, out / "config.json", out / "report.json"]
    rest = [path for path in inside.iterdir() if path.name not in ("lock", COPIED, REMOVING)]
    for path in (*marks, *rest, *(out / name for name in json.loads(removing.read_text()))):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for root, _, _ in os.walk(out, topdown=False):
        if Path(root) not in (out, inside):
            with contextlib.suppress(OSError):
                os.rmdir(root)
    (inside / COPIED).unlink(missing_ok=True)
    removing.unlink()


def _files(out: Path) -> list[str]:
    """Everything in the folder outside the run's own, links as they are."""
    found = []
    for root, folders, names in os.walk(out):
        here = Path(root)
        if here == out and RUN_FOLDER in folders:
            folders.remove(RUN_FOLDER)
        links = [name for name in folders if (here / name).is_symlink()]
        empty = [] if folders or names or here == out else [here]
        found += [(here / name).relative_to(out).as_posix() for name in (*names, *links)]
        found += [path.relative_to(out).as_posix() for path in empty]
    return sorted(found)


def _check_ours(out: Path, files: list[str]) -> None:
    """Refuse to remove what no run or export of ours made: see what reports and runs say of themselves."""
    known: set[str] = set()
    for path in (
        out / "report.json",
        out / "report.failed.json",
        out / RUN_FOLDER / COPIED,
        out / RUN_FOLDER / REMOVING,
    ):
        with contextlib.suppress(OSError, ValueError, TypeError):
            said = json.loads(path.read_text())
            known |= {str(name) for name in (said["files"] if isinstance(said, dict) and "schema" in said else said)}
    ours = bool(known) or Run.exists(out / RUN_FOLDER)
    foreign = [
        name
        for name in files
        if not (ours and (name.removesuffix(".tmp") in known or _WRITTEN.fullmatch(name)))
        and not (ours and _PAGE.fullmatch(name) and is_page(out / name))
    ]
    if (out / RUN_FOLDER).is_dir():
        inside = (
            "lock",
            "stages",
            FINGERPRINT,
            f"{FINGERPRINT}.tmp",
            COPIED,
            f"{COPIED}.tmp",
            REMOVING,
            f"{REMOVING}.tmp",
        )
        names = [path.name for path in (out / RUN_FOLDER).iterdir()]
        foreign += [f"{RUN_FOLDER}/{name}" for name in names if name not in inside and not name.startswith("tmp")]
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise AffineQuantError(
            f"--overwrite would remove what no run made: {shown}", str(out), "move it away, or use another folder"
        )


def check_output(out: Path, source: Path, *, overwrite: bool, resume: bool, keep: str = "") -> None:
    """Refuse a folder that must not be written to, without touching it; `keep` is what else it must not hold.

    Raises:
        AffineQuantError: see `open_workspace`.
    """
    if out.exists() and not out.is_dir():
        raise AffineQuantError(f"{out} is a file", "-o", "give a folder")
    holds_run = Run.exists(out / RUN_FOLDER)
    leftover = (out / RUN_FOLDER / REMOVING).exists()  # of an --overwrite that was cut short
    if resume and not holds_run:
        raise AffineQuantError(f"no run to resume in {out}", "--resume", "leave --resume out to start one")
    if overwrite:
        homes = [Path.cwd(), Path(os.path.expanduser("~")), source, *([Path(keep)] if os.path.exists(keep) else [])]
        protected = [path.resolve() for path in homes]
        if any(path == out.resolve() or out.resolve() in path.parents for path in protected):
            raise AffineQuantError(
                f"--overwrite would empty {out}, which holds the model, the data, this folder or your home",
                "-o",
                "use another folder",
            )
        if out.is_dir():
            _check_ours(out, _files(out))
    elif out.is_dir() and not (holds_run or leftover) and any(path.name != RUN_FOLDER for path in out.iterdir()):
        raise AffineQuantError(
            f"{out} is not empty and holds no run", "-o", "use another folder, or --overwrite to empty it first"
        )
    above = out.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise _unwritable(out, None)


def check_disk(out: Path, needed: int) -> None:
    """The disk that will hold the output has room for it and for the run's own files: `needed` bytes.

    Raises:
        AffineQuantError: with what is needed and what is free.
    """
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AffineQuantError(
            f"the disk is too small: {needed / 2**30:.2f} GB needed, {free / 2**30:.2f} GB free",
            str(folder),
            "free some room, or write elsewhere with -o",
            exit_code=PREFLIGHT,
        )


def _unwritable(out: Path, problem: OSError | None) -> AffineQuantError:
    why = f": {problem.strerror}" if problem else ""
    return AffineQuantError(f"{out} cannot be written{why}", "-o", "use a folder you may write to", exit_code=PREFLIGHT)
