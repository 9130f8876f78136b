"""What surrounds a measurement: versions, the machine, and the random state that each starts from."""

import importlib.metadata
import os
import platform
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def environment() -> dict[str, Any]:
    """Versions and machine, as they belong to every result."""
    packages = ("affinequant", "torch", "transformers", "compressed-tensors", "datasets", "lm_eval")
    versions = {name: version for name in packages if (version := package_version(name))}
    return versions | {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
    }


def package_version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def fixed_seeds(seed: int = 0) -> Iterator[None]:
    """Every metric starts from the same random state, and leaves the caller's as it was."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    state = random.getstate(), numpy and numpy.random.get_state(), torch and torch.random.get_rng_state()
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed)
    if torch:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        if numpy:
            numpy.random.set_state(state[1])
        if torch:
            torch.random.set_rng_state(state[2])
