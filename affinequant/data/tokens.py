"""Calibration windows cut out of a text, and the text to evaluate on."""

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from affinequant.data.demo import demo_passages
from affinequant.data.files import first_line
from affinequant.data.text import DATA as DATA
from affinequant.data.text import HUB, MOST_CHARACTERS, hub_rows, read_text, texts
from affinequant.data.text import check_source as check_source
from affinequant.data.tokenizer import adds_bos as adds_bos
from affinequant.data.wheels import Say, quiet
from affinequant.errors import PREFLIGHT, AffineQuantError

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Calibration windows and what is needed to say where they came from.

    `available` counts the tokens that the windows were drawn from (for C4: those in the documents that were used).
    `bos` tells whether each window starts with the tokenizer's own BOS, in place of one token of text.
    """

    ids: "Int64[Tensor, 'samples seq_len']"
    source: str
    sha256: str
    bos: bool
    available: int

    def summary(self) -> dict[str, Any]:
        """Everything but the tokens, as plain JSON values for a report."""
        samples, seq_len = self.ids.shape
        return {
            "source": self.source,
            "samples": samples,
            "seq_len": seq_len,
            "bos": "each window" if self.bos else "none",
            "available_tokens": self.available,
            "sha256": self.sha256,
        }


def calibration_tokens(
    source: str, tokenizer: Any, *, samples: int, seq_len: int, seed: int, say: Say = quiet
) -> Tokens:
    """Random windows of a source's text, never overlapping, the same for the same seed.

    Args:
        source: a name of `DATA`, a file, a folder or `hf:ID`.
        tokenizer: a transformers tokenizer; a window starts with BOS if and only if it adds one itself.
        samples: how many windows.
        seq_len: tokens in each, BOS included.

    Raises:
        AffineQuantError: no such source or text that cannot be read (exit 2); too little text, or no hub (exit 3).
    """
    if samples < 1 or seq_len < 2:
        raise AffineQuantError(f"{samples} samples of {seq_len} tokens", "--samples, --seq-len", "use at least 1 and 2")
    check_source(source)
    bos = adds_bos(tokenizer)
    width = seq_len - bos
    rng = random.Random(seed)
    if source == "c4":
        name, windows, available = _document_windows(tokenizer, samples, width, rng)
    else:
        most = max(MOST_CHARACTERS, 8 * samples * seq_len)
        name, text = read_text(source, most, say)
        ids = encode(tokenizer, text)
        available = len(ids)
        windows = [ids[start : start + width] for start in _starts(len(ids), samples, width, bos, name, rng)]
    if bos:
        windows = [[tokenizer.bos_token_id, *window] for window in windows]
    import torch

    tensor = torch.tensor(windows, dtype=torch.int64)
    digest = hashlib.sha256(tensor.numpy().astype("<i8").tobytes()).hexdigest()
    return Tokens(ids=tensor, source=name, sha256=digest, bos=bos, available=available)


def evaluation_text(
    source: str, *, most: int = MOST_CHARACTERS, say: Say = quiet, flag: str = "--text"
) -> tuple[str, str]:
    """The name and the text to evaluate on: `demo` (held-out passages), `wikitext2` (test split) or a file, of which no
    more than `most` characters are read.

    Raises:
        AffineQuantError: no such source or text that cannot be read (exit 2), or no hub (exit 3).
    """
    if source == "demo":
        return "demo", "\n\n".join(demo_passages(say)[1])
    if source in ("c4", "c4-new"):
        raise AffineQuantError(
            "C4 is evaluated on fixed crops, not on a text", flag, "add --bos first, or use --suite paper"
        )
    check_source(source, flag=flag)
    if source == "wikitext2":
        return "wikitext2", "\n\n".join(texts(hub_rows(*HUB[source][:2], split="test", flag=flag), source, flag=flag))
    return read_text(source, most, say, flag=flag)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text of any length, without special tokens.

    Raises:
        AffineQuantError: the tokenizer fails on it (exit 3).
    """
    try:
        # verbose=False: a text longer than the model's context is no mistake here.
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as problem:
        what = f"the tokenizer cannot encode this text: {first_line(problem)}"
        fix = "give other text, or the model's own tokenizer"
        raise AffineQuantError(what, f"text that begins {text[:40]!r}", fix, exit_code=PREFLIGHT) from problem


def _starts(total: int, samples: int, width: int, bos: bool, name: str, rng: random.Random) -> list[int]:
    """Starts of windows that do not overlap, uniform over all ways to place them, in random order."""
    if total < samples * width:
        fits, length = total // width, total // samples + bos
        ways = [f"--samples {fits}"] * (fits > 0) + [f"--seq-len {length}"] * (length > 1 + bos)
        raise AffineQuantError(
            f"too little calibration text: {name} has {total:,} tokens, {samples * width:,} are needed "
            f"({samples} windows of {width} that do not overlap)",
            "--data",
            f"use at most {' or '.join(ways)}, or give more text" if ways else "give more text",
            exit_code=PREFLIGHT,
        )
    gaps = sorted(rng.randrange(total - samples * width + 1) for _ in range(samples))
    starts = [gap + index * width for index, gap in enumerate(gaps)]
    rng.shuffle(starts)
    return starts


def _document_windows(tokenizer: Any, samples: int, width: int, rng: random.Random) -> tuple[str, list[list[int]], int]:
    """C4: one random crop from each of `samples` random documents that are long enough."""
    repo, config, files = HUB["c4"]
    rows = hub_rows(repo, config, split="train", data_files=files)
    order = list(range(len(rows)))
    rng.shuffle(order)
    windows, available = [], 0
    for index in order:
        ids = encode(tokenizer, rows[index]["text"])
        if len(ids) < width:
            continue
        start = rng.randrange(len(ids) - width + 1)
        windows.append(ids[start : start + width])
        available += len(ids)
        if len(windows) == samples:
            return "c4:train", windows, available
    raise AffineQuantError(
        f"too little calibration text: {len(windows)} documents of C4's first shard have {width:,} tokens or more, "
        f"{samples} are needed",
        "--data c4",
        f"use at most --samples {len(windows)}, or a smaller --seq-len" if windows else "use a smaller --seq-len",
        exit_code=PREFLIGHT,
    )
