"""From real weights to codes: GPTQ on the inputs that the layer will see, and ranges found by search."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.numbers import Grid
from affinequant.numbers.weights import dequantize, grouped, weight_range
from affinequant.transforms.site_input import SiteInput

WEIGHT_RATIOS = tuple(1.0 - 0.05 * step for step in range(1, 10))
END_RATIOS = (0.8, 0.9, 1.1)
ACTIVATION_RATIOS = tuple(1.0 - 0.04 * step for step in range(11))
MAX_DAMPING_TRIES = 8
PANEL = 192
"""Columns of a Hessian that are taken at once where its symmetry halves the work."""


class GPTQFailure(ArithmeticError):
    """The Hessian could not be factored at any damping."""


def search_weight_range(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    grid: Grid,
    store: torch.dtype,
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """(low, high) per group that minimise the output error e H e^T of rounding to nearest.

    Ratios are tried on both ends together, then nearby ones on each end alone. A group is judged by its own block of H.
    """
    low, high = weight_range(weight, grid)
    parts = grouped(weight, grid).transpose(0, 1).contiguous()
    panels = _panels(_diagonal_blocks(hessian, len(parts)))

    def error(at_low: Tensor, at_high: Tensor) -> Tensor:
        scale, zero = (part.mT[..., None] for part in grid.params(at_low, at_high, store))
        codes = grid.nearest(parts, scale, zero)
        return _quadratic(grid.value(codes, scale, zero, out=codes).sub_(parts), panels).mT

    best_error = error(low, high)
    best_low, best_high = low, high
    for ratio in (*WEIGHT_RATIOS, *grid.WIDER):
        candidate = (low * ratio, high * ratio)
        best_low, best_high, best_error = _better(best_low, best_high, best_error, *candidate, error(*candidate))
    if grid.fmt.symmetric:
        return best_low, best_high
    for end in (0, 1):
        start_low, start_high = best_low, best_high
        for ratio in END_RATIOS:
            candidate = (start_low * ratio, start_high) if end == 0 else (start_low, start_high * ratio)
            best_low, best_high, best_error = _better(best_low, best_high, best_error, *candidate, error(*candidate))
    return best_low, best_high


def search_activation_clip(
    x: Float[Tensor, "tokens columns"],
    weight: Float[Tensor, "rows columns"] | Iterable[Float[Tensor, "rows columns"]],
    site_input: SiteInput,
) -> float:
    """The clip ratio with which `site_input` should round x: it minimises the layer's output error over its power,
    averaged over tokens. The weight may come in several matrices, one below the other, which are gone through once."""
    power, gram, few = x.new_zeros(len(x)), None, list[Tensor]()
    for part in (weight,) if isinstance(weight, Tensor) else weight:
        power += (x @ part.mT).square().sum(-1)
        if len(part) > part.shape[1]:
            gram = part.mT @ part if gram is None else gram.add_(part.mT @ part)
        else:
            few.append(part)
    power.clamp_min_(torch.finfo(torch.float32).tiny)

    def error(ratio: float) -> float:
        wrong = replace(site_input, clip=ratio).rounded(x) - x
        squared = torch.zeros_like(power) if gram is None else ((wrong @ gram) * wrong).sum(-1)
        for part in few:
            squared += (wrong @ part.mT).square().sum(-1)
        return float((squared / power).mean())

    return min(ACTIVATION_RATIOS, key=error)


def gptq(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    grid: Grid,
    *,
    damping: float,
    block: int = 32,
) -> Float[Tensor, "rows columns"]:
    """Codes by GPTQ (arXiv 2210.17323): columns in the order of falling Hessian diagonal, each one's rounding error
    spread over those not yet rounded. Grids are given, so order does not move them.

    Raises:
        GPTQFailure: H cannot be factored even at ten thousand times the damping.
    """
    columns = weight.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order], damping)
    group = (order // (columns // scale.shape[1])).tolist()
    # One input after the other, each contiguous over the outputs.
    work, scales, zeros = weight.mT[order].contiguous(), scale.mT.contiguous(), zero.mT.contiguous()
    codes, pivots = torch.empty_like(work), upper.diagonal().tolist()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(work[start:stop])
        for column in range(start, stop):
            s, z, wrong = scales[group[column]], zeros[group[column]], errors[column - start]
            code = grid.nearest(work[column], s, z, out=codes[column])
            torch.sub(work[column], grid.value(code, s, z), out=wrong).div_(pivots[column])
            work[column + 1 : stop].addr_(upper[column, column + 1 : stop], wrong, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].mT, errors, alpha=-1)
    return codes[torch.argsort(order)].mT.contiguous()


def refine(
    codes: Float[Tensor, "rows columns"],
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    grid: Grid,
    *,
    damping: float,
    sweeps: int,
    block: int = 32,
) -> Float[Tensor, "rows columns"]:
    """Codes that err less than those given, e H e^T under the damped H, by coordinate descent (QuantEase, arXiv
    2309.01885): `sweeps` times over, each column in turn takes the code that is best while all others stay."""
    if not sweeps:
        return codes
    columns, hessian = weight.shape[1], _damped(hessian, damping * hessian.diagonal().mean())
    if not bool((hessian.diagonal() > 0).all()):
        return codes
    group = [column // (columns // scale.shape[1]) for column in range(columns)]
    curvature, scales, zeros = hessian.diagonal().tolist(), scale.mT.contiguous(), zero.mT.contiguous()
    # One input after the other, each contiguous over the outputs.
    codes, value = codes.mT.contiguous(), dequantize(codes, scale, zero, grid).mT.contiguous()
    errors = weight.mT - value
    for start in list(range(0, columns, block)) * sweeps:
        stop = min(start + block, columns)
        slope, local = hessian[start:stop] @ errors, hessian[start:stop, start:stop]
        for column in range(start, stop):
            s, z, row = scales[group[column]], zeros[group[column]], column - start
            wanted = value[column] + slope[row] / curvature[column]
            code = grid.nearest(wanted, s, z, out=codes[column])
            step = grid.value(code, s, z).sub_(value[column])
            value[column] += step
            errors[column] -= step
            slope[row + 1 :].addr_(local[row + 1 :, row], step, alpha=-1)
    return codes.mT.contiguous()


def follow_target(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    drift: Float[Tensor, "columns columns"],
    *,
    damping: float,
) -> Float[Tensor, "rows columns"]:
    """The real weights that make of quantised inputs x what `weight` makes of full-precision inputs t: W + W D H^-1 with
    D = E[(t - x)^T x] and H = E[x^T x].

    The least squares solution of E|x V^T - t W^T|^2, whose value at any V is a constant plus the error of V against it
    under H. So GPTQ on it is GPTQ with the asymmetric target of GPTAQ (arXiv 2504.02692), whatever the order of columns.

    Raises:
        GPTQFailure: as `gptq`.
    """
    upper = _inverse_factor(hessian, damping)
    return weight + weight @ drift @ (upper.mT @ upper)


def _damped(hessian: Tensor, amount: Tensor) -> Tensor:
    return hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * amount


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian; damping grows tenfold until it exists."""
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    fraction = max(damping, 1e-8)
    for _ in range(MAX_DAMPING_TRIES):
        lower, failed = torch.linalg.cholesky_ex(_damped(hessian, fraction * mean))
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


def _panels(matrices: Float[Tensor, "count n n"]) -> list[Float[Tensor, "count above width"]]:
    """Symmetric matrices as panels of columns down to the diagonal, twice what stands above the panel's own rows."""
    panels = []
    for start in range(0, matrices.shape[-1], PANEL):
        panel = matrices[..., : start + PANEL, start : start + PANEL].clone()
        panel[..., :start, :] *= 2
        panels.append(panel)
    return panels


def _quadratic(rows: Float[Tensor, "count rows n"], panels: list[Tensor]) -> Float[Tensor, "count rows"]:
    """e M e^T of each row e, for M in panels: half the work of the plain product."""
    total = rows.new_zeros(rows.shape[:-1])
    for panel in panels:
        stop, width = panel.shape[-2:]
        total += ((rows[..., :stop] @ panel) * rows[..., stop - width : stop]).sum(-1)
    return total


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
