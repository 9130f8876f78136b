"""What engines of 4-bit floats hold of the transforms at run time: one matrix [b, b] for all blocks of a linear's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from affinequant.formats import Contents, Shapes, network_of, online_reason
from affinequant.formats.shards import CARD, write_text
from affinequant.models.sites import Placement
from affinequant.recipe.scheme import Scheme
from affinequant.transforms.online import module_of, stored_name
from affinequant.version import __version__

if TYPE_CHECKING:  # a plan asks formats what they support, and must not wait for torch
    from torch import Tensor

PART = "blocks"
"""The only part that such a transform has."""


def integers_reason(scheme: Scheme, placements: Mapping[str, Placement]) -> str | None:
    """None, or that the weights are integers, for forms that hold 4-bit floats alone."""
    if scheme.weight.kind != "int":
        return None
    online = online_reason(placements, "it has room for beside 4-bit floats alone")
    return online or f"it holds 4-bit floats, and {scheme.name} has integers"


def clipped_reason(scheme: Scheme) -> str:
    """Why ranges that are narrowed do not carry over."""
    return f"engines quantise the activations of {scheme.name} over their full range, without clipping"


def widths(contents: Contents, shapes: Shapes) -> dict[str, int]:
    """The features of a block by the linears that have such a matrix."""
    found = {name: shapes.get(stored_name(name, PART)) for name in contents.linears}
    return {name: shape[-1] for name, shape in found.items() if shape is not None and shape[0] == 1}


def unheld(contents: Contents, shapes: Shapes) -> str | None:
    """None, or where something else acts at run time than one matrix for all blocks."""
    held = {stored_name(name, PART) for name in widths(contents, shapes)}
    for name in shapes:
        if (module := module_of(name)) and name not in held:
            return (
                f"{module} has another transform at run time ({name.rpartition('.')[2]}, {list(shapes[name])}) than one matrix "
                "for all blocks of its inputs, as shared-32 is"
            )
    return None


def parts_reason(contents: Contents) -> str | None:
    """None, or that the model is one part of several."""
    return (
        "it is one part of several, whose linears vLLM calls otherwise" if contents.renamed or contents.beside else None
    )


def take(stage: dict[str, Tensor], name: str) -> Tensor | None:
    """The matrix [b, b] of a linear, taken out of its stage; None where it has none."""
    blocks = stage.pop(stored_name(name, PART), None)
    return None if blocks is None else blocks[0]


def write_card(contents: Contents, out: Path, words: str) -> Path:
    """Write a `README.md` that says what the folder is, and in `words` how to serve it."""
    kind = contents.scheme.name
    title = f"# 4-bit floats with small matrices at run time (`{kind}`)\n\nExported by affinequant {__version__}.\n"
    out.mkdir(parents=True, exist_ok=True)
    return write_text(out / CARD, f"{title}\n{words}")


def by_input(contents: Contents) -> Mapping[str, tuple[str, ...]]:
    """The quantised linears that read one input by a name for it, `layer_3_attn_in`."""
    family, dims = network_of(contents)
    found = dict[str, tuple[str, ...]]()
    for index, block in enumerate(family.each_block(dims)):
        for site, members in block.input_groups():
            names = (f"{family.blocks}.{index}.{member}" for member in members)
            found[f"layer_{index}_{site.replace('.', '_')}"] = tuple(name for name in names if name in contents.linears)
    return found
