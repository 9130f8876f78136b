"""What a page is made from: folders and JSON files, told apart by what is in them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError

Object = Mapping[str, Any]
REPORT, FAILED, COMPARISON = "report.json", "report.failed.json", "compare.json"
GIVE = "give an output folder of ours, or what `affinequant eval`, `compare` or a research run wrote as JSON"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A run that quantised: its report, and what else of its folder is shown where it is there.

    Attributes:
        folder: where it lies, or lay when it said so.
        failed: it did not pass its verification.
        config: of the checkpoint; empty where there is none.
        recipe: recipe.toml as it is, or "".
    """

    folder: Path
    report: Object
    failed: bool = False
    config: Object = field(default_factory=dict)
    recipe: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Everything that one page is about. `place`: the folder in which the page is put where nothing else was said."""

    place: Path
    made: Made | None = None
    scores: tuple[Object, ...] = ()
    comparison: Object | None = None
    research: Object | None = None


def read_sources(paths: Sequence[str | Path]) -> Sources:
    """Read folders and files, and see that they belong together.

    Raises:
        AffineQuantError: one that is missing, half written or nothing of ours; or several that are about different things.
    """
    found = Sources(place=Path())
    for number, typed in enumerate(paths):
        path = Path(os.path.expanduser(typed))
        one = _folder(path) if path.is_dir() else _file(path)
        found = one if number == 0 else _together(found, one, path)
    if found.made:
        check_same(found.made, found.scores)
    return found


def check_same(made: Made, scores: Sequence[Object]) -> None:
    """See that the scores are of this checkpoint: of its folder, or of one with its name where folders were moved.

    Raises:
        AffineQuantError: they are of another.
    """
    for one in scores:
        scored = Path(os.path.expanduser(str(one["checkpoint"])))
        if scored.resolve() != made.folder.resolve() and scored.resolve().name != made.folder.resolve().name:
            what = f"the scores are of {one['checkpoint']}, not of {made.folder}"
            raise AffineQuantError(what, "RUN|EVAL", "give the run that they are of, or the scores alone")


def _folder(path: Path) -> Sources:
    if (path / REPORT).is_file():
        report = _read(path / REPORT)
        if "blocks" in report or "exported_from" in report:
            return Sources(place=path, made=_made(path, report))
        return _known(report, path / REPORT, path)
    if (path / FAILED).is_file():
        return Sources(place=path, made=_made(path, _read(path / FAILED), failed=True))
    if (path / COMPARISON).is_file():
        return _known(_read(path / COMPARISON), path / COMPARISON, path)
    if (path / ".run").is_dir():
        fix = "the command that made it goes on when it is typed again; `affinequant inspect` shows it"
        raise AffineQuantError("this run has not finished, and has no report yet", str(path), fix)
    raise AffineQuantError(f"there is no {REPORT} in {path}", "RUN|EVAL", GIVE)


def _file(path: Path) -> Sources:
    if not path.exists():
        raise AffineQuantError(f"no such file or folder: {path}", "RUN|EVAL", GIVE)
    if path.name in (REPORT, FAILED):
        return _folder_or(_read(path), path)
    return _known(_read(path), path, path.absolute().parent)


def _folder_or(report: Object, path: Path) -> Sources:
    """A report by its own name stands for its folder."""
    if "blocks" in report or "exported_from" in report:
        made = _made(path.absolute().parent, report, failed=path.name == FAILED)
        return Sources(place=made.folder, made=made)
    return _known(report, path, path.absolute().parent)


def _known(value: Object, path: Path, place: Path) -> Sources:
    """Which of the JSON objects that this package writes it is."""
    if isinstance(value.get("metrics"), dict) and "checkpoint" in value:
        return Sources(place=place, scores=(value,))
    if isinstance(value.get("presets"), list) and "full_precision" in value:
        return Sources(place=place, comparison=value)
    if isinstance(value.get("report"), dict) and "path" in value:  # what quantize, demo and research print with --json
        if "blocks" not in value["report"]:
            return _known(value["report"], path, place)
        scores = (value["scores"],) if isinstance(value.get("scores"), dict) else ()
        folder = Path(value["path"])
        made = _made(folder, value["report"]) if folder.is_dir() else Made(folder=folder, report=value["report"])
        return Sources(place=place, made=made, scores=scores)
    if "blocks" in value and "scheme" in value:
        return Sources(place=place, made=Made(folder=place, report=value))
    if "title" in value and any(name in value for name in ("verdict", "facts", "tables", "figures")):
        return Sources(place=place, research=value)
    if isinstance(value.get("error"), dict):
        what = f"{path.name} holds the error of a command: {value['error'].get('what', '?')}"
        raise AffineQuantError(what, str(path), "run that command again, and give what it prints then")
    raise AffineQuantError(f"{path.name} is no report and no scores of ours", str(path), GIVE, exit_code=PREFLIGHT)


def _made(folder: Path, report: Object, *, failed: bool = False) -> Made:
    config = _read(folder / "config.json") if (folder / "config.json").is_file() else {}
    recipe = folder / "recipe.toml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    return Made(folder=folder, report=report, failed=failed, config=config, recipe=text)


def _together(first: Sources, other: Sources, path: Path) -> Sources:
    """One page of both; where the run lies, the page lies."""
    kinds = [bool(one.comparison or one.research) for one in (first, other)]
    if any(kinds) or (first.made and other.made):
        what = f"{path} does not go onto the same page: a page is about one run and its scores"
        raise AffineQuantError(
            what, "RUN|EVAL", "write a page for each; `affinequant compare` puts presets side by side"
        )
    place = other.place if other.made else first.place
    return Sources(place=place, made=first.made or other.made, scores=(*first.scores, *other.scores))


def _read(path: Path) -> Object:
    """A JSON object.

    Raises:
        AffineQuantError: there is none in the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise AffineQuantError(
            f"{path.name} cannot be read: {problem.strerror}", str(path), "give one that can be", exit_code=PREFLIGHT
        ) from None
    except ValueError as problem:
        what = f"{path.name} is no JSON, or was cut short: {problem}"
        raise AffineQuantError(what, str(path), GIVE, exit_code=PREFLIGHT) from None
    if not isinstance(value, dict):
        raise AffineQuantError(f"{path.name} holds no JSON object", str(path), GIVE, exit_code=PREFLIGHT)
    return value
