"""Which files of a folder are the model: transformers' own order, and nothing outside the folder."""

import contextlib
import itertools
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affinequant.data.files import check_pointer
from affinequant.errors import PREFLIGHT, AffineQuantError

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
INDEX = ".safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_CHUNK = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a tensor is and what it looks like, from its file's header. `file` is relative to the folder, `key` the
    tensor's name in that file, `start` where its bytes begin. Of a tensor that is stacked there with others `piece` is its place
    among them, its first row in it and the first behind."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    piece: tuple[int, int, int] | None = None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)


def find_weights(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """The model's tensors by name, and what has been left out, in words.

    The model is the file that the config names (`transformers_weights`), or `model.safetensors`, or the shards of
    `model.safetensors.index.json`, where each tensor is read from the file that the index gives it. Of a checkpoint
    with transforms that act at run time the files are called `affinequant`.

    Raises:
        AffineQuantError: weights that are missing, cut short, only in pickle files, outside the folder, or there twice.
    """
    check_adapter(folder)
    declared = config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    named = config.get("transformers_weights")
    if named is not None and not str(named).endswith((".safetensors", INDEX)):
        raise broken(f"config.json names {named!r} as its weights, which is no safetensors file", folder)
    transformed = isinstance(declared, Mapping) and "transform_config" in declared and any(folder.glob("affinequant*"))
    stem = "affinequant" if method == "affinequant" or transformed else "model"
    single, index = folder / (named or f"{stem}.safetensors"), folder / f"{stem}{INDEX}"
    if str(named).endswith(INDEX):
        single, index = folder / f"{named}.none", folder / str(named)
    notes: list[str] = []
    if is_there(single):
        if named is None and is_there(index) and (shards := {*_weight_map(index).values()} - {single.name}):
            raise AffineQuantError(
                f"two sets of weights: {single.name}, and {index.name} with {_few(shards)}",
                str(folder),
                "keep the one that is the model, and move the other out of the folder",
                exit_code=PREFLIGHT,
            )
        entries = _header(folder, _relative(single, folder))
    elif is_there(index):
        entries = _indexed(folder, index, notes)
    else:
        raise _none_found(folder, stem)
    used = {entry.file for entry in entries.values()}
    others = [path.name for path in sorted(folder.glob("*.safetensors")) if path.name not in used]
    notes += _left_out(folder, others, entries, single.name if used == {single.name} else index.name)
    return entries, tuple(notes)


def check_adapter(folder: Path) -> None:
    """Refuse a folder with a LoRA adapter in it: with peft installed transformers would add it, others would not.

    Raises:
        AffineQuantError: with the base model, where the adapter names it, and how to merge.
    """
    found = [name for name in _ADAPTER if is_there(folder / name)]
    if not found:
        return
    base = "its base model"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or base
    beside = " beside the weights" if any(is_there(folder / f"model{end}") for end in (".safetensors", INDEX)) else ""
    raise AffineQuantError(
        f"this folder holds a LoRA adapter ({', '.join(found)}){beside}, which is no model by itself",
        str(folder),
        f"merge it into {base} first: peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(MERGED)" + ("; or move the adapter out of the folder" if beside else ""),
        exit_code=PREFLIGHT,
    )


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that lies outside of the folder, `..` and links followed.

    Raises:
        AffineQuantError: with where it lies.
    """
    if not is_inside(path, folder):
        raise AffineQuantError(
            f"{path.relative_to(folder)} lies outside of the model's folder: {path.resolve()}",
            str(folder),
            "put a copy of the file into the folder, if it is yours",
            exit_code=PREFLIGHT,
        )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder, links followed; a hub's cache keeps what its snapshots link to in `blobs`."""
    real, home = path.resolve(), folder.resolve()
    caches = [up.parent / "blobs" for up in (home, *home.parents) if _is_snapshots(up)]
    return any(real.is_relative_to(root) for root in (home, *caches))


def revision(folder: Path) -> str | None:
    """The commit of a hub's snapshot; None for any other folder."""
    real = folder.resolve()
    return real.name if _is_snapshots(real.parent) else None


def same_bytes(folder: Path, one: Entry, two: Entry) -> bool:
    """Whether two tensors are the same on disk."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    with (folder / one.file).open("rb") as first, (folder / two.file).open("rb") as second:
        first.seek(one.start)
        second.seek(two.start)
        steps = itertools.chain(itertools.repeat(_CHUNK, one.size // _CHUNK), [one.size % _CHUNK])
        return all(first.read(step) == second.read(step) for step in steps)


def broken(what: str, where: Path) -> AffineQuantError:
    """The error for files that cannot be what was published."""
    return AffineQuantError(what, str(where), "download the model again", exit_code=PREFLIGHT)


def is_there(path: Path) -> bool:
    """Whether something of that name is in its folder: a file, or a link whatever becomes of it."""
    return path.is_file() or path.is_symlink()


def _is_snapshots(folder: Path) -> bool:
    return folder.name == "snapshots" and folder.parent.name.startswith("models--")


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.relative_to(folder).as_posix()
    except ValueError:
        raise AffineQuantError(
            f"{path} lies outside of the model's folder", str(folder), "put a copy of it there", exit_code=PREFLIGHT
        ) from None


def _weight_map(index: Path) -> dict[str, str]:
    """The table of an index: tensor -> file within the folder."""
    check_inside(index, index.parent)
    try:
        table = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise broken("the shard index cannot be read", index) from None
    if not table or not all(isinstance(file, str) and file for file in table.values()):
        raise broken("the shard index cannot be read", index)
    return table


def _indexed(folder: Path, index: Path, notes: list[str]) -> dict[str, Entry]:
    """Each tensor from the file that the index gives it."""
    table = _weight_map(index)
    headers = {file: _header(folder, file) for file in sorted({*table.values()})}
    absent = next((name for name, file in table.items() if name not in headers[file]), None)
    if absent is not None:
        raise broken(f"tensor {absent} is missing: {index.name} says that it is in {table[absent]}", folder)
    stale = [(name, file) for file, header in headers.items() for name in header if table.get(name) != file]
    if stale:
        name, file = stale[0]
        notes.append(
            f"left out: {len(stale)} tensors that {index.name} does not give to their file, as {name} in {file}"
        )
    return {name: headers[file][name] for name, file in table.items()}


def _left_out(folder: Path, others: Iterable[str], entries: Mapping[str, Entry], used: str) -> list[str]:
    """What is said of other files of weights. One that holds tensors of the model is a second candidate."""
    notes = []
    for name in others:
        try:
            twice = next((tensor for tensor in _header(folder, name) if tensor in entries), None)
        except AffineQuantError:
            twice = None
        if twice is not None and revision(folder) is None:
            raise AffineQuantError(
                f"two sets of weights: {twice} is in {name} too, beside {used}",
                str(folder),
                f"move {name} out of the folder, or give it the name model.safetensors if it is the model",
                exit_code=PREFLIGHT,
            )
        notes.append(f"left out: {name}, which is not the model; {used} is")
    return notes


def _none_found(folder: Path, stem: str) -> AffineQuantError:
    wanted = f"{stem}.safetensors or {stem}{INDEX}"
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return AffineQuantError(
            f"{folder} holds no {wanted}, the names that are read, but {_few(others)}",
            "MODEL",
            f"download the index too, or call the file {stem}.safetensors if it is the model",
            exit_code=PREFLIGHT,
        )
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        return AffineQuantError(
            f"weights are only in pickle files ({', '.join(pickles[:3])}), which can run code when read",
            str(folder),
            "convert them once, in a sandbox if they are not yours: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\"",
            exit_code=PREFLIGHT,
        )
    return AffineQuantError(
        f"{folder} holds no weights ({wanted})", "MODEL", "download the model's weights", exit_code=PREFLIGHT
    )


def _header(folder: Path, file: str) -> dict[str, Entry]:
    path = folder / file
    if path.is_absolute() and not path.is_relative_to(folder):
        raise broken(f"{file} lies outside of the model's folder", folder)
    check_inside(path, folder)
    if not path.is_file():
        raise broken(f"shard {file} is missing", path.parent)
    check_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise broken(f"{path.name} is cut short: its header is not whole", path)
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            entries = {
                name: Entry(
                    file=file,
                    key=name,
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                    start=8 + length + entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise broken(f"{path.name} is not a safetensors file", path) from None
    if size != 8 + length + end:
        raise broken(f"{path.name} is cut short: {size:,} bytes of {8 + length + end:,}", path)
    return entries


def _few(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
