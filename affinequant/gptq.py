"""From real weights to codes: GPTQ on the inputs that the layer will see, and ranges found by search."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.quantizer import (
    codes_of,
    dequantize,
    fake_quantize_activation,
    grid,
    grouped,
    weight_range,
)
from affinequant.scheme import NumberFormat

WEIGHT_RATIOS = tuple(1.0 - 0.04 * step for step in range(12))
ACTIVATION_RATIOS = tuple(1.0 - 0.04 * step for step in range(11))
MAX_DAMPING_TRIES = 8


class GPTQFailure(ArithmeticError):
    """The Hessian could not be factored at any damping."""


def search_weight_range(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    fmt: NumberFormat,
    store: torch.dtype,
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """(low, high) per group that minimise the output error e H e^T of rounding to nearest.

    Ratios are tried on both ends together, then on each alone. A group is judged by its own block of H.
    """
    low, high = weight_range(weight, fmt)
    blocks = _diagonal_blocks(hessian, fmt.groups(weight.shape[1]))

    def error(at_low: Tensor, at_high: Tensor) -> Tensor:
        scale, zero = grid(at_low, at_high, fmt, store)
        wrong = grouped(dequantize(codes_of(weight, scale, zero, fmt), scale, zero, fmt) - weight, fmt)
        return torch.einsum("rgi,gij,rgj->rg", wrong, blocks, wrong)

    together = _best_ratio(lambda ratio: error(low * ratio, high * ratio), WEIGHT_RATIOS)
    best_low, best_high = low * together, high * together
    if fmt.symmetric:
        return best_low, best_high
    low_only = _best_ratio(lambda ratio: error(low * ratio, best_high), WEIGHT_RATIOS)
    best_low = torch.where(error(low * low_only, best_high) < error(best_low, best_high), low * low_only, best_low)
    high_only = _best_ratio(lambda ratio: error(best_low, high * ratio), WEIGHT_RATIOS)
    better = error(best_low, high * high_only) < error(best_low, best_high)
    return best_low, torch.where(better, high * high_only, best_high)


def search_activation_clip(
    x: Float[Tensor, "tokens columns"], weight: Float[Tensor, "rows columns"], fmt: NumberFormat
) -> float:
    """The clip ratio that minimises the layer's output error over its power, averaged over tokens."""
    power = (x @ weight.mT).square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    gram = weight.mT @ weight

    def error(ratio: float) -> float:
        wrong = fake_quantize_activation(x, fmt, ratio) - x
        return float((((wrong @ gram) * wrong).sum(-1) / power).mean())

    return min(ACTIVATION_RATIOS, key=error)


def gptq(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    fmt: NumberFormat,
    *,
    damping: float,
    block: int = 128,
) -> Float[Tensor, "rows columns"]:
    """Codes by GPTQ (arXiv 2210.17323): columns in the order of falling Hessian diagonal, each one's rounding error
    spread over those not yet rounded. Grids are given, so order does not move them.

    Raises:
        GPTQFailure: H cannot be factored even at ten thousand times the damping.
    """
    columns = weight.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order], damping)
    width = columns // scale.shape[1]
    group = order // width
    work, codes = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(work[:, start:stop])
        for column in range(start, stop):
            s, z = scale[:, group[column]], zero[:, group[column]]
            code = ((work[:, column] / s).round() + z).clamp(fmt.code_min, fmt.code_max)
            codes[:, column] = code
            wrong = (work[:, column] - (code - z) * s) / upper[column, column]
            work[:, column:stop] -= torch.outer(wrong, upper[column, column:stop])
            errors[:, column - start] = wrong
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes[:, torch.argsort(order)]


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian; damping grows tenfold until it exists."""
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    fraction = max(damping, 1e-8)
    for _ in range(MAX_DAMPING_TRIES):
        damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (fraction * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper
        fraction *= 10
    raise GPTQFailure(f"Hessian of {len(hessian)} inputs not positive definite at damping {fraction / 10:g}")


def _diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """[count, n / count, n / count]."""
    width = len(matrix) // count
    return matrix.reshape(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _best_ratio(error: Callable[[float], Tensor], ratios: tuple[float, ...]) -> Tensor:
    """For each group, the ratio with the smallest error (the widest where equal)."""
    best_error = error(ratios[0])
    best = torch.full_like(best_error, ratios[0])
    for ratio in ratios[1:]:
        now = error(ratio)
        better = now < best_error
        best = torch.where(better, torch.full_like(best, ratio), best)
        best_error = torch.where(better, now, best_error)
    return best
