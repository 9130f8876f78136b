"""Putting a page on the disk: HTML and Markdown side by side, over no file that is not one of these."""

from dataclasses import dataclass
from pathlib import Path

from affinequant.errors import PREFLIGHT, AffineQuantError, disk_full
from affinequant.report.building import build_page
from affinequant.report.page import Page
from affinequant.report.reading import Sources
from affinequant.run.durable import write_text
from affinequant.run.pages import is_page

HTML = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Where a page is, and what it says."""

    html: Path
    markdown: Path
    page: Page


def target(sources: Sources, out: str | Path = "") -> Path:
    """The HTML file to write: as asked for, else in the run's folder or beside the first file.

    Raises:
        AffineQuantError: no such folder, another kind of file, or one there that is not one of ours.
    """
    path = Path(out).expanduser() if out else sources.place / HTML
    if path.suffix != ".html":
        raise AffineQuantError(f"{path} is no name of an HTML file", "-o", f"call it {path.stem or 'report'}.html")
    if not path.parent.is_dir():
        raise AffineQuantError(f"no such folder: {path.parent}", "-o", "make it first, or name another")
    for one in (path, path.with_suffix(".md")):
        if one.exists() and not is_page(one):
            what = f"{one} is there already, and is no page of ours"
            raise AffineQuantError(what, "-o", "name another file, or move that one away", exit_code=PREFLIGHT)
    return path


def write_report(sources: Sources, out: str | Path = "") -> Written:
    """Write the page as HTML, and as Markdown beside it; a file that is there stays whole until the new one is.

    Raises:
        AffineQuantError: see `target`, `building.build_page`; or the folder cannot be written to.
    """
    from affinequant.report.html import to_html
    from affinequant.report.markdown import to_markdown

    path = target(sources, out)
    page = build_page(sources)
    html, markdown = to_html(page), to_markdown(page)
    try:
        write_text(path, html)
        write_text(path.with_suffix(".md"), markdown)
    except OSError as problem:
        if disk_full(problem):
            raise
        what = f"{path} cannot be written: {problem.strerror}"
        raise AffineQuantError(what, "-o", "name a file in a folder you may write to", exit_code=PREFLIGHT) from None
    return Written(html=path, markdown=path.with_suffix(".md"), page=page)
