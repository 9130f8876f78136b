"""A byte-level BPE tokenizer.json in the terms of GGUF: its tokens, what kind each is, and how text is split for it.

GGUF names the way in which text is split before merging, and llama.cpp holds the code for each name; so a tokenizer can
be written only where that way is one of those that are known here by their rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = ("ByteLevel", True)
SPLITS: dict[str, tuple[tuple[str, Any], ...]] = {
    "gpt-2": (_BYTES,),
    "smollm": (("Digits", True), _BYTES),
    "llama-bpe": (
        ("Split", _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST),
        ("ByteLevel", False),
    ),
    "qwen2": (("Split", _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST), ("ByteLevel", False)),
}
"""Name in GGUF, and the steps that it stands for: a splitter and what matters of its settings."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens, as GGUF numbers them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer: `split` is its `pre`, `kinds` one number per token."""

    split: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]


def read_vocabulary(folder: Path, size: int) -> Vocabulary | str:
    """The folder's tokenizer for an embedding of `size` rows, or why GGUF cannot be told of it faithfully."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "the source has no tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    model = described.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return f"its tokenizer is not a byte-level BPE (type {model.get('type')!r}), the kind that is known here"
    split = _split(described)
    if split is None:
        return f"its way of splitting text is none of {', '.join(SPLITS)}"
    places = {place: token for token, place in model["vocab"].items()}
    kinds = dict.fromkeys(places, NORMAL)
    for added in described.get("added_tokens") or []:
        places[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(places) >= size:
        return f"it has tokens up to {max(places)}, the model {size}"
    tokens = tuple(places.get(place, f"[PAD{place}]") for place in range(size))
    return Vocabulary(split=split, tokens=tokens, kinds=tuple(kinds.get(place, UNUSED) for place in range(size)))


def _split(described: Mapping[str, Any]) -> str | None:
    step = described.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step]) if step.get("type") == "Sequence" else [step]
    found = tuple(map(_step, steps))
    normal = (described.get("normalizer") or {}).get("type")
    for name, wanted in SPLITS.items():
        if found == wanted and normal in ((None, "NFC") if name == "qwen2" else (None,)):
            return name
    return None


def _step(step: Mapping[str, Any]) -> tuple[str, Any]:
    kind = str(step.get("type"))
    if kind == "ByteLevel" and not step.get("add_prefix_space", False):
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits")
    if kind == "Split" and (step.get("behavior"), step.get("invert", False)) == ("Isolated", False):
        return kind, step["pattern"].get("Regex")
    return kind, None
