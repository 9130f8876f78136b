"""Token windows of a text: the same for every model, a BOS where it is asked for, each target scored once."""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from affinequant.data.tokens import adds_bos, encode
from affinequant.errors import PREFLIGHT, AffineQuantError

Bos = Literal["auto", "yes", "no", "first"]
C4_SHARD = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
C4_DOCUMENTS = 1100
"""Documents of the shard that the newer protocol joins."""
PAPER_WINDOWS = 256
"""Windows of C4 in both protocols."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token windows of one text.

    Attributes:
        ids: token ids.
        bos: where a BOS token stands, in words.
        stride: by how many tokens a window lies behind the one before it, where they overlap; then the last `stride`
            targets of each window count, and all of the first. None where they lie side by side and all targets count.
    """

    ids: Int64[Tensor, "windows seq_len"]
    text: str
    bos: str
    stride: int | None = None

    @property
    def sha256(self) -> str:
        """Hash of the ids."""
        found = hashlib.sha256()
        for window in self.ids.numpy():  # one by one: those that slide share their memory
            found.update(window.astype("<i8").tobytes())
        return found.hexdigest()

    @property
    def label(self) -> str:
        """`TEXT,seqN`, as it stands behind the @ in a metric's name; with the stride where there is one."""
        return f"{self.text},seq{self.ids.shape[1]}" + (f",stride{self.stride}" if self.stride else "")

    @property
    def key(self) -> str:
        """Names exactly what is scored: the ids, and which of them count."""
        return self.sha256 + (f",stride{self.stride}" if self.stride else "")

    @property
    def counts(self) -> tuple[int, ...]:
        """Targets that count, window by window."""
        count, seq_len = self.ids.shape
        return (seq_len - 1, *(count - 1) * (self.stride or seq_len - 1,))

    def places(self, index: int) -> range:
        """Places of a window at which the token that follows counts."""
        last = self.ids.shape[1] - 1
        return range(last - self.counts[index], last)

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of them."""
        count, seq_len = self.ids.shape
        about: dict[str, Any] = {"text": self.text, "windows": count, "seq_len": seq_len}
        if self.stride:
            about["stride"] = self.stride
        return about | {"tokens_scored": sum(self.counts), "bos": self.bos, "sha256": self.sha256}


def cut_windows(
    name: str,
    text: str,
    tokenizer: Any,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    bos: Bos = "auto",
    stride: int | None = None,
) -> Windows:
    """The first `windows` windows of a text (all that are whole if None), tokenised once, side by side or sliding.

    Args:
        name: what the text is called in the result.
        seq_len: tokens in a window, BOS included.
        bos: `yes` and `no` put a BOS at the start of each window or nowhere; `auto` does what the tokenizer does to a
            text; `first` puts the tokenizer's own BOS before the text and cuts windows out of the whole (the papers).
        stride: start a window every so many tokens; each token is scored once, with at least seq_len - stride tokens
            before it in its window (but those of the first window). None: side by side.

    Raises:
        AffineQuantError: too little text (exit 3), a stride that leaves a token unscored, or a tokenizer without BOS is
            asked for one (exit 2).
    """
    if seq_len < 2 or (windows is not None and windows < 1):
        raise AffineQuantError(f"{windows} windows of {seq_len} tokens", "--windows, --seq-len", "use at least 1 and 2")
    if stride is not None and not 1 <= stride < seq_len:
        what = f"windows of {seq_len} tokens that start every {stride} tokens score some token twice or never"
        raise AffineQuantError(what, "--stride", f"use 1 to {seq_len - 1}; without --stride they lie side by side")
    check_bos(tokenizer, bos)
    own = adds_bos(tokenizer)
    each = bos == "yes" or (bos == "auto" and own)
    first = bos == "first" and own
    ids = [tokenizer.bos_token_id] * first + encode(tokenizer, text)
    width = seq_len - each
    step = stride or width
    fits = 1 + (len(ids) - width) // step if len(ids) >= width else 0
    if fits < (windows or 1):
        fix = f"use --windows {fits}" if fits else f"use --seq-len {len(ids) + each} or less"
        raise AffineQuantError(
            f"too little text: {name} has {len(ids):,} tokens, {width + ((windows or 1) - 1) * step:,} are needed",
            "--text",
            f"{fix}, or give more text",
            exit_code=PREFLIGHT,
        )
    cut = torch.tensor(ids, dtype=torch.int64).unfold(0, width, step)[: windows or fits]
    if each:
        cut = torch.cat([torch.full((len(cut), 1), tokenizer.bos_token_id), cut], dim=1)
    said = "each window" if each else "start of the text" if first else "none"
    return Windows(ids=cut, text=name, bos=said, stride=stride)


def check_bos(tokenizer: Any, bos: Bos) -> None:
    """Refuse to put a BOS where the tokenizer has none.

    Raises:
        AffineQuantError: that (exit 2).
    """
    if bos == "yes" and tokenizer.bos_token_id is None:
        raise AffineQuantError("the tokenizer has no BOS token", "--bos yes", "use --bos auto or --bos no")


def c4_windows(tokenizer: Any, *, seq_len: int = 2048, count: int = PAPER_WINDOWS) -> Windows:
    """The older C4 protocol: one random crop from each of 256 documents of the first validation shard, seed 0.

    This is the C4 of OmniQuant and AffineQuant; `c4_new_windows` is another and gives other figures.

    Raises:
        AffineQuantError: no hub (exit 3).
    """
    rows = _c4_rows()
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


def c4_new_windows(tokenizer: Any, *, seq_len: int = 2048, count: int = PAPER_WINDOWS) -> Windows:
    """The newer C4 protocol: the first 1100 documents of the first validation shard joined by a space, tokenised as one
    text with the tokenizer's own BOS before it; of it the first 256 windows, or all where there are fewer.

    This is the C4 of GPTQ's later code, of QuaRot and of FlatQuant; `c4_windows` is another and gives other figures.

    Raises:
        AffineQuantError: no hub, or too little text for one window (exit 3).
    """
    rows = _c4_rows()
    text = " ".join(rows[index]["text"] for index in range(min(C4_DOCUMENTS, len(rows))))
    made = cut_windows("c4-new", text, tokenizer, seq_len=seq_len, bos="first")
    return Windows(ids=made.ids[:count], text=made.text, bos=made.bos)


C4: Mapping[str, Callable[..., Windows]] = {"c4": c4_windows, "c4-new": c4_new_windows}
"""What papers call C4, by the names under which it is asked for here."""


def _c4_rows() -> Sequence[Any]:
    from affinequant.data.text import hub_rows

    return hub_rows("allenai/c4", None, split="validation", data_files=C4_SHARD, flag="--suite")
