"""What each model answered, document by document, in a file a task: for a person who wants to see what a difference is."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affinequant.errors import AffineQuantError
from affinequant.run.durable import write_text
from affinequant_evals.derived import SHOWN

Samples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLog:
    """Writes `TASK.jsonl` into a folder, again when the second model has answered.

    A line is a document: `doc_id`, `prompt`, `target`, and for `checkpoint` and `baseline` (null while or where there is
    none) their `scores` and `answers`; `flipped` is `lost` or `won` where exactly one of the two is right. An answer is a
    text with its `loglikelihood` and whether it is the `greedy` one, or a text alone that was generated.

    Attributes:
        checkpoint: the name under which that is scored; another name is the baseline.
    """

    folder: Path
    checkpoint: str
    seen: dict[str, dict[str, Samples]] = field(default_factory=lambda: defaultdict(dict))

    def check(self) -> None:
        """Refuse a folder in which something lies already, before anything is measured.

        Raises:
            AffineQuantError: that, or it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not any(self.folder.iterdir()):
                return
        except OSError as problem:
            raise AffineQuantError(f"no folder for samples: {problem}", "--log-samples", "name another") from problem
        raise AffineQuantError(f"{self.folder} is not empty", "--log-samples", "name a new folder, or empty it")

    def add(self, subject: str, tasks: Mapping[str, Samples]) -> None:
        """What lm-eval recorded of a model; the tasks' files are written anew."""
        for task, samples in tasks.items():
            mine = subject == self.checkpoint and "checkpoint" not in self.seen[task]
            self.seen[task]["checkpoint" if mine else "baseline"] = samples
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(self.seen[task])]
            write_text(self.folder / f"{task}.jsonl", "".join(lines))


def _lines(models: Mapping[str, Samples]) -> list[dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for role, samples in models.items():
        for sample in samples:
            prompts = list(dict.fromkeys(_words(given[0]) for given in sample["arguments"]))
            line = found.setdefault(
                (sample["doc_id"], sample["filter"]),
                {
                    "doc_id": sample["doc_id"],
                    **({} if sample["filter"] == "none" else {"filter": sample["filter"]}),
                    "prompt": prompts[0] if len(prompts) == 1 else prompts,
                    "target": sample["target"],
                    "checkpoint": None,
                    "baseline": None,
                    "flipped": None,
                },
            )
            scores = {name: sample[name] for name in sample["metrics"] if isinstance(sample.get(name), int | float)}
            line[role] = {"scores": scores, "answers": _answers(sample)}
            line["flipped"] = _flipped(line["checkpoint"], line["baseline"])
    return list(found.values())


def _answers(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    answers = []
    for given, responses in zip(sample["arguments"], sample["resps"], strict=True):
        for response in responses:
            if isinstance(response, str):
                answers.append({"text": response})
            elif isinstance(response, tuple | list):
                loglikelihood, greedy = response
                answers.append({"text": given[1], "loglikelihood": loglikelihood, "greedy": bool(greedy)})
            else:
                answers.append({"loglikelihood": response})
    return answers


def _flipped(mine: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str | None:
    """By the metric that the papers show, as in the rows `TASK,flips`."""
    if not mine or not other:
        return None
    for metric in SHOWN:
        if metric in mine["scores"] and metric in other["scores"]:
            gain = mine["scores"][metric] - other["scores"][metric]
            return "won" if gain > 0 else "lost" if gain < 0 else None
    return None


def _words(prompt: Any) -> str:
    """Of a chat, its turns as JSON."""
    return prompt if isinstance(prompt, str) else str(getattr(prompt, "prompt", prompt))
