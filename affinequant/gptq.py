"""From real weights to codes: GPTQ on the inputs that the layer will see, and ranges found by search."""

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

WEIGHT_RATIOS = tuple(1.0 - 0.05 * step for step in range(1, 10))
END_RATIOS = (0.8, 0.9, 1.1)
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

    Ratios are tried on both ends together, then nearby ones on each end alone. A group is judged by its own block of H.
    """
    low, high = weight_range(weight, fmt)
    blocks = _diagonal_blocks(hessian, fmt.groups(weight.shape[1]))

    def error(at_low: Tensor, at_high: Tensor) -> Tensor:
        scale, zero = grid(at_low, at_high, fmt, store)
        wrong = grouped(dequantize(codes_of(weight, scale, zero, fmt), scale, zero, fmt) - weight, fmt).transpose(0, 1)
        return ((wrong @ blocks) * wrong).sum(-1).mT

    best_error = error(low, high)
    best_low, best_high = low, high
    for ratio in WEIGHT_RATIOS:
        candidate = (low * ratio, high * ratio)
        best_low, best_high, best_error = _better(best_low, best_high, best_error, *candidate, error(*candidate))
    if fmt.symmetric:
        return best_low, best_high
    for end in (0, 1):
        start_low, start_high = best_low, best_high
        for ratio in END_RATIOS:
            candidate = (start_low * ratio, start_high) if end == 0 else (start_low, start_high * ratio)
            best_low, best_high, best_error = _better(best_low, best_high, best_error, *candidate, error(*candidate))
    return best_low, best_high


def search_activation_clip(
    x: Float[Tensor, "tokens columns"], weight: Float[Tensor, "rows columns"], fmt: NumberFormat, slices: int = 1
) -> float:
    """The clip ratio that minimises the layer's output error over its power, averaged over tokens; each of `slices`
    parts of a token has a grid of its own."""
    power = (x @ weight.mT).square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    gram = weight.mT @ weight if len(weight) > weight.shape[1] else None

    def error(ratio: float) -> float:
        wrong = fake_quantize_activation(x, fmt, ratio, slices) - x
        squared = (wrong @ weight.mT).square() if gram is None else (wrong @ gram) * wrong
        return float((squared.sum(-1) / power).mean())

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


def _better(
    low: Tensor, high: Tensor, error: Tensor, other_low: Tensor, other_high: Tensor, other_error: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of two ranges for each group, the one with the smaller error (the first where equal)."""
    better = other_error < error
    return (
        torch.where(better, other_low, low),
        torch.where(better, other_high, high),
        torch.where(better, other_error, error),
    )
