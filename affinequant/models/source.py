"""Files in: what is in a model folder, checked from headers before anything is read."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.data.files import read_table
from affinequant.data.offline import MODELS_OFFLINE, offline_setting
from affinequant.data.wheels import Say, quiet
from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError
from affinequant.models import Dims, Family
from affinequant.models.multimodal import PREDICTOR, beside, by_module, part_of, text_config, wraps
from affinequant.models.source_files import Entry, broken, check_adapter, check_inside, find_weights, same_bytes
from affinequant.models.stacked import unstacked
from affinequant.progress import Steps

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = re.compile(r".*?\.\d+\.")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model folder: its config and, where weights are there, its table of tensors; `notes` says what was left out, `held`
    are tensors that have been read, and `renamed` is what `models/multimodal.py` has called otherwise than the files."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = ()
    held: "Mapping[str, Tensor]" = field(default_factory=dict, repr=False, compare=False)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def read(self, names: Iterable[str], device: str = "cpu") -> "dict[str, Tensor]":
        """Those tensors, one file opened at a time."""
        from safetensors import safe_open

        if self.held:
            return {name: self.held[name].to(device) for name in names}
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.entries[name].file, []).append(name)
        found = {}
        for file, members in wanted.items():
            with safe_open(self.folder / file, framework="pt", device=device) as handle:
                found |= {name: _read(handle, self.entries[name]) for name in members}
        return found

    def holding(self, names: Iterable[str]) -> "Source":
        """The same with these tensors alone, in memory."""
        held = self.read(names)
        return replace(self, entries={name: self.entries[name] for name in held}, held=held)

    def names_under(self, prefix: str) -> list[str]:
        """Names of the tensors inside a module."""
        return [name for name in self.entries if name.startswith(prefix + ".")]


def _read(handle: Any, entry: Entry) -> "Tensor":
    if entry.piece is None:
        return handle.get_tensor(entry.key)
    place, first, behind = entry.piece
    return handle.get_slice(entry.key)[place, first:behind]


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
        from affinequant.data.demo import demo_model

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
        AffineQuantError: no config.json or not JSON; an adapter; weights that are not as `find_weights` wants them.
    """
    path = folder / "config.json"
    check_adapter(folder)
    if path.is_symlink():
        check_inside(path, folder)
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
    entries, notes = find_weights(folder, config) if weights else ({}, ())
    entries, renamed = by_module(config, entries, str(folder))
    return Source(folder=folder, config=config, entries=entries, notes=notes, renamed=renamed)


def parts_beside(source: Source, family: Family) -> dict[str, int]:
    """The parts of a model whose tensors stand beside the decoder's, and their bytes: of any other model than one of several
    parts it is `PREDICTOR` alone."""
    found: dict[str, int] = {}
    for name in beside(family, source.entries):
        if wraps(source.config) or part_of(name) == PREDICTOR:
            found[part_of(name)] = found.get(part_of(name), 0) + source.entries[name].size
    return found


def by_block(source: Source) -> Callable[[str], Source]:
    """Name of a tensor or module -> the source with what its block has, held in memory until another block is asked for: to open
    a file takes as long as it has tensors, and those of a mixture of experts are tens of thousands.

    What lies in no block, or in one of which there is nothing, is left to the source itself.
    """
    blocks: dict[str, list[str]] = {}
    for name in source.entries:
        if found := _BLOCK.match(name):
            blocks.setdefault(found[0], []).append(name)

    @functools.lru_cache(maxsize=1)
    def held(block: str) -> Source:
        return source.holding(blocks[block])

    def of(name: str) -> Source:
        found = _BLOCK.match(name)
        return held(found[0]) if found and found[0] in blocks else source

    return of


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it says of how the weights are quantised."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def settle(source: Source, family: Family, dims: Dims) -> tuple[Source, Dims]:
    """The source and its sizes as transformers loads them: experts that lie stacked are taken apart, and the tie is that of
    the weights. A head of its own is used whatever the config says, and one without an embedding beside it stands for both."""
    source = replace(source, entries=unstacked(source.entries, family))
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    own, table = source.entries.get(head), source.entries.get(embedding)
    if not dims.tied or own is None:
        return source, dims
    if table is None:
        entries = {embedding: own} | {name: entry for name, entry in source.entries.items() if name != head}
        return replace(source, entries=entries), dims
    if same_bytes(source.folder, own, table):
        return source, dims
    note = (
        f"config.json says that head and embedding are tied, but {head} is another: it is used, and the result untied"
    )
    return replace(source, notes=(*source.notes, note)), replace(dims, tied=False)


def check_tensors(source: Source, family: Family, dims: Dims) -> None:
    """Every tensor that the family needs is there, in the shape that the config says.

    Raises:
        AffineQuantError: naming the first one that is not.
    """
    if lora := next((name for name in source.entries if ".lora_" in name or ".base_layer." in name), None):
        raise AffineQuantError(
            f"tensor {lora} belongs to a LoRA adapter that is not merged",
            str(source.folder),
            "merge it into the model first: peft's merge_and_unload(), then save_pretrained",
            exit_code=PREFLIGHT,
        )
    inside = (name for name in source.entries if name.startswith(f"{family.blocks}."))
    if fused := next((name for name in inside if name.endswith(".experts.down_proj")), None):
        raise AffineQuantError(
            f"tensor {fused} holds all experts of a layer in one, which is transformers' own layout and not {family.name}'s",
            str(source.folder),
            "save the model as it was published, expert by expert: save_pretrained(..., save_original_format=True)",
            exit_code=PREFLIGHT,
        )
    shapes: dict[str, tuple[int, ...]] = {
        f"{family.embedding}.weight": (dims.vocab, dims.hidden),
        f"{family.norm}.weight": (dims.hidden,),
    }
    if not dims.tied:
        shapes[f"{family.head}.weight"] = (dims.vocab, dims.hidden)
    if family.positions:
        table = source.entries.get(f"{family.positions}.weight")
        shapes[f"{family.positions}.weight"] = (*(table.shape[:1] if table else ()), dims.hidden)
    linears, config = set[str](), family.read(text_config(source.config))
    for index, block in enumerate(family.each_block(dims)):
        for linear in block.linears:
            name = f"{family.blocks}.{index}.{linear.name}"
            linears.add(name)
            shapes[f"{name}.weight"] = linear.shape(dims)
            if linear.has_bias(config):
                shapes[f"{name}.bias"] = linear.shape(dims)[:1]
        for norm in block.norms():
            shapes[f"{family.blocks}.{index}.{norm}.weight"] = (dims.hidden,)
    for name, shape in shapes.items():
        entry = source.entries.get(name)
        if entry is None and name.endswith(".bias"):
            raise AffineQuantError(
                f"tensor {name} is missing, which config.json promises",
                str(source.folder),
                "put it there, as zeros if the model has none, or download the model again",
                exit_code=PREFLIGHT,
            )
        if entry is None:
            raise broken(f"tensor {name} is missing", source.folder)
        if entry.shape != shape:
            raise broken(f"tensor {name} has shape {list(entry.shape)}, config.json says {list(shape)}", source.folder)
        if entry.dtype not in _FLOATS:
            raise broken(f"tensor {name} holds {entry.dtype}, not 16- or 32-bit floats", source.folder)
    for name in source.entries:
        owner, _, part = name.rpartition(".")
        if owner in linears and part not in ("weight", "bias"):
            raise AffineQuantError(
                f"tensor {name} stands beside a weight: that is no plain linear, it may be quantised already",
                str(source.folder),
                "give the original 16-bit model",
                exit_code=PREFLIGHT,
            )


def read_through(source: Source, say: Say = quiet, *, finite: bool = True) -> dict[str, str]:
    """Read every weight once, and return what tells this source's content from another's, for a fingerprint: a hash of
    all tensors (names, types, shapes and bytes, however they lie in files) and one of the config.

    Raises:
        AffineQuantError: with `finite`, a tensor holds NaN or infinity: which, and how many of its values.
    """
    import torch

    whole, weights = sum(entry.size for entry in source.entries.values()), hashlib.sha256()
    told = Steps(say, "reading the weights", whole, shown=lambda size: f"{size / 2**30:.1f} GB")
    for name, entry in sorted(source.entries.items()):
        values = source.read([name])[name]
        if finite and entry.dtype in _FLOATS and (wrong := int((~values.isfinite()).sum())):
            raise broken(f"tensor {name} has {wrong} values that are NaN or infinite", source.folder / entry.file)
        weights.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        weights.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
        told(entry.size)
    config = json.dumps(dict(source.config), sort_keys=True, default=str)
    return {"weights": weights.hexdigest()[:32], "config": hashlib.sha256(config.encode()).hexdigest()[:32]}


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
        setting = offline_setting(MODELS_OFFLINE)
        offline = f" ({setting} is set)" if setting else ""
        raise AffineQuantError(
            f"no folder {model!r} here, and it could not be downloaded{offline}: {type(problem).__name__}",
            "MODEL",
            "check the id and the network, log in with `hf auth login` if it is gated, or give a local folder",
            exit_code=PREFLIGHT,
        ) from problem
