"""What is asked for: one frozen dataclass from which flags, TOML keys, help and the fingerprint are all made."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from affinequant.errors import AffineQuantError, unknown_name
from affinequant.recipe.presets import ALIASES, PRESETS, Preset, find_preset
from affinequant.recipe.scheme import Scheme, for_linears
from affinequant.recipe.sizes import parse_bytes as parse_bytes
from affinequant.recipe.tables import TABLES, Distill, Divergence, Rotation, flat, option, with_flat_names
from affinequant.recipe.values import EXPORTS as EXPORTS
from affinequant.recipe.values import (
    Clip,
    Device,
    Dtype,
    Format,
    Loss,
    Offload,
    Propagate,
    Rounding,
    Schedule,
    Size,
    Start,
    Tier,
    check_type,
    flag,
    key,
    read_toml,
    toml,
)

AUTO = "auto"
"""In the place of a transform's name: each block takes what errs least on held-out tokens. In the place of them all: at
every site where linears read quantised inputs."""
EVERY, CHOICE_SITES = "*", ("attn_in", "vo", "mlp_in", "mlp_mid")
"""All sites that can choose, until the model says which; and those of most models, where presets have other transforms."""
PATTERNS = ("keep", "set")
"""Fields that are patterns of linears' names: what a file and a flag give is taken together."""
_UNSAID = (*PATTERNS, "avg_bits")
"""Fields that neither a fingerprint nor a file has where they ask for nothing: older runs and versions do not know them."""
_MOST = {"alpha": 1.0, "balance": 1.0, "damping": 1.0, "cost_budget": 100.0, "avg_bits": 16.0}
NAMES = {"model": ("demo",), "data": ("wikitext2", "c4", "demo")}
"""Fields that may name files, and the names that are looked up before any file."""


@with_flat_names
@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what a run does. The command line, `recipe.toml` and `quantize(...)` all fill this.

    Raises:
        AffineQuantError: a value that is not allowed, named by field, with the nearest that is.
    """

    model: str = option(MISSING, "what", "a local folder, a hub id, or `demo` (SmolLM2-135M)")
    scheme: str = option("w4a4", "what", "number formats of weights, activations and KV cache")
    tier: Tier = option(
        "merged",
        "what",
        "merged: no cost at run time, any engine; online: small matmuls at run time, far better at 4-bit activations",
    )
    preset: str = option("default", "what", "named settings for everything in the group `method`")
    tp: int = option(
        1, "what", "tensor-parallel ranks that may serve it: the inputs of o and down are quantised in so many slices"
    )
    keep: tuple[str, ...] = option(
        (),
        "what",
        "linears whose full names match stay in 16 bits: a glob, such as '*.down_proj' or 'model.layers.0.*'",
    )
    set: dict[str, str] = option(
        MISSING,
        "what",
        "linears whose full names match get another scheme, such as '*.down_proj=w8a8'; of several patterns the last",
        factory=dict,
    )
    avg_bits: float = option(
        0.0, "what", "stored bits per weight on average: linears that suffer get more of them, others fewer"
    )
    keep_tokens: int = option(
        0, "what", "of a quantised KV cache keep the latest tokens, as many as this, and the first 4 in 16 bits"
    )
    format: Format = option("auto", "what", "what to write; auto picks what stock engines load")

    transforms: dict[str, str] = option(
        MISSING, "method", "which transform acts at which site; none for none, a+b for both in turn", factory=dict
    )
    cost_budget: float = option(
        3.0, "method", "transform auto: per cent of a block's operations that its choices may cost at run time"
    )
    rounding: Rounding = option(
        "gptq",
        "method",
        "weights to nearest; by GPTQ on the quantised inputs; gptaq: the same towards what full-precision inputs give; "
        "auto: what errs least on held-out samples, input by input",
    )
    weight_clip: Clip = option("search", "method", "narrow each weight range: not, by search, or learned")
    activation_clip: Clip = option("search", "method", "narrow each activation range: not, by search, or learned")
    epochs: int = option(0, "method", "passes over the calibration samples in each block; 0 learns nothing")
    batch_size: int = option(4, "method", "samples per step")
    lr: float = option(5e-3, "method", "learning rate of the transforms")
    clip_lr: float = option(1e-2, "method", "learning rate of the clipping factors")
    schedule: Schedule = option("cosine", "method", "how the learning rates change over a block")
    loss: Loss = option("relative", "method", "squared error of the block's output, as it is or over the token's power")
    propagate: Propagate = option("full", "method", "train a block on full-precision or on quantised inputs")
    aux_loss: bool = option(False, "method", "add the error against the full-precision block on the same inputs")
    alpha: float = option(0.1, "method", "stability factor: weight of entries off the diagonal in the gradual mask")
    balance: float = option(0.5, "method", "start of a diagonal: size of activations to this power over weights' rest")
    balance_by: Size = option("maximum", "method", "that size of a feature: its largest magnitude, or root mean square")
    start: Start = option("closed-form", "method", "what online matrices start from: closed form, or a fixed rotation")
    judge: Divergence = option("none", "method", "kl: the epoch stands after which held-out text diverges least")
    distill: Distill = option(MISSING, "method", "the end-to-end finish", factory=Distill)
    rotation: Rotation = option(MISSING, "method", "the learned rotation", factory=Rotation)
    sweeps: int = option(0, "method", "GPTQ: passes of coordinate descent over its codes")
    damping: float = option(0.01, "method", "GPTQ: fraction of the mean Hessian diagonal added to it")

    data: str = option(
        "wikitext2", "data", "calibration text: wikitext2, c4, demo, a text or .jsonl file, a folder, hf:ID"
    )
    samples: int = option(128, "data", "calibration sequences")
    seq_len: int = option(2048, "data", "tokens per calibration sequence")
    seed: int = option(0, "data", "seed of every random choice")

    device: Device = option("auto", "machine", "where blocks are computed", same_bytes=True)
    dtype: Dtype = option("auto", "machine", "compute type; auto: float32 on a CPU, bfloat16 on a GPU")
    gpu_memory: str = option("", "machine", "refuse a plan that needs more GPU memory, e.g. 22GB", same_bytes=True)
    cpu_memory: str = option("", "machine", "refuse a plan that needs more main memory, e.g. 16GB", same_bytes=True)
    offload: Offload = option("auto", "machine", "where activations wait between blocks", same_bytes=True)
    trust_remote_code: bool = option(False, "machine", "run code that comes with the model (never without this)")

    out: str = option("", "output", "folder to write; default ./MODEL-SCHEME", same_bytes=True)

    def __post_init__(self) -> None:
        for name, (_, hint) in options().items():
            check_type(name, getattr(self, name), hint)
        object.__setattr__(self, "keep", tuple(self.keep))
        _ = self.parsed_scheme
        object.__setattr__(self, "set", {pattern: for_linears(text).name for pattern, text in self.set.items()})
        find_preset(self.preset)
        object.__setattr__(self, "preset", ALIASES.get(self.preset, self.preset))
        for name in NAMES:  # so that the resolved recipe means the same files wherever it is read
            object.__setattr__(self, name, _absolute(name, getattr(self, name)))
        smallest = {"tp": 1, "samples": 1, "seq_len": 8, "batch_size": 1, "epochs": 0, "finish_epochs": 1, "seed": 0}
        for name, least in (smallest | {"rotation_steps": 1, "rotation_len": 8, "sweeps": 0, "keep_tokens": 0}).items():
            if getattr(self, name) < least:
                raise AffineQuantError(f"{name} = {getattr(self, name)}", flag(name), f"use {least} or more")
        for name, most in _MOST.items():
            if not 0 <= getattr(self, name) <= most:
                raise AffineQuantError(f"{name} = {getattr(self, name)}", flag(name), f"use 0.0 to {most}")
        if self.samples < 2 and (self.rounding == "auto" or AUTO in self.transforms.values()):
            what = "a choice by held-out error needs samples to hold out"
            raise AffineQuantError(what, "--samples", "use 2 or more, or name what to take")
        for name in ("lr", "clip_lr", "finish_lr", "rotation_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise AffineQuantError(f"{name} = {getattr(self, name)}", flag(name), "use a finite rate of 0 or more")
        for name in ("gpu_memory", "cpu_memory"):
            parse_bytes(getattr(self, name), flag=flag(name))

    @property
    def parsed_scheme(self) -> Scheme:
        """The scheme as numbers."""
        return Scheme.parse(self.scheme).keeping(self.keep_tokens)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The scheme, and those that patterns set."""
        return self.parsed_scheme, *dict.fromkeys(map(Scheme.parse, self.set.values()))

    def clipping(self, scheme: Scheme) -> Clip:
        """How ranges of activations of that scheme are narrowed. Where linears differ, not those that engines round
        themselves: what is asked for is meant for the others."""
        return "none" if self.set and scheme.unclipped else self.activation_clip

    def output_folder(self) -> Path:
        """Where the checkpoint goes: `out`, or a folder here named after the model and the scheme."""
        if self.out:
            return Path(self.out)
        return Path(f"{Path(os.path.abspath(self.model)).name}-{self.parsed_scheme.name}")

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide the bytes of the result, by their flat names, as plain JSON values."""
        skipped = {name for name, (entry, _) in options().items() if entry.metadata["same_bytes"]}
        skipped |= {name for name in _UNSAID if not getattr(self, name)}
        return {name: value for name, value in flat(asdict(self)).items() if name not in skipped}

    def to_toml(self) -> str:
        """The resolved recipe as TOML; `Recipe.from_toml` and `--config` read it back to an equal recipe."""
        lines, tables = [], []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in _UNSAID and not value:
                continue
            if isinstance(value, dict):
                # What the preset has and this recipe has not must be taken away again by whoever reads the file.
                base = PRESETS[self.preset].fields(self.tier, self.parsed_scheme)
                value = dict.fromkeys(base.get(entry.name, {}), "none") | value
            elif entry.name in TABLES:
                value = asdict(value)
            else:
                lines.append(f"{entry.name} = {toml(value)}")
                continue
            tables += ["", f"[{entry.name}]", *(f"{key(name)} = {toml(item)}" for name, item in value.items())]
        return "\n".join(lines + tables) + "\n"

    @staticmethod
    def from_toml(path: str | Path, **overrides: Any) -> "Recipe":
        """Read a recipe file; keyword arguments win over it. Its paths are sought beside it, then from here."""
        values = read_toml(path, "--config", "give a recipe.toml")
        values, overrides = flat(values, where=str(path)), flat(overrides)
        values |= {name: _absolute(name, values[name], Path(path).parent) for name in NAMES if name in values}
        if not {"preset", "scheme", "tier", "format"}.isdisjoint(overrides):
            values = _chosen(values, where=str(path))
        if "transforms" in overrides and isinstance(values.get("transforms", {}), dict):
            overrides = overrides | {"transforms": values.get("transforms", {}) | overrides["transforms"]}
        if "keep" in overrides and isinstance(values.get("keep", []), list):
            overrides = overrides | {"keep": [*values.get("keep", []), *overrides["keep"]]}
        if "set" in overrides and isinstance(values.get("set", {}), dict):
            before = {
                pattern: scheme for pattern, scheme in values.get("set", {}).items() if pattern not in overrides["set"]
            }
            overrides = overrides | {"set": before | overrides["set"]}
        return resolve(values | overrides, where=str(path))


def options() -> dict[str, tuple["Field[Any]", Any]]:
    """Every option by its flat name: where it is declared, and its type. Those of a table stand where the table does."""
    found: dict[str, tuple[Field[Any], Any]] = {}
    hints = get_type_hints(Recipe)
    for entry in fields(Recipe):
        if kind := TABLES.get(entry.name):
            inner = get_type_hints(kind)
            found |= {one.metadata["flat"]: (one, inner[one.name]) for one in fields(kind)}
        else:
            found[entry.name] = (entry, hints[entry.name])
    return found


def resolve(values: Mapping[str, Any], *, where: str = "quantize()") -> Recipe:
    """A recipe from the fields that were given: a preset fills what was not, and the scheme may adjust the preset. None
    means not given; a path means its string.

    Raises:
        AffineQuantError: unknown field, preset or value.
    """
    values = flat(values, where=where)
    values = {name: str(v) if isinstance(v, Path) else v for name, v in values.items() if v is not None}
    if values.get("transforms") == AUTO:
        values = {**values, "transforms": dict.fromkeys((EVERY, *CHOICE_SITES), AUTO)}
    known = options()
    for name in [name for name in values if name not in known]:
        raise unknown_name("recipe field", name, known, where=where)
    if "model" not in values:
        raise AffineQuantError("no model was named", where, "give a folder, a hub id or `demo`")
    preset = find_preset(values.get("preset", "default"))
    scheme = Scheme.parse(str(values.get("scheme", preset.settings.get("scheme", "w4a4"))))
    tier = str(values.get("tier", _tier(preset, scheme, str(values.get("format", "auto")))))
    merged: dict[str, Any] = preset.fields(tier, scheme, demo=values["model"] == "demo")
    given = values.get("transforms", {})
    check_type("transforms", given, dict[str, str])
    chosen = {**merged.get("transforms", {}), **given}
    kept = {site: name for site, name in chosen.items() if name != "none" or EVERY in chosen}
    merged |= {"tier": tier, **values, "transforms": kept}
    check_type("set", values.get("set", {}), dict[str, str])
    every = (scheme, *map(for_linears, values.get("set", {}).values()))
    if all(one.unclipped for one in every) and "activation_clip" not in values:
        merged["activation_clip"] = "none"
    return replace(Recipe(**merged), scheme=scheme.name)


def _chosen(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """A file's values without those that its own preset and scheme had filled in: another preset fills them anew."""
    names = {name: values[name] for name in ("model", "scheme", "preset", "tier", "format") if name in values}
    base = resolve({"model": "demo"} | names, where=where)
    filled = {"activation_clip"}.union(*(preset.names for preset in PRESETS.values())) - {"tier"}
    kept = {name: value for name, value in values.items() if name not in filled or value != getattr(base, name)}
    if kept.get("tier") == _tier(PRESETS[base.preset], base.parsed_scheme, base.format):
        del kept["tier"]
    if isinstance(kept.get("transforms"), dict):
        sites = kept["transforms"].items()
        kept["transforms"] = {site: name for site, name in sites if name != base.transforms.get(site, "none")}
    return kept


def _tier(preset: Preset, scheme: Scheme, form: str) -> str:
    """The tier where none is asked for: the preset's own; else online where weights have at most 4 bits and activations are
    integers, which loses far less, where the preset has transforms for it and the format that was asked for can hold them.
    4-bit floats, weights alone and 8-bit weights are for stock engines, which run what is merged."""
    narrow = scheme.activation is not None and min(scheme.weight.bits, scheme.activation.bits) <= 4
    narrow = narrow and not scheme.engines_round_activations
    online = bool(preset.online) and narrow and form in ("auto", "affinequant")
    return str(preset.settings.get("tier", "online" if online else "merged"))


def _absolute(name: str, text: Any, folder: Path = Path()) -> Any:
    """A file or folder that is there, by its absolute path; anything else as it is."""
    path = os.path.abspath(folder / os.path.expanduser(text)) if isinstance(text, str) else ""
    return path if text and text not in NAMES[name] and os.path.exists(path) else text
