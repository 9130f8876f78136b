"""Perplexity of a text, and in the same pass how far the model's distributions are from a reference's."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from affinequant.data.wheels import Say, quiet
from affinequant.progress import Steps
from affinequant_evals.harness import Battery, Better, Metric
from affinequant_evals.logits import open_logits, rows_at_once, weigh
from affinequant_evals.reference import Kept, Live, Reference
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
    """

    model: "PreTrainedModel"
    tokenizer: Any
    name: str
    say: Say = quiet
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

    def measure(subject: LanguageModel) -> dict[str, tuple[Better, Score]]:
        losses = subject.losses.get(windows.key)
        if losses is None and subject.record:
            losses = subject.record.losses(windows)
        sums = read(subject, windows) if losses is None else {"loss": losses}
        rows: dict[str, tuple[Better, Score]] = {name: ("lower", _perplexity(sums, windows))}
        if subject.reference and "kl" in sums:
            about = windows.about | subject.reference.about
            for what, better in COMPARED.items():
                more = _bound(sums, windows) if what == "kl" else {}
                score = mean_score(_per_window(sums[what], windows), key=windows.key, about=about | more)
                rows[f"{what}@{windows.label}"] = (better, score)
        return rows

    return OnText(name=name, function=measure, fingerprint=windows.about, windows=windows)


def perplexity(windows: Windows) -> Metric[LanguageModel]:
    """exp of the mean loss over all tokens that count; the standard error is over windows, by the delta method."""

    def measure(subject: LanguageModel) -> Score:
        return _perplexity(read(subject, windows), windows)

    return Metric(name=f"perplexity@{windows.label}", better="lower", function=measure, fingerprint=windows.about)


@torch.inference_mode()
def read(subject: LanguageModel, windows: Windows) -> Sums:
    """One pass over a text: `loss`, in nats, and beside a reference what it says. Logits are made a piece at a time, of
    both models where two are there. What the subject
    says is recorded where that is wanted, and what a live reference has lost is told it."""
    logits = open_logits(subject.model, windows.ids[0])
    rows = rows_at_once(subject.model.config.get_text_config().vocab_size, subject.model.device)
    compared = subject.reference.open(windows) if subject.reference else None
    told, sums = Steps(subject.say, "windows", len(windows.ids)), defaultdict(list)
    with subject.record.writing(windows) if subject.record else nullcontext() as record:
        for index, ids in enumerate(told.each(windows.ids)):
            piece, compare = logits.read(ids), compared(index) if compared else None
            found = defaultdict[str, Any](float)
            for places in _pieces(windows.places(index), rows):
                targets = ids[places.start + 1 : places.stop + 1].to(subject.model.device)
                mine = weigh(piece(slice(places.start, places.stop)), targets)[0]
                if record:
                    record(mine)
                parts = {"loss": mine.loss} | (compare(places, mine) if compare else {})
                for name, part in parts.items():
                    found[name] += part.sum()
            for name, total in found.items():
                sums[name].append(float(total))
    whole = {name: torch.tensor(parts, dtype=torch.float64) for name, parts in sums.items()}
    if isinstance(subject.reference, Live):
        subject.reference.losses[windows.key] = whole.pop("reference")
    return whole


def window_losses(model: "PreTrainedModel", ids: Int64[Tensor, "windows seq_len"]) -> Float64[Tensor, " windows"]:
    """Mean next-token loss of each window in nats, over its seq_len - 1 targets."""
    subject = LanguageModel(model=model, tokenizer=None, name="")
    return read(subject, Windows(ids=ids, text="", bos=""))["loss"] / (ids.shape[1] - 1)


def _bound(sums: Sums, windows: Windows) -> dict[str, Any]:
    """How far a divergence may be from the true one where a reference does not know all."""
    if "outside" not in sums:
        return {}
    return {"bound": "lower", "outside": float(sums["outside"].sum()) / sum(windows.counts)}


def _pieces(places: range, rows: int) -> Iterator[range]:
    return (places[start : start + rows] for start in range(0, len(places), rows))


def _perplexity(sums: Sums, windows: Windows) -> Score:
    return exp_mean_score(_per_window(sums["loss"], windows), key=windows.key, about=windows.about)


def _per_window(sums: Float64[Tensor, " windows"], windows: Windows) -> list[float]:
    """Each window's part in the mean over all tokens: their mean is that mean, and where windows count differently many
    tokens their spread is that of a ratio of two sums, linearised."""
    counts = torch.tensor(windows.counts, dtype=torch.float64)
    each = counts.mean()
    return (sums / each - sums.sum() / counts.sum() * (counts / each - 1)).tolist()
