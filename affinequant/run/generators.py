"""Where the random generators are that anyone may draw from: part of what a run must remember to give the same bytes."""

import sys
from collections.abc import Mapping
from typing import Any

import torch


def generator_states() -> dict[str, Any]:
    """The states of torch's global generators, and of numpy's where someone has imported it, as tensors and plain
    values."""
    cuda, numbers = torch.cuda.is_initialized(), sys.modules.get("numpy")
    numpy: list[Any] = list(numbers.random.get_state()) if numbers else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "numpy": [part.tolist() if hasattr(part, "tolist") else part for part in numpy],
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """Put the generators where they were."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["numpy"]:
        import numpy

        numpy.random.set_state(tuple(states["numpy"]))
