"""Pictures of digits: scikit-learn's 8 x 8, or MNIST out of a folder."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant_research.grokalign.training import Batch

MNIST = {"train": "train", "test": "t10k"}
MAGIC = {16: 2051, 8: 2049}
"""Length of an idx file's header, of pictures and of labels -> the number that it begins with."""
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


def digits(folder: str, train: int, test: int, seed: int, dtype: torch.dtype) -> tuple[Batch, Batch]:
    """(train, test): pictures [n, pixels], normalised by one mean and deviation, and their labels.

    Without a folder scikit-learn's 1797 digits, split at random by the seed; with one the first of MNIST's own halves.

    Raises:
        AffineQuantError: no folder and no scikit-learn (exit 3), or one that does not hold MNIST (exit 2).
    """
    if folder:
        halves = {name: _mnist(Path(folder), name) for name in MNIST}
        counts = {"train": train, "test": test}
        pairs = [
            (((x[: counts[name]] / 255 - MNIST_MEAN) / MNIST_STD).to(dtype), y[: counts[name]])
            for name, (x, y) in halves.items()
        ]
        return pairs[0], pairs[1]
    if importlib.util.find_spec("sklearn") is None:
        raise AffineQuantError(
            "scikit-learn, whose digits this takes, is not installed",
            "grokalign",
            "`pip install '.[research]'` in a clone of affinequant, or give a folder with MNIST: --set data=FOLDER",
            exit_code=PREFLIGHT,
        )
    from sklearn.datasets import load_digits

    loaded = load_digits()
    x, y = torch.from_numpy(loaded.data), torch.from_numpy(loaded.target).long()  # type: ignore[attr-defined]
    if not (0 < train < len(x) and test > 0):
        what = f"{train} digits to train and {test} to test on, of {len(x)}"
        raise AffineQuantError(what, "--set train, test", "leave some to test on")
    x = ((x - x.mean()) / x.std()).to(dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:train], order[train : train + test]
    return (x[first], y[first]), (x[rest], y[rest])


def _mnist(folder: Path, half: str) -> tuple[Tensor, Tensor]:
    pictures = _idx(folder, f"{MNIST[half]}-images-idx3-ubyte", 16)
    return pictures.reshape(-1, 784).double(), _idx(folder, f"{MNIST[half]}-labels-idx1-ubyte", 8).long()


def _idx(folder: Path, name: str, head: int) -> Tensor:
    """The bytes behind the header of an idx file, packed or not."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise AffineQuantError(
            f"{name} is not in {folder}", "--set data", "give the folder with MNIST's four idx files, packed or not"
        )
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if int.from_bytes(data[:4], "big") != MAGIC[head]:
        raise AffineQuantError(f"{path} is no such file of MNIST", "--set data", "download it again")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=head).copy())
