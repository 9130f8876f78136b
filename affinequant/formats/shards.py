"""Files of a checkpoint folder: safetensors shards as the tensors come.

Nothing is visible under its final name before it is complete and on the disk, and `config.json` comes last: a folder
without one was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.formats.side_files import CARD as CARD
from affinequant.formats.side_files import copy_source as copy_source
from affinequant.run.durable import install as install
from affinequant.run.durable import write_text as write_text

if TYPE_CHECKING:
    from torch import Tensor


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
        return [install(written[0][0], out / f"{stem}.safetensors")]
    files, table = [], {}
    for number, (temporary, names) in enumerate(written, start=1):
        file = install(temporary, out / f"{stem}-{number:05}-of-{len(written):05}.safetensors")
        files.append(file)
        table |= dict.fromkeys(names, file.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    return [*files, write_json(out / f"{stem}.safetensors.index.json", index)]


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file in one step: readers see the old one or the new one."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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


def _umask() -> int:
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    return mask
