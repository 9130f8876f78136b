"""The preflight: what a recipe will do to a model, what it costs, and every refusal that can be made in seconds.

Nothing here reads a weight or imports torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from affinequant.costs import PROCESS_BYTES, device_of, kept_bytes, kept_in_cache, linear_bits, minutes, stream_bytes
from affinequant.data.text import announced
from affinequant.data.tokenizer import check_code, check_tokenizer, without_bos
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.formats import find_format, held_elsewhere, holdable, unheld
from affinequant.formats.side_files import SideFiles, find_side_files
from affinequant.models import Dims, Family, check_length, resolve, resolve_sites
from affinequant.models.divided import check_groups, check_slices
from affinequant.models.linears import bound, keeping, shapes_of, sites_read
from affinequant.models.multimodal import said_of_copies
from affinequant.models.sites import Placement, Site, online_sites
from affinequant.models.source import Source, check_tensors, is_local, locate, open_source, parts_beside, settle
from affinequant.recipe.assigned import Schemes, assign, differing
from affinequant.recipe.budget import check_budget, choices_of, undecided
from affinequant.recipe.recipe import AUTO, Recipe, parse_bytes
from affinequant.recipe.recipe import resolve as resolve_recipe
from affinequant.recipe.values import Format
from affinequant.stages import ROTATED, Stage, stages_of
from affinequant.transforms.placements import (
    block_flops,
    block_weights,
    candidates,
    choice_bytes,
    choosing,
    first_of,
    fitted,
    online_bytes,
    place_all,
    shared_alone,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will happen. Sizes in bytes; `minutes` is arithmetic, not a measurement."""

    recipe: Recipe
    source: Source
    family: Family
    dims: Dims
    schemes: Schemes
    sites: Mapping[str, Site]
    placements: Mapping[str, Placement]
    stages: tuple[Stage, ...]
    device: str
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    cache_bytes: int
    """Keys and values of one token in all blocks, packed as the scheme says."""
    untied_bytes: int
    cpu_bytes: int
    gpu_bytes: int
    disk_bytes: int
    offload: str
    minutes: float
    notes: tuple[str, ...]
    copied: Mapping[str, int]
    """Bytes of the parts beside the decoder, where the model has several."""
    side: SideFiles
    """The source's other files: what of them the output gets."""

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        sites = [
            {
                "site": name,
                "transform": self.recipe.transforms.get(name),
                "placement": placement.how,
                "reason": placement.reason,
                "flops_per_token": placement.flops,
                **self._candidates(name),
            }
            for name, placement in self.placements.items()
        ]
        sizes = ("source_bytes", "output_bytes", "untied_bytes", "cpu_bytes", "gpu_bytes", "disk_bytes", "minutes")
        return {
            "schema": 1,
            "model": self.recipe.model,
            "family": self.family.name,
            "dims": asdict(self.dims)
            | {"kinds": [list(kinds) for kinds in self.dims.kinds], "biases": list(self.dims.biases)},
            "scheme": self.recipe.scheme,
            **({"linears": others} if (others := differing(self.schemes, self.recipe.scheme)) else {}),
            "tier": self.recipe.tier,
            "preset": self.recipe.preset,
            "format": self.recipe.format,
            "out": str(self.recipe.output_folder()),
            "device": self.device,
            "sites": sites,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "cache_bits": self.recipe.parsed_scheme.bits_per_cached(self.dims.head_dim),
            "cache_bytes_per_token": self.cache_bytes,
            **kept_in_cache(self.recipe.parsed_scheme, self.family, self.dims),
            **{name: getattr(self, name) for name in sizes},
            "copied": dict(self.copied),
            "offload": self.offload,
            "notes": list(self.notes),
        }

    def _candidates(self, name: str) -> dict[str, list[str]]:
        """What each block chooses from at a site, where it does."""
        if self.recipe.transforms.get(name) != AUTO:
            return {}
        block = block_flops(self.family, self.dims)
        return {"candidates": list(candidates(first_of(self.sites)[name], self.recipe, block))}


def plan(model: Recipe | str | Path, **fields: Any) -> Plan:
    """Resolve a recipe against a model, without reading weights.

    Args:
        model: a Recipe, or MODEL with the recipe's other fields as keywords.

    Raises:
        AffineQuantError: whatever can be refused from the config, the headers, the data source and the machine.
    """
    recipe = model if isinstance(model, Recipe) else resolve_recipe({"model": model} | fields)
    folder = locate(recipe.model, weights=False, code=recipe.trust_remote_code)
    # Of a hub's model only the config is there for sure; its weights are checked once they have been fetched.
    has_weights = is_local(recipe.model) and (any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin")))
    return _planned(recipe, folder, has_weights)


def with_weights(made: Plan) -> Plan:
    """The plan with its weights' table: fetched and checked now where it was made from a config alone."""
    if made.source.entries:
        return made
    return _planned(made.recipe, locate(made.recipe.model, code=made.recipe.trust_remote_code), True)


def _planned(recipe: Recipe, folder: Path, has_weights: bool) -> Plan:
    source = open_source(folder, weights=has_weights)
    family, dims = resolve(source.config, where=str(folder / "config.json"))
    check_code(source.config, "model", folder, trusted=recipe.trust_remote_code)
    if has_weights:
        source, dims = settle(source, family, dims)
        check_tensors(source, family, dims)
    side = find_side_files(folder, skip=recipe.output_folder())  # refuses links and pipes before anything opens them
    required = has_weights or not is_local(recipe.model)
    check_tokenizer(folder, dims.vocab, required=required, trust_remote_code=recipe.trust_remote_code)
    check_length(recipe.seq_len, source.config)
    check_slices(recipe, dims)
    ties = bound(family, dims)
    fused, read = ({name: getattr(one, tie) for name, one in ties.items()} for tie in ("fused", "read"))
    schemes = assign(recipe, fused, read, family.left_alone(dims))
    family = keeping(family, (name for name, scheme in schemes.items() if scheme is None))
    recipe = choosing(recipe, family)
    sites = {site.name: site for site in resolve_sites(family, dims, recipe.tp, parts_beside(source, family))}
    recipe, left_out = fitted(recipe, sites, sites_read(family, dims))
    placements = place_all(recipe, sites, block_flops(family, dims))
    check_groups(recipe, schemes, family, dims)
    form, used = find_format(recipe.format, placements), list(dict.fromkeys(one for one in schemes.values() if one))
    clipped = [one for one in used if recipe.clipping(one) != "none"]
    if reason := unheld(form, used, placements, clipped, family):
        fix = held_elsewhere(recipe.format, get_args(Format), used, placements, clipped, family)
        raise AffineQuantError(f"format {recipe.format} cannot hold this: {reason}", "--format", fix)
    choice = holdable(recipe.format, choices_of(recipe.parsed_scheme), placements, family)
    check_budget(recipe, schemes, shapes_of(family, dims), choice)
    fetched, said_of_bos = announced(recipe.data), without_bos(folder) if family.bos else ()
    notes = (*said_of_bos, *left_out, *fetched)
    return _with_costs(recipe, source, family, dims, schemes, sites, placements, side, notes)


def _with_costs(
    recipe: Recipe,
    source: Source,
    family: Family,
    dims: Dims,
    schemes: Schemes,
    sites: Mapping[str, Site],
    placements: Mapping[str, Placement],
    side: SideFiles,
    notes: tuple[str, ...],
) -> Plan:
    scheme, rotated = recipe.parsed_scheme, "residual" in recipe.transforms
    flops, blocks, per_block = block_flops(family, dims), list(family.each_block(dims)), block_weights(family, dims)
    inside, bits = linear_bits(schemes, shapes_of(family, dims))
    if undecided(recipe, schemes):
        bits = recipe.avg_bits * inside
        notes = (*notes, "which linears get how many bits is measured first")
    table = dims.vocab * dims.hidden
    untied = 2 * table if dims.tied and rotated else 0
    outer = 2 * table * (1 if dims.tied and not rotated else 2)
    dense = recipe.format == "dense"
    kept = sum(online_bytes(recipe, one, sites) + choice_bytes(recipe, one, flops, sites) for one in blocks)
    norms = sum(len(block.norms()) for block in blocks) * dims.hidden
    positions = source.entries.get(f"{family.positions}.weight")
    outer += positions.size if positions else 0
    routers = [
        source.entries.get(f"{name}.weight") for name in family.left_alone(dims) if name not in (family.head, *schemes)
    ]
    outer += sum(2 * math.prod(entry.shape) for entry in routers if entry)
    copied = parts_beside(source, family)
    output = (
        sum(copied.values()) + int(outer + (2 * inside if dense else bits / 8 + kept)) + 2 * norms + 4 * dims.hidden
    )
    attentions = sum(bool(block.attention) for block in blocks)
    device = device_of(recipe)
    stages, stream = stages_of(recipe, dims, per_block, device), stream_bytes(recipe, dims, device)
    waiting, cpu = kept_bytes(recipe, dims, device), PROCESS_BYTES + max(stage.cost.cpu for stage in stages)
    budget, offload = parse_bytes(recipe.cpu_memory, flag="--cpu-memory"), recipe.offload
    if offload == "auto":
        offload = "disk" if budget is not None and cpu > budget >= cpu - waiting else "cpu"
    if offload == "disk":
        cpu -= waiting
    stored = inside + norms + 2 * outer
    made = Plan(
        recipe=recipe,
        source=source,
        family=family,
        dims=dims,
        schemes=schemes,
        sites=sites,
        placements=placements,
        stages=stages,
        device=device,
        source_bytes=sum(entry.size for entry in source.entries.values()) or 2 * (table * (2 - dims.tied) + inside),
        output_bytes=output,
        bits_per_weight=bits / inside,
        cache_bytes=round(2 * attentions * dims.value * scheme.bits_per_cached(dims.head_dim) / 8),
        untied_bytes=untied,
        cpu_bytes=cpu,
        gpu_bytes=max(stage.cost.gpu for stage in stages) + 2**30 if device == "cuda" else 0,
        disk_bytes=output + side.size + stored + 4 * stream * (1 + (offload == "disk")),
        offload=offload,
        minutes=minutes((stage.cost for stage in stages), device),
        notes=(
            *source.notes,
            *([f"the decoder is quantised; copied: {said_of_copies(copied)}"] if copied else []),
            *side.note(),
            *_notes(recipe, placements, stages, untied, dims),
            *notes,
        ),
        copied=copied,
        side=side,
    )
    _check_budgets(made)
    return made


def _notes(
    recipe: Recipe, placements: Mapping[str, Placement], stages: Sequence[Stage], untied: int, dims: Dims
) -> tuple[str, ...]:
    notes, ours = [], "affinequant.load" if dims.experts else "affinequant.load and vLLM with this package"
    if untied:
        notes.append(
            "rotating the residual stream unties the head from the embedding: "
            f"the folder grows by {untied / 2**20:,.0f} MB"
        )
    if any(stage.name == ROTATED for stage in stages):
        notes.append("the residual stream's rotation is learned first, without transforms that start from data")
    floats = any(scheme.weight.kind != "int" for scheme in recipe.schemes)
    rounded = [scheme for scheme in recipe.schemes if scheme.activation is not None]
    if online_sites(placements):
        readers = "affinequant.load" if floats else ours
        notes.append(f"transforms stay online: {readers} can run this checkpoint, others refuse it")
    elif not all(scheme.engines_round_activations for scheme in rounded):
        notes.append(f"engines without this package run this checkpoint with 16-bit activations; {ours}, on integers")
    if floats and rounded:
        online = [recipe.transforms[site] for site in online_sites(placements)]
        what = " of an export as transform-config or fp_quant" if online else ""
        if shared_alone(online):
            where = "on Blackwell; elsewhere their values, in 16 or 32 bits"
            notes.append(f"4-bit floats: stock vLLM multiplies them{what} {where}")
    if recipe.parsed_scheme.kv is not None:
        notes.append("affinequant.load packs the KV cache; vLLM, with this package too, runs with a 16-bit KV cache")
    if recipe.model == "demo":
        from affinequant.data.demo import MODEL_NOTE

        notes.append(MODEL_NOTE)
    return tuple(notes)


def _check_budgets(made: Plan) -> None:
    recipe = made.recipe
    for flag, need in (("--gpu-memory", made.gpu_bytes), ("--cpu-memory", made.cpu_bytes)):
        budget = parse_bytes(getattr(recipe, flag[2:].replace("-", "_")), flag=flag)
        if budget is not None and need > budget:
            fix = f"allow {need / 2**30:.1f}GB"
            if recipe.samples > 1:
                fix += f", or use fewer --samples than {recipe.samples} or a shorter --seq-len than {recipe.seq_len}"
            raise AffineQuantError(
                f"the plan needs {need / 2**30:.1f} GB, {budget / 2**30:.1f} GB are allowed",
                flag,
                fix,
                exit_code=PREFLIGHT,
            )
