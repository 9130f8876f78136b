"""Durable progress: a folder of stages, each committed whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from affinequant.errors import AffineQuantError


class Run:
    """A run's folder: `fingerprint.json`, `stages/NAME/{tensors.safetensors,report.json}`, and one carried state.

    A stage appears by a rename after its files are on disk, so a kill at any point leaves it whole or absent. The carry
    (what the next stage starts from) lives inside the newest stage and is dropped from older ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages = folder / "stages"

    @staticmethod
    def open(folder: str | Path, fingerprint: Mapping[str, Any]) -> "Run":
        """Start a run in `folder`, or take up the one that is there.

        Raises:
            AffineQuantError: the folder holds a run whose fingerprint differs; the fields that differ are named.
        """
        run = Run(Path(folder))
        run.stages.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(fingerprint))
        known = run.folder / "fingerprint.json"
        if known.exists():
            run.check_same(plain)
        else:
            _write_atomic(known, json.dumps(plain, indent=1))
        for left in run.stages.glob("*.tmp"):
            shutil.rmtree(left)
        return run

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether `folder` holds a run."""
        return (Path(folder) / "fingerprint.json").exists()

    def check_same(self, fields: Mapping[str, Any], *, all_fields: bool = True) -> None:
        """Compare a fingerprint, or with `all_fields=False` a part of one, with the run's own.

        Raises:
            AffineQuantError: naming each field that differs, with both values.
        """
        old, new = json.loads((self.folder / "fingerprint.json").read_text()), json.loads(json.dumps(fields))
        names = sorted({*old, *new} if all_fields else new)
        differ = [name for name in names if old.get(name) != new.get(name)]
        if differ:
            shown = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in differ)
            raise AffineQuantError(
                f"this folder holds a run of another recipe ({shown})",
                str(self.folder),
                "use another -o, repeat the first recipe to resume it, or --overwrite to start again",
            )

    def pending(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are not committed yet, in order."""
        return [name for name in names if not self.committed(name)]

    def committed(self, name: str) -> bool:
        """Whether the stage is on disk, whole."""
        return (self.stages / name / "report.json").exists()

    def commit(
        self,
        name: str,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        carry: Mapping[str, Tensor] | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        """Put a stage on disk: its tensors, what the next stage starts from, and its report."""
        temporary = self.stages / f"{name}.tmp"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        for file, content in (("tensors", tensors), ("carry", carry)):
            if content:
                save_file(
                    {key: value.contiguous().cpu() for key, value in content.items()}, temporary / f"{file}.safetensors"
                )
        (temporary / "report.json").write_text(json.dumps(report or {}, indent=1))
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        os.rename(temporary, self.stages / name)
        _sync(self.stages)
        for old in self.stages.glob("*/carry.safetensors"):
            if old.parent.name != name:
                old.unlink()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A committed stage's tensors."""
        return load_file(self.stages / name / "tensors.safetensors")

    def report(self, name: str) -> dict[str, Any]:
        """A committed stage's report."""
        return json.loads((self.stages / name / "report.json").read_text())

    def carry(self, name: str) -> dict[str, Tensor]:
        """What the stage after `name` starts from."""
        return load_file(self.stages / name / "carry.safetensors")

    def drop_tensors(self) -> None:
        """Keep the reports only: for a run whose result has been written and checked."""
        for path in self.stages.glob("*/*.safetensors"):
            path.unlink()


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.rename(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
