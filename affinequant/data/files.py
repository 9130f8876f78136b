"""What a file is, whatever its name says: told by its first bytes, with what to do where it is not what is wanted."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError

HEAD_BYTES = 65536
"""So many bytes are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of file that is not plain UTF-8 text. `advice` may name the file as {name} and what to write as {out}."""

    about: str
    advice: str


_UNPACK = "unpack it first, e.g. {tool} {{name}}"
_COLUMN = 'write its column of text to a .jsonl file, one {{"text": "..."}} a line'
_EXPORT = "export it as plain text (.txt)"
_ICONV = "convert it: iconv -f {encoding} -t utf-8 {{name}} > {{out}}"


def _packed(about: str, tool: str) -> Kind:
    return Kind(about=about, advice=_UNPACK.format(tool=tool))


def _encoded(about: str, encoding: str) -> Kind:
    return Kind(about=f"{about} text, not UTF-8", advice=_ICONV.format(encoding=encoding))


POINTER = Kind(
    about="a Git LFS pointer, not the file itself",
    advice="fetch the files themselves: run `git lfs pull` in that folder",
)
TABLE = Kind(about="a table", advice=_COLUMN)
DOCUMENT = Kind(about="a formatted document", advice=_EXPORT)
MARKUP = Kind(about="markup", advice="take the text out of it and write that to a .txt file")
BINARY = Kind(about="binary, not text", advice="give plain UTF-8 text (.txt), or rows of it (.jsonl)")
JSON_VALUE = Kind(about="one JSON value", advice='write one object a line, {{"text": "..."}}, and name the file .jsonl')
JSON_LINES = Kind(about="JSON, an object a line", advice="name it .jsonl; each object needs a string field `text`")

_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"version https://git-lfs.github.com/spec/", POINTER),
    (b"\x1f\x8b", _packed("gzip-compressed", "gunzip")),
    (b"BZh", _packed("bzip2-compressed", "bunzip2")),
    (b"\xfd7zXZ\x00", _packed("xz-compressed", "unxz")),
    (b"\x28\xb5\x2f\xfd", _packed("zstd-compressed", "unzstd")),
    (b"\x04\x22\x4d\x18", _packed("lz4-compressed", "unlz4")),
    (b"7z\xbc\xaf\x27\x1c", _packed("a 7z archive", "7z x")),
    (b"PK\x03\x04", _packed("a zip archive", "unzip")),
    (b"PAR1", TABLE),
    (b"ARROW1", TABLE),
    (b"FEA1", TABLE),
    (b"ORC", TABLE),
    (b"Obj\x01", TABLE),
    (b"SQLite format 3\x00", TABLE),
    (b"%PDF-", DOCUMENT),
    (b"{\\rtf", DOCUMENT),
    (b"\xd0\xcf\x11\xe0", DOCUMENT),
    (b"\xff\xfe\x00\x00", _encoded("UTF-32", "utf-32")),
    (b"\x00\x00\xfe\xff", _encoded("UTF-32", "utf-32")),
    (b"\xff\xfe", _encoded("UTF-16", "utf-16")),
    (b"\xfe\xff", _encoded("UTF-16", "utf-16")),
)
"""Longer beginnings before those that they begin with."""


def sniff(head: bytes) -> Kind | None:
    """What a file that begins so is, or None where nothing speaks against plain UTF-8 text."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if b"\x00" not in head:
        return None
    # Without a byte order mark: the letters of most languages' spaces and signs have a byte of zero at one side.
    for offset, encoding in ((1, "utf-16le"), (0, "utf-16be")):
        side = head[offset::2]
        if side.count(0) > len(side) // 4 and head.count(0) <= side.count(0) + len(head) // 64:
            return _encoded("UTF-16", encoding)
    return BINARY


def kind_of(path: Path) -> Kind | None:
    """`sniff` of a file on disk.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return sniff(file.read(HEAD_BYTES))


def refuse(path: Path, kind: Kind, where: str, *, exit_code: int) -> AffineQuantError:
    """The error for a file of that kind in the place of another."""
    out = re.sub(r"[^\w.-]", "_", path.name)
    fix = kind.advice.format(name=shlex.quote(str(path)), out=f"utf8-{out}")
    return AffineQuantError(f"{path.name} is {kind.about}", where, fix, exit_code=exit_code)


def check_pointer(path: Path) -> None:
    """Refuse a file of a model of which only Git LFS's pointer is there.

    Raises:
        AffineQuantError: it is one (exit 3), or it cannot be read (exit 3).
    """
    try:
        kind = kind_of(path)
    except OSError as problem:
        raise _unreadable(path, problem) from None
    if kind is POINTER:
        raise refuse(path, POINTER, str(path), exit_code=PREFLIGHT)


def read_table(path: Path, *, exit_code: int = PREFLIGHT) -> dict[str, Any]:
    """A JSON file of a model that holds one object.

    Raises:
        AffineQuantError: it cannot be read, is a Git LFS pointer (both exit 3), is not JSON or holds something else.
    """
    check_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise _unreadable(path, problem) from None
    except (ValueError, RecursionError) as problem:
        cause = str(problem).splitlines()[0]
        fix = "it may be cut short: download that file again"
        raise AffineQuantError(f"{path.name} is not JSON: {cause}", str(path), fix, exit_code=exit_code) from None
    if not isinstance(value, dict):
        what = f"{path.name} is not a table"
        raise AffineQuantError(what, str(path), "download that file again", exit_code=exit_code)
    return value


def first_line(problem: BaseException) -> str:
    """An exception of another package in one line."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__


def _unreadable(path: Path, problem: OSError) -> AffineQuantError:
    what = f"cannot read {path.name}: {problem.strerror}"
    return AffineQuantError(what, str(path), "make it readable", exit_code=PREFLIGHT)
