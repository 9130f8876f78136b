"""How the pages that are made of a run are known from a person's own files."""

from pathlib import Path

PAGE_MARK = "affinequant report"
"""Stands near the beginning of each."""


def is_page(path: Path) -> bool:
    """Whether a file is such a page, and may be written anew or removed with the run."""
    try:
        if not path.is_file():  # a named pipe would be waited for
            return False
        with path.open("rb") as file:
            return PAGE_MARK.encode() in file.read(400)
    except OSError:
        return False
