"""Tasks through lm-eval: its own prompts and scoring, every document's part in a score, and errors of its own."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from affinequant.data.wheels import Say, quiet
from affinequant.errors import AffineQuantError
from affinequant_evals.backends import Backend, find_backend
from affinequant_evals.harness import Battery, package_version
from affinequant_evals.hush import aloud, hushed
from affinequant_evals.perplexity import LanguageModel
from affinequant_evals.sample_log import SampleLog
from affinequant_evals.scores import Better, Score, exp_mean_score, mean_score
from affinequant_evals.task_sources import TaskSource, find_source
from affinequant_evals.windows import Bos


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What decides how a task is run, beside its name.

    Attributes:
        tokenizer: the hash of one (`tokenizer_hash`): without it no score can be kept.
        chat_template: prompts are a chat's turns, solved examples among them.
        backend: what will answer.
        log: where every document's answers are written.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    bos: Bos = "auto"
    tokenizer: str = ""
    chat_template: bool = False
    backend: Backend = field(default_factory=find_backend)
    log: SampleLog | None = None
    verbose: bool = False


def task_batteries(names: Sequence[str], options: TaskOptions, say: Say = quiet) -> tuple[Battery[LanguageModel], ...]:
    """One battery per task: rows such as `piqa,acc` and `piqa,acc_norm`. Names and rows are checked here, at once.

    Raises:
        AffineQuantError: lm-eval is not installed, or a task has neither a hub nor local rows (exit 3); unknown task
            (exit 2, with the nearest spelling).
    """
    if (options.limit is not None and options.limit < 1) or (options.num_fewshot or 0) < 0:
        raise AffineQuantError(
            f"limit {options.limit}, {options.num_fewshot} shots", "--limit, --num-fewshot", "use at least 1 and 0"
        )
    sources = [find_source(name, say) for name in dict.fromkeys(names)]
    if options.backend.chat:
        for source in sources:
            _check_generated(source)
    return tuple(_battery(source, options, say) for source in sources)


def _battery(source: TaskSource, options: TaskOptions, say: Say) -> Battery[LanguageModel]:
    def measure(subject: LanguageModel) -> Mapping[str, tuple[Better, Score]]:
        from affinequant_evals.lm_eval_model import asked_through

        with (
            tempfile.TemporaryDirectory(prefix="affinequant-") as folder,
            aloud(subject) as loud,
            hushed(options.verbose),
        ):
            model = asked_through(loud, options.bos)
            results = _simple_evaluate(model, source.name, source.manager(Path(folder), say), options)
        if options.log:
            options.log.add(subject.name, results["samples"])
        about = {
            "rows": source.rows,
            "shots": source.shots if options.num_fewshot else None,
            "limit": options.limit,
            "bos": model.bos_said(),
            "chat_template": options.chat_template,
            "backend": subject.backend,
            "lm_eval": package_version("lm_eval"),
        }
        return _rows(results, about, options, say)

    return Battery(name=source.name, function=measure, fingerprint=_fingerprint(source, options))


def tokenizer_hash(tokenizer: Any) -> str:
    """Of all that decides which tokens a text becomes."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    said = [type(tokenizer).__name__, rules, str(tokenizer.bos_token), str(tokenizer.chat_template)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _check_generated(source: TaskSource) -> None:
    """A chat is answered by text alone.

    Raises:
        AffineQuantError: a task that wants probabilities (exit 2).
    """
    if source.kinds != {"generate_until"}:
        what = f"{source.name} compares the probabilities of answers, which no chat tells"
        raise AffineQuantError(
            what, "--backend", "give the server's /v1/completions, or a task that generates, as gsm8k"
        )


def _fingerprint(source: TaskSource, options: TaskOptions) -> dict[str, Any]:
    """All that decides the scores beside the model; nothing where the rows or the tokens are not known beforehand, or where
    more is wanted than scores."""
    if options.log or not (source.sha256 and options.tokenizer):
        return {}
    return {
        "task": source.name,
        "rows": source.rows,
        "sha256": source.sha256,
        "lm_eval": package_version("lm_eval"),
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "bos": options.bos,
        "chat_template": options.chat_template,
        "tokenizer": options.tokenizer,
        "backend": options.backend.said,
    }


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
        apply_chat_template=options.chat_template,
        fewshot_as_multiturn=options.chat_template,
    )


def _rows(results: Any, about: dict[str, Any], options: TaskOptions, say: Say) -> dict[str, tuple[Better, Score]]:
    rows: dict[str, tuple[Better, Score]] = {}
    documents = sum(len({sample["doc_id"] for sample in samples}) for samples in results["samples"].values())
    for task, values in results["results"].items():
        shots = results["n-shot"].get(task, 0)
        if options.num_fewshot is not None and shots != options.num_fewshot:
            say(f"{task} fixes its number of shots: {shots}, not {options.num_fewshot}")
        samples = results["samples"].get(task, [])
        hashed = hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()
        key = hashlib.sha256("".join(sample["prompt_hash"] for sample in samples).encode()).hexdigest()
        for column, value in values.items():
            metric, _, kind = column.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            seen = [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample]
            higher = (results["higher_is_better"].get(task) or {}).get(metric, True)
            name = f"{task},{metric}" if kind == "none" else f"{task},{metric},{kind}"
            score = _score(metric, float(value), seen, key, about | {"num_fewshot": shots, "sha256": hashed})
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
                return replace(score, value=value)  # the last bit too
    return Score(value=value, stderr=None, n=len(seen), about=about)
