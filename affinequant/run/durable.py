"""The one way to write: nothing has its name before it is whole and on the disk."""

import json
import os
import re
from pathlib import Path
from typing import Any

_FLAT = re.compile(r"\[[^\[\]{}\"]*\]")  # a list of plain values, of which no string can hold a line break


def install(temporary: Path, final: Path) -> Path:
    """Give a whole file its name, once it is on the disk."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)
    return final


def write_text(path: Path, text: str) -> Path:
    """Write a text file in one step: readers see the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    return install(temporary, path)


def json_text(value: Any) -> str:
    """JSON for people too: an entry a line, but a list of numbers on one."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return _FLAT.sub(lambda found: re.sub(r"\n *", "", found[0]), text) + "\n"


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
