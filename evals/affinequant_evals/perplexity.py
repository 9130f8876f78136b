"""Perplexity of a text, and in the same pass how far the model's distributions are from a reference's."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from affinequant.data.wheels import Say, quiet
from affinequant.progress import Steps
from affinequant_evals.harness import Battery, Better, Metric
from affinequant_evals.logits import Logits, open_logits, weigh
from affinequant_evals.part import Part
from affinequant_evals.reference import Compare, Kept, Live, Record, Reference
from affinequant_evals.scores import Score, exp_mean_score, mean_score
from affinequant_evals.windows import Bos as Bos
from affinequant_evals.windows import Windows
from affinequant_evals.windows import c4_windows as c4_windows
from affinequant_evals.windows import check_bos as check_bos
from affinequant_evals.windows import cut_windows as cut_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sums = Mapping[str, Float64[Tensor, " windows"]]
"""What was found of a text's tokens, summed over those of each window."""
COMPARED: Mapping[str, Better] = {"kl": "lower", "agreement": "higher", "flips": "lower"}
"""What comes out of a pass beside a reference, and which direction is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A transformers model, its tokenizer and the name under which it is scored; `say` hears how far that is.

    Attributes:
        reference: what its next-token distributions are compared with, on every text.
        record: where its own are kept, so that another model can be compared with them.
        losses: its losses on texts that it need not read again, summed over each window's tokens, by `Windows.key`.
        backend: what it runs in, in words. Where that is no process of ours, `model` is `lm_eval_model.Served`.
    """

    model: "PreTrainedModel"
    tokenizer: Any
    name: str
    say: Say = quiet
    backend: str = "in memory"
    reference: Reference | None = None
    record: Kept | None = None
    losses: Mapping[str, Float64[Tensor, " windows"]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnText(Battery[LanguageModel]):
    """What is measured on the windows of a text in one pass."""

    windows: Windows


def on_text(windows: Windows) -> OnText:
    """Perplexity of a text; beside a reference also, of the same tokens in the same pass:

    - `kl@...`: the mean over tokens of the divergence of the model's next-token distribution from the reference's, in nats,
    - `agreement@...`: the share of tokens before which both hold the same token most likely,
    - `flips@...`: the share of tokens that exactly one of the two predicts right.

    Standard errors are over windows, that of the perplexity by the delta method.
    """
    name = f"perplexity@{windows.label}"

    def measure(subject: LanguageModel, part: Part) -> dict[str, tuple[Better, Score]]:
        losses = subject.losses.get(windows.key)
        if losses is None and subject.record:
            losses = subject.record.losses(windows)
        sums = read(subject, windows, part) if losses is None else {"loss": losses}
        rows: dict[str, tuple[Better, Score]] = {name: ("lower", _perplexity(sums, windows, subject))}
        if subject.reference and "kl" in sums:
            about = {**windows.about, "backend": subject.backend, **subject.reference.about}
            for what, better in COMPARED.items():
                more = _known(sums, windows) if what == "kl" else {}
                score = mean_score(_per_window(sums[what], windows), key=windows.key, about={**about, **more})
                rows[f"{what}@{windows.label}"] = (better, score)
        return rows

    return OnText(name=name, function=measure, fingerprint=windows.about, resumes=True, windows=windows)


def perplexity(windows: Windows) -> Metric[LanguageModel]:
    """exp of the mean loss over all tokens that count; the standard error is over windows, by the delta method."""

    def measure(subject: LanguageModel) -> Score:
        return _perplexity(read(subject, windows), windows, subject)

    return Metric(name=f"perplexity@{windows.label}", better="lower", function=measure, fingerprint=windows.about)


@torch.inference_mode()
def read(subject: LanguageModel, windows: Windows, part: Part | None = None) -> Sums:
    """One pass over a text: `loss`, in nats, and beside a reference what it says. Logits are made a piece at a time, of
    both models where two are there. What the subject says is recorded where that is wanted, and what a live reference has
    lost is told it.

    Args:
        part: notes the windows that are done, and those that it has are not read again, unless they are to be recorded.
    """
    if not isinstance(subject.model, torch.nn.Module):
        told = Steps(subject.say, "windows", len(windows.ids))
        return {"loss": cast("Any", subject.model).losses(windows, told)}
    logits = open_logits(subject.model, windows.ids[0])
    compared = subject.reference.open(windows) if subject.reference else None
    kept = part.there() if part and not subject.record else {}
    sums = {name: values.tolist() for name, values in kept.items()}
    begin = len(sums.get("loss", ()))
    told = Steps(subject.say, "windows", len(windows.ids) - begin)
    with subject.record.writing(windows) if subject.record else nullcontext() as record:
        for index in told.each(range(begin, len(windows.ids))):
            found = _read_window(logits, windows, index, compared(index) if compared else None, record)
            for name, total in found.items():
                sums.setdefault(name, []).append(total)
            if part and not record:
                part.note(_tensors(sums))
    whole = _tensors(sums)
    if isinstance(subject.reference, Live):
        subject.reference.losses[windows.key] = whole.pop("reference")
    return whole


def _read_window(
    logits: Logits, windows: Windows, index: int, compare: Compare | None, record: Record | None
) -> dict[str, float]:
    """The sums over one window's tokens."""
    ids, found = windows.ids[index], defaultdict[str, Any](float)
    places, piece = windows.places(index), logits.read(ids)
    for start in range(0, len(places), logits.rows):
        some = places[start : start + logits.rows]
        targets = ids[some.start + 1 : some.stop + 1].to(logits.model.device)
        mine, likely = weigh(piece(slice(some.start, some.stop)), targets)
        if record:
            record(mine, likely)
        del likely  # before the reference makes its own
        for name, values in ({"loss": mine.loss} | (compare(some, mine) if compare else {})).items():
            found[name] += values.sum()
    return {name: float(total) for name, total in found.items()}


def _tensors(sums: Mapping[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in sums.items()}


def window_losses(model: "PreTrainedModel", ids: Int64[Tensor, "windows seq_len"]) -> Float64[Tensor, " windows"]:
    """Mean next-token loss of each window in nats, over its seq_len - 1 targets."""
    subject = LanguageModel(model=model, tokenizer=None, name="")
    return read(subject, Windows(ids=ids, text="", bos=""))["loss"] / (ids.shape[1] - 1)


def _known(sums: Sums, windows: Windows) -> dict[str, float]:
    """What a divergence is known from where a reference does not know all: means over tokens."""
    return {name: float(sums[name].sum()) / sum(windows.counts) for name in ("outside", "at_least") if name in sums}


def _perplexity(sums: Sums, windows: Windows, subject: LanguageModel) -> Score:
    about = windows.about | {"backend": subject.backend}
    return exp_mean_score(_per_window(sums["loss"], windows), key=windows.key, about=about)


def _per_window(sums: Float64[Tensor, " windows"], windows: Windows) -> list[float]:
    """Each window's part in the mean over all tokens: their mean is that mean, and where windows count differently many
    tokens their spread is that of a ratio of two sums, linearised."""
    counts = torch.tensor(windows.counts, dtype=torch.float64)
    each = counts.mean()
    return (sums / each - sums.sum() / counts.sum() * (counts / each - 1)).tolist()
