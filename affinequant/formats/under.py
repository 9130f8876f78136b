"""The integers of a finished folder under another scheme: other activations, or wider weights that hold them."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from affinequant.errors import AffineQuantError
from affinequant.formats.reread import Finished
from affinequant.recipe.scheme import NumberFormat, Scheme


def under_scheme(found: Finished, text: str | None, *, weight_only: bool) -> Finished:
    """The same integers for other activations, or for 8-bit weights that hold the 4-bit ones.

    `w4a8` and the like keep the groups and the symmetry that the weights have. A 4-bit code less its zero point lies
    within [-15, 15], so 8 symmetric bits hold it with the same scale. Clips belong to the grid that they were found
    for: another grid of the activations starts again from the full range.

    Raises:
        AffineQuantError: a scheme that would need the weights or activations rounded anew, with what would do.
    """
    old = found.contents.scheme
    if found.contents.others:
        return _under_several(found, text, weight_only=weight_only)
    if text is None:
        new = _named(old.weight, None) if weight_only else old
    else:
        new = _resolved(text, old)
        if weight_only and new.activation is not None:
            what = f"{new.name} quantises activations, of which this format holds nothing"
            raise AffineQuantError(what, "--scheme", f"leave it out, or use w{new.weight.bits}a16")
    bits = new.activation.bits if new.activation else 16
    if bits < 8 and new.activation != old.activation:
        what = f"{new.name} has {bits}-bit activations, for which {old.name} was not made"
        raise AffineQuantError(what, "--scheme", f"`affinequant quantize --scheme {new.name}` makes such a checkpoint")
    if new.weight.bits != old.weight.bits and new.activation is not None and new.weight.group_size:
        what = f"no engine computes {new.weight.bits}-bit weights in groups on integer activations"
        raise AffineQuantError(what, "--scheme", f"use w{old.weight.bits}a16 or w{old.weight.bits}a{bits}")
    if new == old:
        return found
    clips = found.clips if new.activation == old.activation else dict.fromkeys(found.contents.linears, 1.0)
    return _with(found, new, clips if new.activation else {})


def _under_several(found: Finished, text: str | None, *, weight_only: bool) -> Finished:
    """`under_scheme` of a folder whose linears are not all of one scheme: as they are, or their weights alone."""
    contents = found.contents
    if text is not None:
        names = ", ".join(scheme.name for scheme in contents.schemes)
        what = f"the folder's linears have several schemes ({names}), of which {text} would make one"
        raise AffineQuantError(what, "--scheme", "leave it out")
    if not weight_only:
        return found
    scheme, others = _named(contents.scheme.weight, None), contents.others
    alone = {name: _named(other.weight, None) for name, other in others.items()}
    changed = _with(found, scheme, {})
    return replace(changed, contents=replace(changed.contents, others={n: o for n, o in alone.items() if o != scheme}))


def full_range(found: Finished) -> Finished:
    """The same, for engines that quantise activations over their full range whatever was found to be better."""
    return _with(found, found.contents.scheme, dict.fromkeys(found.clips, 1.0))


def _with(found: Finished, new: Scheme, clips: Mapping[str, float]) -> Finished:
    old, inner = found.contents.scheme, found.contents.stages
    contents = replace(
        found.contents, scheme=new, stages=lambda: (_converted(stage, old, new, clips) for stage in inner())
    )
    return replace(found, contents=contents, clips=clips)


def _resolved(text: str, old: Scheme) -> Scheme:
    """The scheme that `text` asks for, groups and symmetry taken from the weights where it does not say them."""
    asked, said = Scheme.parse(text), text.lower()
    weight = old.weight
    if (weight.kind, asked.weight.kind) != ("int", "int"):
        if asked.weight != weight:
            raise _anew(text, old, asked)
        return asked
    if asked.weight.bits == 8 and weight.bits == 4:
        weight = replace(weight, bits=8, symmetric=True)
    wanted = replace(
        asked.weight,
        symmetric=asked.weight.symmetric if "sym" in said else weight.symmetric,
        **({} if "-g" in said else {"granularity": weight.granularity, "group_size": weight.group_size}),
    )
    if wanted != weight:
        raise _anew(text, _named(weight, asked.activation), asked, old)
    return _named(weight, asked.activation)


def _anew(text: str, there: Scheme, asked: Scheme, old: Scheme | None = None) -> AffineQuantError:
    fix = f"use {there.name}, or quantise again with --scheme {asked.name}"
    return AffineQuantError(f"the weights are {(old or there).name}; {text} would round them anew", "--scheme", fix)


def _named(weight: NumberFormat, activation: NumberFormat | None) -> Scheme:
    """The scheme of these weights with activations as wide and in groups as given, as symmetric as the weights."""
    if weight.kind != "int":
        return Scheme.parse(weight.kind + ("" if activation else "a16"))
    bits = activation.bits if activation else 16
    name = f"w{weight.bits}a{bits}" + (f"-g{weight.group_size}" if weight.group_size else "")
    name += f"-ag{activation.group_size}" if activation and activation.group_size else ""
    return Scheme.parse(f"{name}-{'sym' if weight.symmetric else 'asym'}")


def _converted(stage: dict[str, Tensor], old: Scheme, new: Scheme, clips: Mapping[str, float]) -> dict[str, Tensor]:
    gone = ".input_clip" if new.activation else (".input_clip", ".input_unit")
    result = {name: tensor for name, tensor in stage.items() if not name.endswith(gone)}
    for name in [name.removesuffix(".codes") for name in stage if name.endswith(".codes")]:
        if new.weight.bits != old.weight.bits and f"{name}.zero" in result:
            codes, zero = result[f"{name}.codes"], result.pop(f"{name}.zero")
            result[f"{name}.codes"] = codes - zero.repeat_interleave(codes.shape[1] // zero.shape[1], 1)
        if name in clips:
            result[f"{name}.input_clip"] = torch.tensor(clips[name])
    return result
