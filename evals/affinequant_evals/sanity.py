"""Does it still speak? A few greedy continuations, and what in them looks like a model that was broken.

Perplexity may not show it: a checkpoint whose scales an engine reads in another way scores here and says "!!!!" there.
"""

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from affinequant.progress import Steps
from affinequant_evals.harness import Battery, Better, Scorecard, fingerprint_hash
from affinequant_evals.scores import Score, mean_score

if TYPE_CHECKING:
    from affinequant_evals.perplexity import LanguageModel

PROMPTS = ("The capital of France is", "Water boils at a temperature of", "Once upon a time, there was a little")
NEW_TOKENS = 16
ROW = "repetition@greedy"
GRAM = 4
LONGEST_RUN = 8
"""So often in a row no text that means anything has one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A greedy continuation.

    Attributes:
        repetition: share of its sequences of four tokens that were there before (seq-rep-4; Welleck et al., 2019).
        suspicious: what looks broken, in words; "" where nothing does.
    """

    prompt: str
    text: str
    repetition: float
    suspicious: str


def greedy(prompts: Sequence[str] = PROMPTS, tokens: int = NEW_TOKENS) -> "Battery[LanguageModel]":
    """The row `repetition@greedy`, the mean over prompts, whose `about` holds the samples. A model that cannot be made to
    go on has none, and that is said: what else was measured stands without it."""
    protocol = {"prompts": [*prompts], "tokens": tokens, "gram": GRAM}

    def measure(subject: "LanguageModel") -> dict[str, tuple[Better, Score]]:
        try:
            found = samples(subject, prompts, tokens)
        except Exception as problem:
            subject.say(f"no greedy samples: {type(problem).__name__}: {problem}")
            return {}
        about = {"samples": [asdict(sample) for sample in found], "tokens": tokens}
        score = mean_score([sample.repetition for sample in found], key=fingerprint_hash(protocol), about=about)
        return {ROW: ("lower", score)}

    return Battery(name=ROW, function=measure, fingerprint=protocol)


def samples(subject: "LanguageModel", prompts: Sequence[str] = PROMPTS, tokens: int = NEW_TOKENS) -> tuple[Sample, ...]:
    """What a model goes on with, a prompt at a time, as plain text without a chat template."""
    tokenizer, model = subject.tokenizer, subject.model
    generate: Any = model.generate
    made, told = [], Steps(subject.say, "prompts", len(prompts))
    for prompt in told.each(prompts):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        ids = generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=tokenizer.eos_token_id,
        )[0, inputs["input_ids"].shape[1] :].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        made.append(
            Sample(prompt=prompt, text=text, repetition=round(repetition(ids), 3), suspicious=suspicion(ids, text))
        )
    return tuple(made)


def repetition(ids: Sequence[int], gram: int = GRAM) -> float:
    """Share of the sequences of `gram` tokens that were there before: 0 where each is new, near 1 in a loop."""
    grams = [tuple(ids[start : start + gram]) for start in range(len(ids) - gram + 1)]
    return 1 - len({*grams}) / len(grams) if grams else 0.0


def suspicion(ids: Sequence[int], text: str) -> str:
    """What looks broken in a continuation, in words; "" where nothing does."""
    # A token may hold a part of a character's bytes, and the last one be cut off.
    strange = sum(one == "\ufffd" or _control(one) for one in text.rstrip("\ufffd"))
    run = max((len([*same]) for _, same in itertools.groupby(ids)), default=0)
    if not text.strip().strip("\ufffd"):
        return "nothing is said"
    if run >= LONGEST_RUN:
        return f"one token {run} times in a row"
    if strange:
        return f"{strange} characters that are no text"
    if repetition(ids) > 0.8:
        return f"{100 * repetition(ids):.0f} % of it is repetition"
    return ""


def _control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Co", "Cn") and character not in "\n\r\t"


def with_samples(card: Scorecard) -> Scorecard:
    """The scorecard with `samples` in its JSON, each beside the baseline's, where it has any."""
    mine, other = _samples(card), {sample["prompt"]: sample for sample in _samples(card.baseline)}
    if not mine:
        return card
    none = {"text": None, "suspicious": None}
    pairs = [(sample, other.get(sample["prompt"], none)) for sample in mine]
    found = [{**sample, "baseline": full["text"], "baseline_suspicious": full["suspicious"]} for sample, full in pairs]
    return replace(card, more={**card.more, "samples": found})


def broken(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each of a card's samples that looks broken where the baseline's does not."""
    return [
        f"after {sample['prompt']!r}, {sample['suspicious']}: {sample['text']!r}"
        for sample in found
        if sample["suspicious"] and not sample["baseline_suspicious"]
    ]


def _samples(card: Scorecard | None) -> list[dict[str, Any]]:
    score = card.score(ROW) if card else None
    return list(score.about["samples"]) if score else []
