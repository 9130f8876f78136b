"""What drift is measured of: a checkpoint's calibration text, found again and checked, and the texts that are held against it."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from affinequant.data.text import MOST_CHARACTERS, read_text
from affinequant.data.tokens import adds_bos, calibration_tokens, encode, evaluation_text
from affinequant.data.wheels import Say, quiet
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.source import open_source
from affinequant.recipe.tables import flat
from affinequant_evals.site_inputs import Reader, open_reader
from affinequant_evals.windows import Windows

SEQ_LEN, WINDOWS = 256, 16
"""Tokens of a window and windows of a sample, at most: 4096 tokens of each text, 8192 of the calibration text."""
FEWEST = 2
"""Windows of a sample, at least."""
NAME_IT = "give --drift-from SOURCE: the text that was calibrated on, or would be"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Everything that is read, cut into windows of one length.

    Attributes:
        reader: the full-precision model.
        name: its name.
        calibration: in a random order, as they were drawn.
        texts: each no more than half as many windows as `calibration` has.
    """

    reader: Reader
    name: str
    calibration: Windows
    texts: tuple[Windows, ...]


def compare_texts(
    folder: Path,
    full: tuple[str, Path],
    tokenizer: Any,
    texts: Sequence[str],
    start: str = "",
    say: Say = quiet,
) -> Compared:
    """Find the calibration text and cut all texts; no weight is read.

    Args:
        folder: the checkpoint whose calibration text it is.
        full: name and folder of the full-precision model.
        texts: sources to be held against it, as for `--text`.
        start: a source that is calibrated on in place of the checkpoint's.

    Raises:
        AffineQuantError: no calibration text is known or it is not what it was, a text is not there (exit 2), too short
            (exit 3), or the model is of no family that is known here.
    """
    reader = _full_precision(full)
    if start:
        _check_text(start, "--drift-from")
        read = read_text(start, MOST_CHARACTERS, say, flag="--drift-from")
        calibration = _cut(*read, tokenizer, SEQ_LEN, 2 * WINDOWS, "--drift-from", fewest=2 * FEWEST)
    else:
        calibration = _calibrated(folder, tokenizer, say)
    length, most = calibration.ids.shape[1], len(calibration.ids) // 2
    for text in texts:
        _check_text(text, "--drift")
    found = (evaluation_text(text, say=say, flag="--drift") for text in dict.fromkeys(texts))
    cut = tuple(_cut(*one, tokenizer, length, most, "--drift") for one in found)
    if len({one.label for one in cut}) < len(cut):
        what = f"two texts have one name: {', '.join(one.text for one in cut)}"
        raise AffineQuantError(what, "--drift", "give files of different names")
    return Compared(reader=reader, name=full[0], calibration=calibration, texts=cut)


def _full_precision(full: tuple[str, Path]) -> Reader:
    if open_source(full[1], weights=False).config.get("quantization_config"):
        what = f"drift is measured in the model before quantisation, and {full[0]} is quantised"
        raise AffineQuantError(what, "--drift", "give --baseline MODEL, the model that it was made from")
    return open_reader(full[1])


def _check_text(source: str, flag: str) -> None:
    if source in ("c4", "c4-new"):
        raise AffineQuantError(
            "C4 is read as crops of documents, not as a text", flag, "give a file, or another source"
        )


def _cut(name: str, text: str, tokenizer: Any, length: int, most: int, flag: str, fewest: int = FEWEST) -> Windows:
    """At most so many windows, side by side at equal distances over the text; each starts as a calibration window does."""
    own = adds_bos(tokenizer)
    ids = encode(tokenizer, text)
    width = length - own
    whole = len(ids) // width
    if whole < fewest:
        what = f"too little text: {name} has {len(ids):,} tokens, {fewest * width:,} are needed"
        raise AffineQuantError(what, flag, "give more text", exit_code=PREFLIGHT)
    chosen = torch.linspace(0, whole - 1, min(whole, most)).round().long()
    rows = torch.tensor(ids[: whole * width]).view(whole, width)[chosen]
    return _windows(name, rows, tokenizer.bos_token_id if own else None)


def _windows(name: str, rows: Int64[Tensor, "windows tokens"], bos: int | None) -> Windows:
    if bos is None:
        return Windows(ids=rows, text=name, bos="none")
    return Windows(ids=torch.cat([torch.full((len(rows), 1), bos), rows], dim=1), text=name, bos="each window")


def _calibrated(folder: Path, tokenizer: Any, say: Say) -> Windows:
    """The windows that the checkpoint was calibrated on, each as far as `SEQ_LEN`.

    Raises:
        AffineQuantError: it does not say on which, they cannot be made again, or others come out.
    """
    recipe, noted = _recipe(folder), _noted(folder)
    if not recipe or not noted:
        what = f"{folder} does not say on which text it was calibrated: no recipe.toml and report.json of a run"
        raise AffineQuantError(what, "--drift", NAME_IT)
    sizes = {name: recipe[name] for name in ("samples", "seq_len", "seed")}
    try:
        tokens = calibration_tokens(recipe["data"], tokenizer, **sizes, say=say)
    except AffineQuantError as problem:
        what = f"the calibration text of {folder} is not at hand: {problem.what}"
        raise AffineQuantError(what, problem.where, NAME_IT, exit_code=problem.exit_code) from problem
    if tokens.sha256 != noted.get("sha256"):
        what = f"{recipe['data']} does not give the tokens any more that {folder} was calibrated on"
        raise AffineQuantError(what, "--drift", NAME_IT)
    if len(tokens.ids) < 2 * FEWEST:
        what = f"{folder} was calibrated on {len(tokens.ids)} windows: too few to halve"
        raise AffineQuantError(what, "--drift", NAME_IT, exit_code=PREFLIGHT)
    ids = tokens.ids[: 2 * WINDOWS, :SEQ_LEN]
    return Windows(ids=ids, text=tokens.source, bos="each window" if tokens.bos else "none")


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        found = flat(tomllib.loads((folder / "recipe.toml").read_text()))
    except (OSError, ValueError):
        return {}
    return found if {"data", "samples", "seq_len", "seed"} <= found.keys() else {}


def _noted(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "report.json").read_text())["calibration"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, Mapping) else {}
