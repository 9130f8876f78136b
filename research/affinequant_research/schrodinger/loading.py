"""Snapshots out of a file: one's own data in place of a simulation.

An `.npz` holds `times` [k] and, for each of them, `samples_0`, `samples_1`, ... [particles, d]. A `.csv` has a line of
names, one of which is `time`, and a line for each particle: its time and its coordinates.
"""

import csv
import zipfile
from pathlib import Path

import numpy as np
import torch

from affinequant.errors import AffineQuantError
from affinequant_research.schrodinger.systems import Snapshots

WHERE = "--set data"


def load_snapshots(path: str | Path, sigma: float, dims: int | None = None) -> Snapshots:
    """What a file holds, or the only one of its kind in a folder.

    Args:
        sigma: of the noise, which a file does not hold.
        dims: how many coordinates there have to be; None for any number.

    Raises:
        AffineQuantError: there is none, or it holds something else, with the place (exit 2).
    """
    file = _file(Path(path))
    try:
        times, samples = _npz(file) if file.suffix == ".npz" else _csv(file)
        made = Snapshots(times=times, samples=tuple(torch.from_numpy(one) for one in samples), sigma=sigma)
        if dims not in (None, made.dims):
            what = f"particles have {made.dims} coordinates, and the family's have {dims}"
            raise AffineQuantError(what, WHERE, "choose the experiment whose particles these are, or these coordinates")
        return made
    except AffineQuantError as problem:
        raise AffineQuantError(problem.what, f"{WHERE}={file}", problem.fix) from None


def _file(path: Path) -> Path:
    found = sorted(one for one in path.iterdir() if one.suffix in (".npz", ".csv")) if path.is_dir() else [path]
    if len(found) != 1:
        raise AffineQuantError(f"{path} holds {len(found)} files .npz or .csv", WHERE, "name the file itself")
    if not found[0].is_file() or found[0].suffix not in (".npz", ".csv"):
        raise AffineQuantError(f"{path} is no file .npz or .csv", WHERE, "give one, or a folder that holds one")
    return found[0]


def _npz(file: Path) -> tuple[tuple[float, ...], list[np.ndarray]]:
    fix = "write it by np.savez(file, times=..., samples_0=..., samples_1=...)"
    try:
        with np.load(file) as held:
            arrays = {name: held[name] for name in held.files}
    except (ValueError, OSError, zipfile.BadZipFile) as problem:
        raise AffineQuantError(f"it cannot be read: {problem}", WHERE, fix) from None
    times = arrays.get("times", np.empty(0))
    if times.ndim != 1 or not times.size:
        raise AffineQuantError("it has no `times` [k]", WHERE, fix)
    names = [f"samples_{index}" for index in range(times.size)]
    if lacking := [name for name in names if name not in arrays]:
        raise AffineQuantError(f"{lacking[0]} is not in it", WHERE, fix)
    if strange := sorted(name for name in arrays if name.startswith("samples_") and name not in names):
        raise AffineQuantError(f"it has {len(names)} times, and {strange[0]} is of none of them", WHERE, fix)
    try:
        return tuple(map(float, times)), [np.ascontiguousarray(arrays[name], dtype=np.float64) for name in names]
    except (TypeError, ValueError) as problem:
        raise AffineQuantError(f"it holds something else than numbers: {problem}", WHERE, fix) from None


def _csv(file: Path) -> tuple[tuple[float, ...], list[np.ndarray]]:
    fix = "begin it with a line like time,x,y and give each particle a line of as many numbers"
    groups: dict[float, list[list[float]]] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            names, *lines = [[cell.strip() for cell in line] for line in csv.reader(stream) if line] or [[]]
    except (UnicodeDecodeError, csv.Error) as problem:
        raise AffineQuantError(f"it cannot be read: {problem}", WHERE, fix) from None
    if names.count("time") != 1 or len(names) < 2:
        raise AffineQuantError(f"its columns are {names}, not `time` and coordinates", WHERE, fix)
    at = names.index("time")
    for number, line in enumerate(lines, 2):
        try:
            values = [float(cell) for cell in line]
        except ValueError as problem:
            raise AffineQuantError(f"line {number} has something else than numbers: {problem}", WHERE, fix) from None
        if len(values) != len(names):
            raise AffineQuantError(f"line {number} has {len(values)} numbers for {len(names)} columns", WHERE, fix)
        groups.setdefault(values.pop(at), []).append(values)
    if not groups:
        raise AffineQuantError("it has no particles", WHERE, fix)
    times = tuple(sorted(groups))
    return times, [np.array(groups[time]) for time in times]
