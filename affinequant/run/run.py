"""Durable progress: a folder of stages, each committed whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from affinequant.errors import AffineQuantError
from affinequant.run.durable import install, json_text, sync, write_text

FINGERPRINT = "fingerprint.json"


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
        """Start a run in `folder`, or take up the one that is there. Stages without a fingerprint are nobody's: they go.

        Raises:
            AffineQuantError: the folder holds a run whose fingerprint differs; the fields that differ are named.
        """
        run = Run(Path(folder))
        plain = json.loads(json.dumps(fingerprint))
        if Run.exists(folder):
            run.check_same(plain)
        else:
            if run.stages.exists():
                shutil.rmtree(run.stages)
            run.folder.mkdir(parents=True, exist_ok=True)
            write_text(run.folder / FINGERPRINT, json.dumps(plain, indent=1))
        run.stages.mkdir(exist_ok=True)
        for left in run.stages.glob("*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return run

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether `folder` holds a run."""
        return (Path(folder) / FINGERPRINT).exists()

    def fingerprint(self) -> dict[str, Any]:
        """What it was opened with."""
        return json.loads((self.folder / FINGERPRINT).read_text())

    def check_same(self, fields: Mapping[str, Any], *, all_fields: bool = True) -> None:
        """Compare a fingerprint, or with `all_fields=False` a part of one, with the run's own.

        Raises:
            AffineQuantError: naming each field that differs, with both values.
        """
        old, new = self.fingerprint(), json.loads(json.dumps(fields))
        names = sorted({*old, *new} if all_fields else new)
        differ = [one for name in names for one in _differences(name, old.get(name), new.get(name))]
        if differ:
            shown = "; ".join(f"{name}: {there!r} there, {now!r} now" for name, there, now in differ)
            raise AffineQuantError(
                f"this folder holds a run of another recipe or of other files ({shown})",
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
        (temporary / "report.json").write_text(json_text(report or {}), encoding="utf-8")
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        os.rename(temporary, self.stages / name)
        sync(self.stages)
        self._kept(name).unlink(missing_ok=True)
        for old in self.stages.glob("*/carry.safetensors"):
            if old.parent.name != name:
                old.unlink()

    def forget(self, name: str) -> None:
        """Let go of a stage, committed or begun: it is to be done again."""
        self._kept(name).unlink(missing_ok=True)
        if (self.stages / name).exists():
            leaving = self.stages / f"{name}.tmp"
            shutil.rmtree(leaving, ignore_errors=True)
            os.rename(self.stages / name, leaving)
            shutil.rmtree(leaving)

    def keep(self, name: str, state: Mapping[str, Any]) -> None:
        """Put on disk how far a stage is that is not committed yet: tensors and plain values, as a report of `fit` gives
        them when it was paused. The stage's commit lets go of it."""
        temporary = self._kept(name).with_suffix(".part.tmp")
        torch.save(dict(state), temporary)
        install(temporary, self._kept(name))

    def kept(self, name: str) -> dict[str, Any] | None:
        """How far a stage was when it was last kept; None where it was not, or is committed."""
        path = self._kept(name)
        return (
            torch.load(path, map_location="cpu", weights_only=True)
            if path.exists() and not self.committed(name)
            else None
        )

    def _kept(self, name: str) -> Path:
        return self.stages / f"{name}.part"

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A committed stage's tensors."""
        return load_file(self.stages / name / "tensors.safetensors")

    def report(self, name: str) -> dict[str, Any]:
        """A committed stage's report."""
        return json.loads((self.stages / name / "report.json").read_text())

    def carry(self, name: str) -> dict[str, Tensor]:
        """What the stage after `name` starts from."""
        return load_file(self.stages / name / "carry.safetensors")

    def dropped(self) -> bool:
        """Whether the tensors of committed stages are gone: the run was finished once, and cannot go on."""
        stages = [path.parent for path in self.stages.glob("*/report.json")]
        return any(
            (stage.name == "outer" or stage.name.startswith("block.")) and not (stage / "tensors.safetensors").exists()
            for stage in stages
        )

    def drop_tensors(self) -> None:
        """Keep the reports only: for a run whose result has been written and checked."""
        for path in (*self.stages.glob("*/*.safetensors"), *self.stages.glob("*.part")):
            path.unlink()


def _differences(name: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """(field, there, now) for what is not the same; of a table each entry that differs."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [one for key in keys for one in _differences(f"{name}.{key}", old.get(key), new.get(key))]
    return [(name, old, new)]
