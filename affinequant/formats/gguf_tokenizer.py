"""A tokenizer.json in the terms of GGUF: its tokens, what kind each is, and how text becomes them.

Two kinds are known. For a byte-level BPE, GGUF names the way in which text is split before merging, and llama.cpp holds
the code for each name; so it can be written only where that way is one of those that are known here by their rules. A
SentencePiece BPE (Llama 1 and 2, TinyLlama) has no merges there: llama.cpp joins whichever neighbours make the token of
the highest score, so it can be written where scores repeat what the merges say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
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

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as GGUF numbers them."""
SPACE = "\u2581"
"""What stands for a space inside the tokens of SentencePiece."""
UNMERGED = -1e6
"""The score of a token that no merge makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer: `model` and `split` are its `model` and `pre`, `kinds` one number per token.

    `scores` and `space_prefix` (whether text gets a space in front) are of SentencePiece alone. `note` says what llama.cpp
    does otherwise.
    """

    model: str
    split: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    space_prefix: bool = False
    note: str = ""


def read_vocabulary(folder: Path, size: int) -> Vocabulary | str:
    """The folder's tokenizer for an embedding of `size` rows, or why GGUF cannot be told of it faithfully."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "the source has no tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    model = described.get("model") or {}
    if model.get("type") != "BPE":
        return f"its tokenizer is no BPE (type {model.get('type')!r}), the kind that is known here"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its tokenizer marks the parts of words, which llama.cpp does not"
    places = {place: token for token, place in model["vocab"].items()}
    kinds = dict.fromkeys(places, NORMAL)
    for added in described.get("added_tokens") or []:
        places[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(places) >= size:
        return f"its tokenizer has tokens up to {max(places)}, the model {size}"
    pieces = model.get("byte_fallback", False)
    return (_pieces if pieces else _byte_level)(described, places, kinds, size)


def _byte_level(
    described: Mapping[str, Any], places: Mapping[int, str], kinds: Mapping[int, int], size: int
) -> Vocabulary | str:
    split = _split(described)
    if split is None:
        return f"its tokenizer's way of splitting text is none of {', '.join(SPLITS)}"
    tokens, numbers = _filled(places, kinds, size)
    return Vocabulary(model="gpt2", split=split, tokens=tokens, kinds=numbers)


def _pieces(
    described: Mapping[str, Any], places: Mapping[int, str], kinds: Mapping[int, int], size: int
) -> Vocabulary | str:
    """SentencePiece: bytes where characters are unknown, spaces as `SPACE`, scores in place of merges."""
    prefix = _space_prefix(described)
    if prefix is None:
        return "its tokenizer changes text in a way that llama.cpp's SentencePiece does not"
    unknown = described["model"].get("unk_token")
    kinds = dict(kinds) | {place: UNKNOWN for place, token in places.items() if token == unknown}
    bytes_there = {f"<0x{value:02X}>" for value in range(256)}
    kinds |= {place: BYTE for place, token in places.items() if token in bytes_there}
    if missing := sorted(bytes_there.difference(places.values())):
        return f"its tokenizer has no token {missing[0]} for that byte"
    scores = _scores(described["model"], {places[place] for place in places if kinds[place] == NORMAL})
    if isinstance(scores, str):
        return scores
    # llama.cpp looks for these in the text as it is.
    spoken = {
        place: token.replace(SPACE, " ") if kinds[place] == USER_DEFINED else token for place, token in places.items()
    }
    tokens, numbers = _filled(spoken, kinds, size)
    always, noted = prefix
    return Vocabulary(
        model="llama",
        split="default",
        tokens=tokens,
        kinds=numbers,
        scores=tuple(scores.get(token, UNMERGED) for token in tokens),
        space_prefix=always,
        note="llama.cpp puts a space before every text, also one that begins with a space or follows a special token"
        if noted
        else "",
    )


def _space_prefix(described: Mapping[str, Any]) -> tuple[bool, bool] | None:
    """Whether text gets a space in front, and whether llama.cpp does that more often; None for any other change."""
    normal, split = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = normal.get("normalizers", [normal] if normal else [])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if split.get("type") == "Split" and split.get("pattern") == {"String": " "} and replaced in steps[-1:]:
        split = {}  # at spaces, none of which is left (Gemma)
    if not split and steps and steps[-1] == replaced:
        before = steps[:-1]
        return (bool(before), False) if before in ([], [{"type": "Prepend", "prepend": SPACE}]) else None
    if (
        not steps
        and split.get("type") == "Metaspace"
        and split.get("replacement") == SPACE
        and not split.get("split", True)
    ):
        scheme = split.get("prepend_scheme", "always")
        return scheme != "never", scheme != "never"
    return None


def _scores(model: Mapping[str, Any], normal: set[str]) -> dict[str, float] | str:
    """By token, less the place of the first merge that makes it; or why scores cannot say what the merges say."""
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges") or []]
    made = ["".join(pair) for pair in merges]
    runs = [token for token, _ in groupby(token for token in made if token in normal)]
    if len(runs) != len(set(runs)):
        return "its tokenizer's merges are in an order that no scores of tokens give"
    known, vocab = set(merges), model["vocab"]
    for token in normal:
        for cut in range(1, len(token)):
            parts = token[:cut], token[cut:]
            if parts not in known and all(part in vocab or len(part) == 1 for part in parts):
                return f"its tokenizer never joins {parts[0]!r} and {parts[1]!r}, which llama.cpp would"
    scores: dict[str, float] = {}
    for place, token in enumerate(made):
        scores.setdefault(token, -float(place))
    return scores


def _filled(places: Mapping[int, str], kinds: Mapping[int, int], size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and kinds for every row of the embedding."""
    tokens = tuple(places.get(place, f"[PAD{place}]") for place in range(size))
    return tokens, tuple(kinds.get(place, UNUSED) for place in range(size))


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
