"""Whether models fit into memory together: arithmetic on what their folders hold, before anything is read."""

import math
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from affinequant.models.device import compute_device, compute_dtype
from affinequant.models.source import open_source
from affinequant.recipe.recipe import Device, Dtype
from affinequant_evals.logits import BUDGET

ROOM = 4 * 2**30 + BUDGET
"""Left free: hidden states, attention, the logits of texts and of a task's prompts, and what else the machine does."""
PACKED_PER_BYTE = 2
"""Weights in a byte of integers, at least for those that are held unpacked."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_CGROUP = Path("/sys/fs/cgroup")


def fit_together(folders: Sequence[Path], *, device: Device = "auto", dtype: Dtype = "auto") -> bool:
    """Whether all of these models can be in memory at once, with room left to compute."""
    target = compute_device(device)
    width = compute_dtype(dtype, target).itemsize
    return sum(weight_bytes(folder, width) for folder in folders) + ROOM <= available_bytes(target)


def weight_bytes(folder: Path, width: int) -> int:
    """Most that a folder's weights take in memory where a number takes `width` bytes: integers count as if they were
    unpacked, which of those that are computed on is too much."""
    total = 0
    for entry in open_source(folder).entries.values():
        numbers = entry.size * PACKED_PER_BYTE if entry.dtype not in _FLOATS else math.prod(entry.shape)
        total += numbers * width
    return total


def available_bytes(device: torch.device) -> int:
    """Memory that could be taken there now: of a GPU, or of the machine within the limit of a container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(psutil.virtual_memory().available, _left_in_container()))


def _left_in_container() -> float:
    """What a limit of this control group leaves; the page cache gives way and does not count."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        fields = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return math.inf if limit == "max" else int(limit) - int(fields["anon"])
    except (OSError, ValueError, KeyError):  # no such group, or another kind of system
        return math.inf
