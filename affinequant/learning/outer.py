"""The stage of what lies outside the blocks: embedding, final norm and head."""

import time

import torch

from affinequant.learning.network import costs, read_outer, store_dtype
from affinequant.learning.work import Work
from affinequant.models.decoder import slices
from affinequant.plan import Plan
from affinequant.stages import Carry, Stage
from affinequant.transforms import Transform
from affinequant.transforms.fold import Tensors, rotate_outer

TABLE_ROWS = 4096
"""Rows of the embedding and of the head that are rotated at once."""


def outer_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """Rotated where the recipe asks for it, never quantised. The embedded calibration tokens wait on disk, as the blocks'
    inputs do on their first way to a device."""
    made, decoder, rotation = work.made, work.decoder, work.rotations[0]
    began, tensors = time.perf_counter(), read_outer(made, decoder)
    if made.dims.tied:
        tensors.pop(f"{made.family.head}.weight", None)
    if rotation is None:
        store = store_dtype(made)
        stored = {name: tensor.to(store) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    else:
        stored = rotated(made, tensors, rotation)
    del tensors
    hidden, _ = decoder.embed(work.tokens.ids, stored)
    work.run.commit(stage.name, tensors=stored, carry={"full": hidden}, report=costs(began, decoder.device))
    return {}


def rotated(made: Plan, tensors: Tensors, rotation: Transform) -> Tensors:
    """The tensors outside the blocks, rotated in fp64 some rows of the tables at a time, as they are stored."""
    family, store = made.family, store_dtype(made)
    tables = {f"{module}.weight" for module in (family.embedding, family.head)}
    shape = tensors[f"{family.embedding}.weight"].shape
    stored = {name: torch.empty(shape, dtype=store) for name in tables}
    for part in slices(shape[0], TABLE_ROWS):
        rows = {name: (tensor[part] if name in tables else tensor).double() for name, tensor in tensors.items()}
        for name, tensor in rotate_outer(rows, family, made.sites["residual"], rotation).items():
            if name in tables:
                stored[name][part] = tensor
            else:
                stored[name] = tensor.to(store)
    return stored
