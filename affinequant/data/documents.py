"""Documents out of files of text: plain ones and rows of JSON, and what to do with every other kind."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from affinequant.data.files import (
    BINARY,
    DOCUMENT,
    HEAD_BYTES,
    JSON_LINES,
    JSON_VALUE,
    MARKUP,
    TABLE,
    Kind,
    kind_of,
    refuse,
)
from affinequant.errors import AffineQuantError

ROWS = (".jsonl", ".ndjson", ".jsonlines")
"""Suffixes, in whatever case, of one JSON object a line."""
_PROSE = "txt text md markdown rst adoc org tex log raw tokens"
_CODE = "py pyi c h cc cpp hpp cu java js ts go rs rb sh pl lua jl r swift kt scala hs ml sql lisp el cs php"
PLAIN = frozenset(["", *(f".{suffix}" for suffix in (*_PROSE.split(), *_CODE.split()))])
"""Suffixes of what is read as it stands, once its first bytes say that it is text. Source code is text too."""
IN_FOLDERS = (".txt", *ROWS)
"""Suffixes of what is read out of a folder."""

_PACKED = Kind(about="compressed", advice="unpack it first, and give the .txt or .jsonl file in it")
_SETTINGS = Kind(about="settings, not prose", advice="give plain UTF-8 text (.txt), or rows of it (.jsonl)")
_REFUSED: dict[Kind, str] = {
    TABLE: "csv tsv psv parquet arrow feather orc avro xls xlsx ods db sqlite sqlite3 pkl npy npz h5 hdf5",
    JSON_VALUE: "json json5 geojson ipynb",
    _PACKED: "gz tgz bz2 xz zst lz4 zip 7z rar tar z",
    MARKUP: "html htm xhtml xml svg rss srt vtt",
    DOCUMENT: "pdf doc docx odt rtf epub mobi ppt pptx odp djvu ps",
    _SETTINGS: "yaml yml toml ini cfg",
    BINARY: "bin safetensors gguf pt pth exe so jpg jpeg png gif mp3 mp4 wav",
}
REFUSED = {f".{suffix}": kind for kind, suffixes in _REFUSED.items() for suffix in suffixes.split()}
"""Suffixes of what has a syntax of its own, which would be calibrated on as if it were prose."""

_LONE = re.compile("[\ud800-\udfff]")


def documents(path: Path, most: int, flag: str) -> Iterator[str]:
    """The text of a plain file, cut to `most` characters and one more, or the field `text` of each row.

    Half of a surrogate pair (an emoji cut in two), which no tokenizer can take, becomes U+FFFD.

    Raises:
        AffineQuantError: a kind of file that is not read, or one that is not what its name says (exit 2).
    """
    where, suffix = f"{flag} {path}", path.suffix.lower()
    try:
        _check_kind(path, suffix, where)
        with path.open(encoding="utf-8-sig") as lines:
            if suffix not in ROWS:
                yield _plain(lines.read(most + 1), path, where)
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row_text(line, f"{where}, line {number}")
    except UnicodeDecodeError as problem:
        fix = f"find out its encoding (`file -i {path.name}` guesses it), then iconv -f ENCODING -t utf-8 {path.name}"
        what = f"{path} is not UTF-8 text: {problem.reason}"
        raise AffineQuantError(what, where, f"{fix} > utf8-{path.name}") from None
    except OSError as problem:
        raise AffineQuantError(f"cannot read {path}: {problem.strerror}", where, "make it readable") from None


def _check_kind(path: Path, suffix: str, where: str) -> None:
    # The first bytes know better than a name.
    kind = kind_of(path) or REFUSED.get(suffix)
    if kind is not None:
        raise refuse(path, kind, where, exit_code=2)
    if suffix not in PLAIN and suffix not in ROWS:
        what = f"no kind of text is known by the suffix {path.suffix!r}"
        raise AffineQuantError(what, where, "if it is plain UTF-8 text, give it a name that ends in .txt")


def _plain(text: str, path: Path, where: str) -> str:
    if "\x00" in text:
        raise refuse(path, BINARY, where, exit_code=2)
    start = text.lstrip()[:HEAD_BYTES]
    if start.startswith("{") and _is_object(start.split("\n", 1)[0]):
        raise refuse(path, JSON_LINES, where, exit_code=2)
    return text


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _row_text(line: str, where: str) -> str:
    fix = 'write one whole JSON object a line: {"text": "..."}'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise AffineQuantError(f"not JSON: {problem}", where, fix) from None
    if not isinstance(row, dict):
        raise AffineQuantError("no string field 'text': the line is no object with fields", where, fix)
    if "text" not in row:
        has = f"has {', '.join(map(repr, row))}" if row else "has no fields"
        raise AffineQuantError(f"no string field 'text': the line {has}", where, fix)
    text = row["text"]
    if not isinstance(text, str):
        raise AffineQuantError(f"no string field 'text': it is {json.dumps(text)[:40]} there", where, fix)
    return _LONE.sub("\ufffd", text)
