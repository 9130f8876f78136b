"""Files in: what is in a model folder, checked from headers before anything is read."""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError
from affinequant.files import check_pointer, read_table
from affinequant.models import Dims, Family

if TYPE_CHECKING:
    from torch import Tensor

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a tensor is and what it looks like, from its file's header."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model folder: its config and, where weights are there, its table of tensors."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]

    def read(self, names: Iterable[str], device: str = "cpu") -> "dict[str, Tensor]":
        """Those tensors, one file opened at a time."""
        from safetensors import safe_open

        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.entries[name].file, []).append(name)
        found = {}
        for file, members in wanted.items():
            with safe_open(self.folder / file, framework="pt", device=device) as handle:
                found |= {name: handle.get_tensor(name) for name in members}
        return found

    def names_under(self, prefix: str) -> list[str]:
        """Names of the tensors inside a module."""
        return [name for name in self.entries if name.startswith(prefix + ".")]

    def stamp(self) -> dict[str, Any]:
        """What tells this source from another: sizes, shapes and the config, without reading the weights."""
        import hashlib

        table = sorted((name, e.dtype, e.shape) for name, e in self.entries.items())
        times = sorted(
            (file, (self.folder / file).stat().st_size) for file in {entry.file for entry in self.entries.values()}
        )
        text = json.dumps([dict(self.config), table, times], sort_keys=True, default=str)
        return {"source": hashlib.sha256(text.encode()).hexdigest()}


def is_local(model: str) -> bool:
    """Whether MODEL is a folder here (or the demo's), not a hub id."""
    return model == "demo" or os.path.isdir(os.path.expanduser(model))


def locate(model: str, *, weights: bool = True, code: bool = False) -> Path:
    """The local folder of MODEL: a folder as it is, `demo` fetched, a hub id downloaded (its config alone
    without `weights`; with `code` that comes with it too).

    Raises:
        AffineQuantError: no such folder, not a model folder, or a hub that cannot be reached.
    """
    if model == "demo":
        from affinequant.demo import demo_model

        return demo_model()
    path = Path(os.path.expanduser(model))
    if is_local(model):
        return path
    if os.path.lexists(path):
        raise AffineQuantError(
            f"{model} is a file, not a model folder", "MODEL", "give the folder that holds config.json"
        )
    parts = model.split("/")
    if len(parts) != 2 or not all(parts) or model.startswith((".", "~", "/")):
        raise AffineQuantError(
            f"no such folder: {model}", "MODEL", "give a model folder, a hub id (org/name) or `demo`"
        )
    return _download(model, weights, code)


def open_source(folder: Path, *, weights: bool = True) -> Source:
    """Read a folder's config and tensor table.

    Raises:
        AffineQuantError: no config.json or not JSON; weights that are missing, cut short or only in pickle files.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise AffineQuantError(
            f"{folder} is not a model folder: no config.json", "MODEL", "give the folder that holds it"
        )
    config = read_table(path, exit_code=USAGE)
    declared = config.get("quantization_config")
    if declared is not None and not isinstance(declared, dict):
        what = f"quantization_config = {declared!r}"[:200]
        fix = "config.json must give quantization_config as a table"
        raise AffineQuantError(what, str(path), fix, exit_code=PREFLIGHT)
    entries = _table(folder) if weights else {}
    return Source(folder=folder, config=config, entries=entries)


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it says of how the weights are quantised."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def check_tensors(source: Source, family: Family, dims: Dims) -> None:
    """Every tensor that the family needs is there, in the shape that the config says.

    Raises:
        AffineQuantError: naming the first one that is not.
    """
    shapes = {f"{family.embedding}.weight": (dims.vocab, dims.hidden), f"{family.norm}.weight": (dims.hidden,)}
    if not dims.tied:
        shapes[f"{family.head}.weight"] = (dims.vocab, dims.hidden)
    for index in range(dims.layers):
        for linear in family.linears:
            name = f"{family.blocks}.{index}.{linear.name}.weight"
            shapes[name] = (getattr(dims, linear.rows), getattr(dims, linear.columns))
        for norm, _ in family.fused_norms():
            shapes[f"{family.blocks}.{index}.{norm}.weight"] = (dims.hidden,)
    for name, shape in shapes.items():
        entry = source.entries.get(name)
        if entry is None:
            raise _broken(f"tensor {name} is missing", source.folder)
        if entry.shape != shape:
            raise _broken(f"tensor {name} has shape {list(entry.shape)}, config.json says {list(shape)}", source.folder)
        if entry.dtype not in _FLOATS:
            raise _broken(f"tensor {name} holds {entry.dtype}, not 16- or 32-bit floats", source.folder)
    linears = {f"{family.blocks}.{index}.{linear.name}" for index in range(dims.layers) for linear in family.linears}
    for name in source.entries:
        owner, _, part = name.rpartition(".")
        if owner in linears and part not in ("weight", "bias"):
            raise AffineQuantError(
                f"tensor {name} stands beside a weight: that is no plain linear, it may be quantised already",
                str(source.folder),
                "give the original 16-bit model",
                exit_code=PREFLIGHT,
            )


def check_finite(source: Source) -> None:
    """Read every weight once and refuse NaN or infinity.

    Raises:
        AffineQuantError: naming the tensor and how many of its values are not finite.
    """
    for name, entry in source.entries.items():
        if entry.dtype in _FLOATS:
            values = source.read([name])[name]
            wrong = int((~values.isfinite()).sum())
            if wrong:
                raise _broken(f"tensor {name} has {wrong} values that are NaN or infinite", source.folder / entry.file)


def _table(folder: Path) -> dict[str, Entry]:
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        try:
            files = sorted({str(file) for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _broken("the shard index cannot be read", index) from None
    else:
        files = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise AffineQuantError(
                f"weights are only in pickle files ({', '.join(pickles[:3])}), which can run code when read",
                str(folder),
                "convert them once, in a sandbox if they are not yours: python -c "
                '"from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\"",
                exit_code=PREFLIGHT,
            )
        raise AffineQuantError(
            f"{folder} holds no weights (*.safetensors)", "MODEL", "download the model's weights", exit_code=PREFLIGHT
        )
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= _header(folder / file)
    return entries


def _header(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        raise _broken(f"shard {path.name} is missing", path.parent)
    check_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise _broken(f"{path.name} is cut short: its header is not whole", path)
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            entries = {
                name: Entry(file=path.name, dtype=entry["dtype"], shape=tuple(entry["shape"]))
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _broken(f"{path.name} is not a safetensors file", path) from None
    if size != 8 + length + end:
        raise _broken(f"{path.name} is cut short: {size:,} bytes of {8 + length + end:,}", path)
    return entries


def _broken(what: str, where: Path) -> AffineQuantError:
    return AffineQuantError(what, str(where), "download the model again", exit_code=PREFLIGHT)


def _download(model: str, weights: bool, code: bool) -> Path:
    """A hub's model without its weights, then those that its index names, or the one file of a small model."""
    texts = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken", *(["*.py"] if code else [])]
    folder = _snapshot(model, texts)
    if not weights:
        return folder
    index = folder / "model.safetensors.index.json"
    table = read_table(index).get("weight_map") if index.is_file() else None
    named = {str(file) for file in table.values()} if isinstance(table, dict) else set()
    return _snapshot(model, [*texts, *(sorted(named) or ["model.safetensors"])])


def _snapshot(model: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as problem:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise AffineQuantError(
            f"no folder {model!r} here, and it could not be downloaded{offline}: {type(problem).__name__}",
            "MODEL",
            "check the id and the network, log in with `hf auth login` if it is gated, or give a local folder",
            exit_code=PREFLIGHT,
        ) from problem
