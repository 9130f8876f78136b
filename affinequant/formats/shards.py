"""Files of a checkpoint folder: safetensors shards as the tensors come, and what is copied from the source.

Nothing is visible under its final name before it is complete and on the disk, and `config.json` comes last: a folder
without one was interrupted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".ot")
OWN = ("config.json", "recipe.toml", "report.json", "report.html")
"""Names that this package writes itself, so a source's file of that name is not copied."""
CARD = "README.md"


def write_shards(
    stages: Iterable[dict[str, Tensor]], out: Path, *, shard_bytes: int, stem: str = "model"
) -> list[Path]:
    """Write tensors to `STEM.safetensors`, or to numbered shards and an index where they exceed `shard_bytes`.

    Holds one stage and at most one shard in memory. The same tensors give the same bytes.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for pattern in (f"{stem}.safetensors*", f"{stem}-*.safetensors*"):
        for stale in out.glob(pattern):  # of an earlier or interrupted write, perhaps with another number of shards
            stale.unlink()
    written: list[tuple[Path, list[str]]] = []
    total = 0
    for tensors in _batches(stages, shard_bytes):
        temporary = out / f"{stem}-{len(written) + 1:05}.safetensors.tmp"
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o666 & ~_umask())  # safetensors keeps its files to the owner
        total += sum(tensor.nbytes for tensor in tensors.values())
        written.append((temporary, list(tensors)))
    if len(written) == 1:
        return [publish(written[0][0], out / f"{stem}.safetensors")]
    files, table = [], {}
    for number, (temporary, names) in enumerate(written, start=1):
        file = publish(temporary, out / f"{stem}-{number:05}-of-{len(written):05}.safetensors")
        files.append(file)
        table |= dict.fromkeys(names, file.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    return [*files, write_json(out / f"{stem}.safetensors.index.json", index)]


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file in one step: readers see the old one or the new one."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a text file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    return publish(temporary, path)


def copy_source(source: Path, out: Path) -> list[Path]:
    """Copy every file of the source folder that holds no weights; its README becomes `SOURCE_README.md`.

    Raises:
        OSError: a file cannot be read or written.
    """
    copied = []
    for file in _other_files(source, skip=out):
        name = file.relative_to(source)
        renamed = file.parent == source and re.fullmatch(rf"(SOURCE_)*{re.escape(CARD)}", file.name)
        target = out / (f"SOURCE_{name}" if renamed else name)  # makes room for our own; so a source may be one of ours
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        shutil.copyfile(file, temporary)
        copied.append(publish(temporary, target))
    return copied


def _batches(stages: Iterable[dict[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    pending: dict[str, Tensor] = {}
    size = 0
    for stage in stages:
        for name, tensor in stage.items():
            if pending and size + tensor.nbytes > shard_bytes:
                yield pending
                pending, size = {}, 0
            pending[name] = tensor.detach().cpu().contiguous()
            size += tensor.nbytes
    if pending:
        yield pending


def _other_files(source: Path, *, skip: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(source):
        # Hidden folders are caches and version control. The output may lie inside the source.
        folders[:] = [name for name in folders if name[0] != "." and (Path(root) / name).resolve() != skip.resolve()]
        for name in names:
            file = Path(root) / name
            weights = file.suffix in WEIGHTS or name.endswith(".index.json")
            own = file.parent == source and name in OWN
            if not (weights or own or name.startswith(".")):
                found.append(file)
    return sorted(found)


def _umask() -> int:
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    return mask


def publish(temporary: Path, final: Path) -> Path:
    """Give a whole file its name, once it is on the disk."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return final
