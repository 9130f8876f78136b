"""Perplexity on windows that do not overlap: the same tokens for every model, logits a few at a time."""

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from affinequant.data.tokens import adds_bos, encode
from affinequant.data.wheels import Say, quiet
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.progress import Steps
from affinequant_evals.harness import Metric
from affinequant_evals.scores import Score, exp_mean_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Bos = Literal["auto", "yes", "no", "first"]
CHUNK_BYTES = 64 * 2**20
"""Logits of one chunk in float32; a whole window of 2048 at a vocabulary of 49152 would be six times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A transformers model, its tokenizer and the name under which it is scored; `say` hears how far that is."""

    model: "PreTrainedModel"
    tokenizer: Any
    name: str
    say: Say = quiet


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token windows of one text. `bos` says in words where a BOS token stands."""

    ids: Int64[Tensor, "windows seq_len"]
    text: str
    bos: str

    @property
    def sha256(self) -> str:
        """Hash of the ids."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()


def cut_windows(
    name: str, text: str, tokenizer: Any, *, seq_len: int = 2048, windows: int | None = None, bos: Bos = "auto"
) -> Windows:
    """The first `windows` windows of a text (all that are whole if None), side by side, tokenised once.

    Args:
        name: what the text is called in the result.
        seq_len: tokens in a window, BOS included.
        bos: `yes` and `no` put a BOS at the start of each window or nowhere; `auto` does what the tokenizer does to a
            text; `first` puts the tokenizer's own BOS before the text and cuts windows out of the whole (the papers).

    Raises:
        AffineQuantError: too little text (exit 3), or a tokenizer without BOS is asked for one (exit 2).
    """
    if seq_len < 2 or (windows is not None and windows < 1):
        raise AffineQuantError(f"{windows} windows of {seq_len} tokens", "--windows, --seq-len", "use at least 1 and 2")
    check_bos(tokenizer, bos)
    own = adds_bos(tokenizer)
    each = bos == "yes" or (bos == "auto" and own)
    first = bos == "first" and own
    ids = [tokenizer.bos_token_id] * first + encode(tokenizer, text)
    width = seq_len - each
    fits = len(ids) // width
    if fits < (windows or 1):
        fix = f"use --windows {fits}" if fits else f"use --seq-len {len(ids) + each} or less"
        raise AffineQuantError(
            f"too little text: {name} has {len(ids):,} tokens, {(windows or 1) * width:,} are needed",
            "--text",
            f"{fix}, or give more text",
            exit_code=PREFLIGHT,
        )
    count = windows or fits
    cut = torch.tensor(ids[: count * width], dtype=torch.int64).view(count, width)
    if each:
        cut = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), cut], dim=1)
    return Windows(ids=cut, text=name, bos="each window" if each else "start of the text" if first else "none")


def check_bos(tokenizer: Any, bos: Bos) -> None:
    """Refuse to put a BOS where the tokenizer has none.

    Raises:
        AffineQuantError: that (exit 2).
    """
    if bos == "yes" and tokenizer.bos_token_id is None:
        raise AffineQuantError("the tokenizer has no BOS token", "--bos yes", "use --bos auto or --bos no")


def c4_windows(tokenizer: Any, *, seq_len: int = 2048, count: int = 256) -> Windows:
    """The older C4 protocol: one random crop from each of 256 documents of the first validation shard, seed 0.

    This is the C4 of OmniQuant and AffineQuant; GPTQ's later one joins documents and gives other figures.

    Raises:
        AffineQuantError: no hub (exit 3).
    """
    from affinequant.data.text import hub_rows

    shard = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    rows = hub_rows("allenai/c4", None, split="validation", data_files=shard, flag="--suite")
    rng = random.Random(0)
    crops = []
    for _ in range(10 * len(rows)):
        ids = tokenizer(rows[rng.randint(0, len(rows) - 1)]["text"], verbose=False)["input_ids"]
        if len(ids) >= seq_len:
            start = rng.randint(0, max(len(ids) - seq_len - 1, 0))
            crops.append(ids[start : start + seq_len])
            if len(crops) == count:
                break
    else:
        raise AffineQuantError(
            f"too little text: only {len(crops)} of {count} draws from C4 have {seq_len:,} tokens or more",
            "--suite",
            "use a smaller --seq-len",
            exit_code=PREFLIGHT,
        )
    bos = "start of each document" if adds_bos(tokenizer) else "none"
    return Windows(ids=torch.tensor(crops, dtype=torch.int64), text="c4", bos=bos)


def perplexity(windows: Windows) -> Metric[LanguageModel]:
    """exp of the mean loss over all windows; the standard error is over windows, by the delta method."""
    count, seq_len = windows.ids.shape
    about = {
        "text": windows.text,
        "windows": count,
        "seq_len": seq_len,
        "tokens_scored": count * (seq_len - 1),
        "bos": windows.bos,
        "sha256": windows.sha256,
    }

    def measure(subject: LanguageModel) -> Score:
        losses = window_losses(subject.model, windows.ids, Steps(subject.say, "windows", count))
        return exp_mean_score(losses.tolist(), key=about["sha256"], about=about)

    return Metric(name=f"perplexity@{windows.text},seq{seq_len}", better="lower", function=measure, fingerprint=about)


@torch.inference_mode()
def window_losses(
    model: "PreTrainedModel", ids: Int64[Tensor, "windows seq_len"], told: Steps | None = None
) -> Float[Tensor, " windows"]:
    """Mean next-token loss of each window in nats, in float32, over its seq_len - 1 targets; `told` hears of each."""
    plain = _head_is_plain(model, ids[:1, :8].to(model.device))
    losses = [_window_loss(model, window[None].to(model.device), plain) for window in (told.each(ids) if told else ids)]
    return torch.tensor(losses, dtype=torch.float64)


def _window_loss(model: "PreTrainedModel", ids: Int64[Tensor, "1 seq_len"], plain: bool) -> float:
    targets = ids[0, 1:]
    if plain:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    else:
        hidden = model(input_ids=ids, use_cache=False).logits[0, :-1]
    head = (model.get_output_embeddings() if plain else None) or torch.nn.Identity()
    rows = max(CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size), 1)
    total = 0.0
    for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        total += functional.cross_entropy(head(part).float(), wanted, reduction="sum").item()
    return total / len(targets)


def _head_is_plain(model: "PreTrainedModel", ids: Int64[Tensor, "1 few"]) -> bool:
    """Whether logits are just the head applied to the last hidden state; some models scale or cap them after it."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    logits = model(input_ids=ids, use_cache=False).logits
    direct = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    return torch.allclose(logits.float(), direct.float(), rtol=1e-3, atol=1e-3)
