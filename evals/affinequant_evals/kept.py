"""Scores are kept: under the content of what was scored, on what, how, on what kind of machine and by which versions.

In `scores` of the cache folder, or in $AFFINEQUANT_SCORES, lie `subjects/HASH`, a `Run` with the metrics of one subject;
`cards/HASH`, whole scorecards by a checkpoint's content; and `content`, hashes of files by what tells one file from another.
All of it may be deleted.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import affinequant_kernels
import torch

import affinequant
import affinequant_evals
from affinequant.data.wheels import Say, cache_folder, quiet
from affinequant.models.device import compute_device, compute_dtype
from affinequant.models.source import Source, open_source, read_through
from affinequant.recipe.recipe import Device, Dtype
from affinequant.run.durable import write_text
from affinequant.run.run import Run
from affinequant_evals.environment import package_version
from affinequant_evals.harness import Scorecard, fingerprint_hash

SETTLED = 2.0
"""A file that was changed less than so many seconds ago may be changed again within one tick of its clock."""
MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*_tokens*.json",
    "*.model",
    "*.tiktoken",
    "*chat_template*",
    "*/*.jinja",
)
"""Beside the weights, all that a scored model and its tokenizer are made from."""
VERSIONS = ("affinequant", "torch", "transformers", "tokenizers", "compressed-tensors", "triton", "lm_eval", "vllm")
SETTINGS = ("AFFQ_", "ONEDNN_", "ATEN_", "TRITON_INTERPRET")
"""Beginnings of variables that choose other arithmetic."""


def scores_folder() -> Path:
    """Where scores are kept. Not created here."""
    chosen = os.environ.get("AFFINEQUANT_SCORES")
    return Path(chosen).expanduser() if chosen else cache_folder() / "scores"


def content_of(folder: Path, say: Say = quiet) -> dict[str, str]:
    """Hashes that tell a model folder's content from another's: of its weights, its settings and its tokenizer.

    Weights are read once. Their hash is remembered by the files' devices, inodes, sizes and times, that of the last
    change of the inode among them, which nobody can set back, as git does it.

    Raises:
        AffineQuantError: the folder holds no model (see `open_source`).
    """
    return {
        "weights": _weights(open_source(folder), say),
        "settings": _files(folder, MODEL_FILES),
        "tokenizer": _files(folder, TOKENIZER_FILES),
    }


def context_of(
    folder: Path, tokenizer: Path, *, device: Device, dtype: Dtype, say: Say = quiet, **how: Any
) -> dict[str, Any]:
    """All that decides a subject's scores beside what a metric says of itself: a run's fingerprint.

    Args:
        tokenizer: the folder of the tokenizer that cuts the prompts, which a baseline has from the checkpoint.
        how: whatever else, e.g. the backend, as plain JSON values.
    """
    target = compute_device(device)
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "subject": content_of(folder, say),
        "tokenizer": _files(tokenizer, TOKENIZER_FILES),
        "device": f"cuda:{torch.cuda.current_device()}" if target.type == "cuda" else target.type,
        "machine": torch.cuda.get_device_name() if target.type == "cuda" else cpu,
        "dtype": str(compute_dtype(dtype, target)).removeprefix("torch."),
        "versions": {name: package_version(name) for name in VERSIONS} | {"code": _code()},
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
        **how,
    }


def can_keep(say: Say = quiet) -> bool:
    """Whether scores can be kept at all, e.g. in a container without a home; if not, that is said."""
    try:
        (scores_folder() / "subjects").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scores_folder() / "subjects"):
            return True
    except OSError as problem:
        say(f"scores are not kept: {problem}")
        return False


@contextlib.contextmanager
def open_scores(context: Mapping[str, Any], say: Say = quiet) -> Iterator[Run | None]:
    """The run that keeps the scores of one subject, which no other process may use meanwhile: it waits. None where
    nothing can be kept, which is said."""
    with contextlib.ExitStack() as stack:
        try:
            folder = scores_folder() / "subjects" / fingerprint_hash(context)
            folder.mkdir(parents=True, exist_ok=True)
            _lock(stack.enter_context((folder / "lock").open("a")), say)
            run = Run.open(folder, context)
        except OSError as problem:
            say(f"scores are not kept: {problem}")
            run = None
        yield run


def keep_card(folder: Path, card: Scorecard) -> None:
    """Put a whole scorecard beside the content of the folder that it is about; without room it is not kept."""
    value = card.to_json()
    same = {name: value[name] for name in value if name not in ("notes", "seconds")} | {
        "metrics": _bare(value["metrics"])
    }
    with contextlib.suppress(OSError):
        place = _cards(folder)
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{fingerprint_hash(same)}.json"
        if not path.exists():  # told again, it is no newer
            write_text(path, json.dumps(value, indent=1))


def kept_cards(folder: Path) -> list[dict[str, Any]]:
    """The scorecards of a checkpoint, as `Scorecard.to_json` gave them, newest first; none of what other bytes scored.

    Raises:
        AffineQuantError: the folder holds no model.
    """
    cards = []
    for path in sorted(_cards(folder).glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            cards.append(json.loads(path.read_text()))
    return cards


def _cards(folder: Path) -> Path:
    return scores_folder() / "cards" / fingerprint_hash(content_of(folder))


def _bare(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: {key: value for key, value in entry.items() if key != "kept"} for name, entry in metrics.items()}


def _lock(handle: IO[str], say: Say) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process scores this model: waiting for it, to use what it finds")
        fcntl.flock(handle, fcntl.LOCK_EX)


def _weights(source: Source, say: Say) -> str:
    began = time.time()
    before = _stamps(source)
    table = {name: [entry.file, entry.key] for name, entry in source.entries.items()}
    path = scores_folder() / "content" / f"{fingerprint_hash({'files': before, 'tensors': table})}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["weights"])
    found = read_through(source, say, finite=False)["weights"]
    changed = max(time_ns for stamp in before.values() for time_ns in stamp[-2:]) / 1e9
    if began - changed > SETTLED and before == _stamps(source):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"weights": found, "folder": str(source.folder.absolute())}))
    return found


def _stamps(source: Source) -> dict[str, list[int]]:
    """What tells a file from another and from itself before it was changed; what a link points to, not the link."""
    found = {}
    for file in sorted({entry.file for entry in source.entries.values()}):
        stat = (source.folder / file).stat()
        found[file] = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return found


def _files(folder: Path, patterns: tuple[str, ...]) -> str:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    sums = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
    return fingerprint_hash(sums)


@functools.cache
def _code() -> str:
    """Of this package itself: in a clone, code changes and the version does not."""
    sums = {}
    for package in (affinequant_kernels, affinequant, affinequant_evals):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".c") and path.relative_to(root).parts[0] not in ("cli", "report"):
                sums[f"{root.name}/{path.relative_to(root)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return fingerprint_hash(sums)
