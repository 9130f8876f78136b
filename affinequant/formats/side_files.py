"""What goes along from a source beside its weights: regular files of the folder that belong to a model, and no others."""

import fnmatch
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.source_files import is_inside
from affinequant.run.durable import install
from affinequant.run.pages import is_page

WEIGHTS = (
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".npz",
        ".npy",
    ),
    *(".ot", ".pkl", ".pickle", ".distcp", ".tflite", ".pb", ".data", ".mlmodel"),
)
_DATA = (
    ".parquet",
    ".arrow",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".gz",
    ".zst",
    ".xz",
    ".bz2",
    ".zip",
    ".tar",
    ".log",
)
_TRAINING = ("events.out.tfevents.*", "trainer_state.json", "*.onnx.data", "*.onnx_data*", "rng_state*", "optimizer*")
_FOLDERS = ("checkpoint-*", "global_step*", "runs", "wandb", "__pycache__")
_NEEDED = ("config.json", "generation_config.json", "*token*", "vocab*", "merges.txt", "*.model", "*.jinja", "*.py")
"""Files without which the result would not be the model, so that one that cannot be copied is refused."""
_LARGE = 64 * 2**20
"""Bytes from which a file that is not one of those is no side file."""
OWN = ("config.json", "recipe.toml", "report.json", "report.html")
"""Names that this package writes itself, so a source's file of that name is not copied."""
CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    """What is copied, relative to the source, and what is left out, in words."""

    source: Path
    copied: tuple[Path, ...]
    left_out: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes that are copied."""
        return sum((self.source / name).stat().st_size for name in self.copied)

    @property
    def targets(self) -> list[str]:
        """Their names in the output: a README becomes `SOURCE_README.md`, so that a source may be one of ours."""
        return [_renamed(name).as_posix() for name in self.copied]

    def content(self) -> dict[str, str]:
        """A hash of each by its name, documents apart: they may be edited while a run waits."""
        names = (name for name in self.copied if name.suffix != ".md")
        return {name.as_posix(): hashlib.sha256((self.source / name).read_bytes()).hexdigest()[:16] for name in names}

    def note(self) -> tuple[str, ...]:
        """One line about what is left out, if anything is."""
        more = f" and {len(self.left_out) - 20} more" if len(self.left_out) > 20 else ""
        return (f"not copied from the source: {', '.join(self.left_out[:20])}{more}",) if self.left_out else ()


def find_side_files(source: Path, *, skip: Path) -> SideFiles:
    """The files of a model folder that go along, without those in `skip`, the output, which may lie inside the source.

    Raises:
        AffineQuantError: one that the model needs is no regular file in the folder, or cannot be read.
    """
    copied, left = [], []
    for path in _walk(source, skip, left):
        name = path.relative_to(source)
        reason = _why_not(path, source)
        if reason is None:
            copied.append(name)
        elif reason:
            if path.parent == source and any(fnmatch.fnmatch(path.name, one) for one in _NEEDED):
                raise AffineQuantError(
                    f"{name} {reason}", str(source), "put the file itself there, readable", exit_code=PREFLIGHT
                )
            left.append(f"{name} ({reason})")
        elif not name.name.endswith((".safetensors", ".index.json")):  # what is said of those is said elsewhere
            left.append(str(name))
    return SideFiles(source=source, copied=tuple(copied), left_out=tuple(left))


def copy_source(source: Path, out: Path) -> list[Path]:
    """Copy the side files of the source folder.

    Raises:
        AffineQuantError: see `find_side_files`.
        OSError: a file cannot be written.
    """
    found, copied = find_side_files(source, skip=out), []
    for name, target in zip(found.copied, found.targets, strict=True):
        (out / target).parent.mkdir(parents=True, exist_ok=True)
        temporary = (out / target).with_name((out / target).name + ".tmp")
        shutil.copyfile(source / name, temporary)
        copied.append(install(temporary, out / target))
    return copied


def _renamed(name: Path) -> Path:
    card = len(name.parts) == 1 and re.fullmatch(rf"(SOURCE_)*{re.escape(CARD)}", name.name)
    return Path(f"SOURCE_{name}") if card else name


def _walk(source: Path, skip: Path, left: list[str]) -> Iterator[Path]:
    """Files of the folder and of those below that are part of the model; hidden ones are caches and version control."""
    for root, folders, names in os.walk(source):
        here, wanted = Path(root), []
        for name in sorted(folders):
            folder = here / name
            if name.startswith(".") or folder.resolve() == skip.resolve():
                continue
            if folder.is_symlink() or _is_apart(folder):
                left.append(f"{folder.relative_to(source)}/")
            else:
                wanted.append(name)
        folders[:] = wanted
        for name in sorted(names):
            if not (name.startswith(".") or (here == source and (name in OWN or is_page(here / name)))):
                yield here / name


def _is_apart(folder: Path) -> bool:
    """Whether a folder is something else than a part of the model: it has weights of its own, or a run of ours."""
    if any(fnmatch.fnmatch(folder.name, pattern) for pattern in _FOLDERS):
        return True
    try:
        return any(path.suffix in WEIGHTS or path.name == ".run" for path in folder.iterdir())
    except OSError:
        return True


def _why_not(path: Path, source: Path) -> str | None:
    """None where the file is copied, "" where it is nothing of a model's, else what is wrong with it, in words."""
    name = path.name
    if path.suffix.lower() in (*WEIGHTS, *_DATA) or name.endswith(".index.json"):
        return ""
    if any(fnmatch.fnmatch(name, pattern) for pattern in _TRAINING):
        return ""
    if not is_inside(path, source):
        return f"is a link out of the folder, to {path.resolve()}"
    try:
        seen = path.stat()
        if not stat.S_ISREG(seen.st_mode):
            return "is no regular file"
        with path.open("rb") as file:
            file.read(1)
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    needed = any(fnmatch.fnmatch(name, pattern) for pattern in _NEEDED)
    return "" if seen.st_size > _LARGE and not needed else None
