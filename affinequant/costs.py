"""Arithmetic behind a plan: how much memory a step keeps, and how long a run may take."""

import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from affinequant.models import Dims, Family
from affinequant.models.sites import TOGETHER
from affinequant.recipe.assigned import Schemes
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.scheme import Scheme

JUDGED_TOKENS = 1024
"""Held-out tokens that judge what a block has learned, or one sample where samples are longer."""
FINISH_ROOM = 2 * 2**30
"""Main memory for what the blocks of the finish keep, in place of computing them again."""
KEPT_VALUES = 16
"""What a step keeps of a block for each token: so many times what is as wide as the stream, and as between up and down.
Its tensors are ten; the rest is what the allocator of glibc loses between them, measured on 30 blocks of width 576."""
KEPT_BYTES = 2**30
"""Room for what a pass has computed while a block is rounded; one that needs more goes through the block again for every
site."""
PROCESS_BYTES = 700 * 2**20
"""What Python, torch and transformers take, with the code and the threads of the first products: 590 MB before any model
is there, and a hundred more."""
CACHED_TOKENS = 4096
"""Tokens in a cache of which a plan says how many bits they take on average."""
GPU_FLOPS = 1.2e14
CPU_FLOPS_PER_CORE = 1e11
"""Rates behind the minutes of a plan: bfloat16 on a data-centre GPU; float32 on one core with AVX-512, half of what
bare products reach there (2e11 at a small model's widths): the rest goes to what lies between the products."""
_DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")
"""Where a driver of a GPU leaves a trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a stage takes: floating-point operations, and the bytes that it holds at once where the process has its memory
    and on the GPU. What is freed between stages is the next one's. Factors are from peaks that were measured step by step
    (`tests/test_plan.py` has them)."""

    flops: float = 0.0
    cpu: int = 0
    gpu: int = 0


def device_of(recipe: Recipe) -> str:
    """Where a recipe computes. torch alone knows whether it can use a GPU; it is not waited for where no driver has left a
    trace."""
    if recipe.device != "auto":
        return recipe.device
    if "torch" not in sys.modules and not any(os.path.exists(path) for path in _DRIVERS):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def stream_bytes(recipe: Recipe, dims: Dims, device: str) -> int:
    """One set of hidden states of all samples."""
    return recipe.samples * recipe.seq_len * dims.hidden * _width(recipe, device)


def kept_bytes(recipe: Recipe, dims: Dims, device: str) -> int:
    """What waits between blocks: both streams before one and both behind it; with an auxiliary loss what it aims at
    too."""
    return (4 + (recipe.aux_loss and recipe.epochs > 0)) * stream_bytes(recipe, dims, device)


def kept_in_cache(scheme: Scheme, family: Family, dims: Dims) -> dict[str, Any]:
    """What the tokens add that a quantised cache keeps in 16 bits, where it keeps some: by `cache_kept` which tokens, the
    bytes that a sequence holds for them, and the bits of a number in a cache of `tokens`."""
    if scheme.kv is None or not scheme.kept_rows:
        return {}
    attentions = sum(bool(block.attention) for block in family.each_block(dims))
    kept = {
        "first": scheme.kv.kept_first,
        "latest": scheme.kv.kept_latest,
        "bytes": 2 * 2 * attentions * dims.value * scheme.kept_rows,
        "tokens": CACHED_TOKENS,
        "bits": scheme.bits_per_cached(dims.head_dim, CACHED_TOKENS),
    }
    return {"cache_kept": kept}


def minutes(costs: Iterable[Cost], device: str) -> float:
    """How long stages may take, one after the other."""
    rate = GPU_FLOPS if device == "cuda" else CPU_FLOPS_PER_CORE * (os.cpu_count() or 1)
    return sum(cost.flops for cost in costs) / rate / 60


def linear_bits(schemes: Schemes, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, float]:
    """(weights, bits with their share of scales and zero points) of all linears of the blocks, by their shapes."""
    each = [(schemes[name], rows * columns, columns) for name, (rows, columns) in shapes.items()]
    bits = sum(count * (16 if scheme is None else scheme.bits_per_weight(columns)) for scheme, count, columns in each)
    return sum(count for _, count, _ in each), bits


def _width(recipe: Recipe, device: str) -> int:
    return 2 if (device == "cuda" and recipe.dtype != "float32") or recipe.dtype == "bfloat16" else 4


def _forward(recipe: Recipe, dims: Dims, per_block: int) -> int:
    """Operations of all samples' way through one block."""
    return 2 * recipe.samples * recipe.seq_len * (per_block - dims.idle + recipe.seq_len * dims.query)


def outer_cost(recipe: Recipe, dims: Dims, per_block: int, device: str) -> Cost:
    """The tables outside the blocks, as they are read and as they are stored, two of them in float32, and the rows in
    work."""
    table = dims.vocab * dims.hidden
    return Cost(cpu=14 * table + 2 * stream_bytes(recipe, dims, device), gpu=12 * table)


def block_cost(recipe: Recipe, dims: Dims, per_block: int, device: str) -> Cost:
    """One block: learned, rounded, and judged where there is a judge."""
    gpu, by_target = device == "cuda", recipe.rounding in ("gptaq", "auto")
    by_hessian, tokens = recipe.rounding != "nearest", recipe.samples * recipe.seq_len
    replayed = replay_bytes(tokens, dims)
    searched = by_hessian or "search" in recipe.weight_clip + recipe.activation_clip
    replayed *= (replayed <= KEPT_BYTES) * searched * (1 + by_target)
    replayed += (
        4 * tokens * (dims.hidden + 2 * dims.routed) * (1 + by_target) * bool(dims.experts)
    )  # what experts are given
    # The Hessian of the widest input, its factors, and the drift beside it.
    hessian = dims.widest**2 * by_hessian * (28 + 16 * by_target)
    work = (
        weight_bytes(recipe, dims, per_block, device)
        + hessian
        + graph_bytes(recipe, dims, _width(recipe, device))
        + replayed
    )
    passes = 3.0 + (3.5 * recipe.epochs) + (1.5 if by_hessian else 0) + (1.5 if by_target else 0)
    inner = dims.routed * dims.expert**2 + dims.shared**2 if dims.experts else dims.mlp**2
    gram = 2 * tokens * ((3 + dims.routed) * dims.hidden**2 + inner) * (by_hessian + by_target)
    search = 2 * 40 * per_block * dims.hidden if "search" in recipe.weight_clip else 0
    search += 2 * recipe.sweeps * per_block * dims.hidden
    steps = recipe.epochs * math.ceil(recipe.samples / recipe.batch_size) * per_block * 120
    judging = judged = 0.0
    if recipe.judge == "kl" and recipe.epochs:
        # At the start and after each epoch, on average through half of the blocks, and the logits of both models.
        each = dims.layers / 2 * per_block + 2 * dims.hidden * dims.vocab
        judging = 2 * min(tokens, max(JUDGED_TOKENS, recipe.seq_len)) * (recipe.epochs + 1) * each
        judged = 10 * dims.vocab * dims.hidden
    return Cost(
        flops=passes * _forward(recipe, dims, per_block) + gram + search + steps + judging,
        cpu=int((0 if gpu else work) + judged) + kept_bytes(recipe, dims, device),
        gpu=work if gpu else 0,
    )


def weight_bytes(recipe: Recipe, dims: Dims, per_block: int, device: str) -> int:
    """A block's weights while it is in work, in several precisions; of experts in 16 bits all of them, with what is kept of
    each, and in the others one at a time. Rotated ones are kept in float32, and learning keeps them as they are rounded."""
    one = 3 * dims.hidden * dims.expert
    waiting = min(one * max(dims.experts - 1, 0), per_block - one)
    kept = 2 + 4 * ("residual" in recipe.transforms) + (2 + _width(recipe, device) * (recipe.epochs > 0))
    together = min(2 * waiting // 3, TOGETHER) * 24
    return (per_block - waiting) * 30 + waiting * kept + together


def replay_bytes(tokens: int, dims: Dims) -> int:
    """What a pass over a block keeps between two of its sites: the inputs of both, and what goes to the stream."""
    return tokens * (2 * dims.hidden + dims.widest) * 4


def graph_bytes(recipe: Recipe, dims: Dims, width: int) -> int:
    """Activations that one step keeps for its backward pass, or one batch of a forward pass."""
    tokens = recipe.batch_size * recipe.seq_len
    kept = 14 if recipe.epochs else 4
    return tokens * (kept * dims.hidden + kept * dims.active) * max(width, 4) // 2 + tokens * recipe.seq_len * 4


def blocks_kept(recipe: Recipe, dims: Dims, per_block: int, device: str) -> tuple[int, int]:
    """Of how many blocks the finish keeps what their backward pass needs, and the bytes of each: they are not computed
    twice. Of none on a GPU, whose memory is planned without, or where main memory is limited."""
    each = 4 * per_block + KEPT_VALUES * recipe.seq_len * (dims.hidden + dims.active) * 4
    return (0 if device == "cuda" or recipe.cpu_memory else min(dims.layers, FINISH_ROOM // each)), each


def finish_cost(recipe: Recipe, dims: Dims, per_block: int, device: str) -> Cost:
    """The end-to-end finish: every block's codes, one block in work and those that are kept, one batch of logits."""
    step = recipe.seq_len * dims.hidden * 4 * (dims.layers + 24) + 256 * dims.vocab * 4 * 6
    count, each = blocks_kept(recipe, dims, per_block, device)
    table = dims.vocab * dims.hidden
    held = dims.layers * per_block + 12 * per_block + 8 * table + step + count * each
    # Forwards, backwards, and a part of the samples that judges; what is not kept is computed once more.
    passes = 4.5 * dims.layers - count
    logits = 4.5 * 2 * recipe.samples * recipe.seq_len * table
    return Cost(
        flops=recipe.distill.epochs * (passes * _forward(recipe, dims, per_block) + logits),
        cpu=held + 3 * stream_bytes(recipe, dims, device),
    )


def rotation_cost(recipe: Recipe, dims: Dims, per_block: int, device: str) -> Cost:
    """Learning rotations: one block in float32, what a step keeps, and the rotation with its optimizer."""
    tokens = min(recipe.seq_len, recipe.rotation.len)
    step = tokens * (dims.hidden * 4 * (dims.layers + 40) + 40 * dims.active) + 256 * dims.vocab * 4 * 6
    held = 12 * per_block + 8 * dims.vocab * dims.hidden + step + 64 * dims.hidden**2
    # Forwards, again while going backwards, and backwards to the inputs alone, with four products a token that turn.
    each = 2 * (per_block - dims.idle + 4 * dims.hidden**2 + recipe.rotation.len * dims.query)
    return Cost(
        flops=4.0 * recipe.rotation.steps * tokens * (dims.layers * each + 2 * dims.hidden * dims.vocab),
        cpu=held + 3 * stream_bytes(recipe, dims, device),
    )
