"""What the run time does with the transforms that did not fold: a few small matrices, applied to activations.

A transform's `online()` names its tensors: "left" [n1, n1] and "right" [n2, n2] are a Kronecker product left (x) right;
"blocks" [count, b, b] are the blocks of a block-diagonal matrix, or with a count of 1 the one block that all share. The
parts of a chain have their position in front ("0.left", "0.right", "1.blocks") and act in that order.

A stage and a checkpoint keep them beside each linear that reads their output (`...mlp.down_proj.online_left`). What acts
on queries and keys after RoPE belongs to no linear and lies beside the attention (`...self_attn.online_blocks`): one
orthogonal matrix of a head's width, which every query head and every key head is multiplied with.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from jaxtyping import Float
from torch import Tensor

from affinequant.transforms.linalg import from_blocks, kronecker_apply, to_blocks

_PREFIX = "online_"


def apply_online(x: Float[Tensor, "*batch n"], tensors: Mapping[str, Tensor]) -> Float[Tensor, "*batch n"]:
    """x P over the last axis, in the dtype of x.

    Raises:
        KeyError: tensors that define no transform.
    """
    for part in _parts(tensors):
        if "left" in part:
            x = kronecker_apply(x, part["left"].to(x), part["right"].to(x))
        elif len(part["blocks"]) == 1:
            block = part["blocks"][0].to(x)
            x = (x.reshape(-1, len(block)) @ block).reshape(x.shape)
        else:
            blocks = part["blocks"].to(x)
            x = from_blocks(to_blocks(x, len(blocks)) @ blocks, x)
    return x


def acting(tensors: Mapping[str, Tensor] | None) -> Callable[[Tensor], Tensor] | None:
    """`apply_online` of these matrices; None where there are none."""
    return functools.partial(apply_online, tensors=tensors) if tensors else None


def in_order(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The matrices as they act one after another, as `affinequant_kernels.online_linear` takes them.

    Raises:
        KeyError: tensors that define no transform.
    """
    return [part[name] for part in _parts(tensors) for name in (("left", "right") if "left" in part else ("blocks",))]


def stored_name(module: str, part: str) -> str:
    """Under which name a stage and a checkpoint keep one of the tensors, beside the linear (or attention) `module`."""
    return f"{module}.{_PREFIX}{part.replace('.', '_')}"


def module_of(stored: str) -> str:
    """The module beside which a tensor of that name is kept (`stored_name`); "" of any other tensor."""
    module, _, leaf = stored.rpartition(".")
    return module if leaf.startswith(_PREFIX) else ""


def parts_of(names: Iterable[str], module: str) -> dict[str, str]:
    """Part to stored name, of those among `names` that are kept beside `module`."""
    start = f"{module}.{_PREFIX}"
    return {name.removeprefix(start).replace("_", "."): name for name in names if name.startswith(start)}


def check_online(tensors: Mapping[str, Tensor], width: int, slices: int = 1) -> None:
    """Refuse tensors that define no transform of `width` features, or of `slices` equal parts of them.

    A Kronecker product serves every slice; blocks are one for all, or as many as there are in the whole width.

    Raises:
        ValueError: a part is missing, not square, or of another width.
    """
    for part in _parts(tensors):
        kind = sorted(part)
        if kind not in (["left", "right"], ["blocks"]):
            raise ValueError(f"expected left and right, or blocks; got {', '.join(kind)}")
        shapes = {name: tuple(tensor.shape) for name, tensor in part.items()}
        if any(shape[-1] != shape[-2] for shape in shapes.values()):
            raise ValueError(f"expected square matrices, got {shapes}")
        if "left" in part:
            wide = len(part["left"]) * len(part["right"])
            fits = wide * slices == width
        else:
            count, size = part["blocks"].shape[:2]
            fits = width % (size * slices) == 0 and count in (1, width // size)
        if not fits:
            raise ValueError(f"expected matrices for {width} features, got {shapes}")


def flops(tensors: Mapping[str, Tensor], width: int) -> int:
    """Floating-point operations per token of `apply_online` on `width` features, multiply and add counted apart."""
    total = 0
    for part in _parts(tensors):
        inner = len(part["left"]) + len(part["right"]) if "left" in part else part["blocks"].shape[-1]
        total += 2 * width * inner
    return total


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of each part, in the order in which the parts act."""
    if not any("." in name for name in tensors):
        yield tensors
        return
    for position in sorted({int(name.partition(".")[0]) for name in tensors}):
        prefix = f"{position}."
        yield {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
