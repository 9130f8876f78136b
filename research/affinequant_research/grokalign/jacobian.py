"""Jacobians of a network's outputs with respect to its inputs: their norm as a penalty, and how they lie to the input.

Notation: of one sample, x in R^d, f(x) in R^C, J = df/dx (C x d). A network without biases whose activations are piecewise
linear has J x = f(x) (Euler), so with A = |J x| / (|J| |x|) in [0, 1] it holds |f(x)| = A |J| |x|: where f(x) is given by
the labels, a smaller norm is the same thing as a greater alignment A (arXiv 2506.12284).
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.errors import unknown_name

Estimator = Literal["projected", "squared", "exact"]
"""Of |J| by random projections as published, of |J|^2 without bias, |J| itself by a backward pass for each output."""
SMALLEST = 1e-8
"""Where the square root of a sample's squared norm stops, and its gradient with it."""


def jacobian_norms(
    outputs: Float[Tensor, "n C"], inputs: Float[Tensor, "n *d"], estimator: Estimator = "projected", count: int = 1
) -> Float[Tensor, " n"]:
    """The norm of each sample's Jacobian out of the forward pass that has been made, differentiable in the parameters.

    With v uniform on the unit sphere of R^C, E C |v^T J|^2 = |J|^2 (Hoffman, Roberts and Yaida, arXiv 1908.02729). The
    published penalty is the root of the mean of `count` such draws. One draw under a root is too small where J has few
    directions: of C = 10 outputs by .818 for rank one, by .909 for two equal singular values, by 1 for ten. So it asks
    less of a Jacobian of low rank than of another with the same norm.

    Args:
        inputs: what the outputs were computed from, with gradients; of each sample alone (no batch normalisation).
        count: projections (not of `exact`).

    Raises:
        AffineQuantError: no such estimator.
    """
    if estimator not in get_args(Estimator):
        raise unknown_name("estimator", estimator, get_args(Estimator), where="--set estimator")
    if estimator == "exact":
        return _squares(outputs, inputs, _each_output(outputs)).sum(0).clamp_min(SMALLEST).sqrt()
    draws = torch.nn.functional.normalize(torch.randn(count, *outputs.shape).to(outputs), dim=-1)
    squared = outputs.shape[-1] * _squares(outputs, inputs, draws).mean(0)
    return squared if estimator == "squared" else squared.clamp_min(SMALLEST).sqrt()


def jacobians(network: Callable[[Tensor], Tensor], x: Float[Tensor, "n *d"]) -> Float[Tensor, "n C D"]:
    """Each sample's Jacobian, its inputs flattened, exactly: a backward pass for each output, as `torch.func.jacrev` makes
    them, of all samples together. Not differentiable."""
    with torch.enable_grad():
        inputs = x.detach().clone().requires_grad_()
        outputs = network(inputs)
        rows = [torch.autograd.grad(outputs, inputs, v, retain_graph=True)[0].flatten(1) for v in _each_output(outputs)]
    return torch.stack(rows, dim=1)


def frobenius(jacobian: Float[Tensor, "n C d"]) -> Float[Tensor, " n"]:
    """|J|, the root of the sum of squares."""
    return jacobian.flatten(1).norm(dim=1)


def centroid_alignment(jacobian: Float[Tensor, "n C d"], x: Float[Tensor, "n *d"]) -> Float[Tensor, " n"]:
    """cos(mu, x) of the centroid mu = J^T 1 of the linear region in which x lies, -1 to 1. Ill-conditioned where only
    differences of outputs are trained, as by cross-entropy: the sum of the rows is then free."""
    return torch.nn.functional.cosine_similarity(jacobian.sum(1), x.flatten(1), dim=1)


def row_alignment(jacobian: Float[Tensor, "n C d"], x: Float[Tensor, "n *d"]) -> Float[Tensor, " n"]:
    """A = |J x| / (|J| |x|): 1 where every row of J is parallel to x, and J of rank one with it."""
    along = torch.einsum("ncd,nd->nc", jacobian, x.flatten(1)).norm(dim=1)
    return along / (frobenius(jacobian) * x.flatten(1).norm(dim=1)).clamp_min(torch.finfo(x.dtype).tiny)


def leading_share(jacobian: Float[Tensor, "n C d"]) -> Float[Tensor, " n"]:
    """PC1 = s_1^2 / sum s_i^2 over singular values: 1 for rank one, 1 / min(C, d) where all are equal."""
    squared = torch.linalg.svdvals(jacobian).square()
    return squared[:, 0] / squared.sum(1).clamp_min(torch.finfo(jacobian.dtype).tiny)


def _squares(outputs: Tensor, inputs: Tensor, cotangents: Float[Tensor, "K n C"]) -> Float[Tensor, "K n"]:
    """|v^T J|^2 of each cotangent and sample."""
    pulled = [torch.autograd.grad(outputs, inputs, v, create_graph=True)[0] for v in cotangents]
    return torch.stack([one.flatten(1).square().sum(1) for one in pulled])


def _each_output(outputs: Float[Tensor, "n C"]) -> Float[Tensor, "C n C"]:
    """Every output of every sample as a cotangent."""
    return torch.eye(outputs.shape[-1]).to(outputs)[:, None].expand(-1, len(outputs), -1)


def spectrum(
    function: Callable[[Tensor], Tensor], x: Tensor, draws: int, rounds: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(|J|^2, s_1^2) of a function whose Jacobian is too large to write down, all of x taken as one input.

    The first is the mean over `draws` Gaussian v of |J^T v|^2, without bias; the second comes out of `rounds` of power
    iteration on J^T J, from below.
    """
    with torch.enable_grad():
        inputs = x.detach().clone().requires_grad_()
        outputs = function(inputs)
        zero = torch.zeros_like(outputs, requires_grad=True)
        (pulled,) = torch.autograd.grad(outputs, inputs, zero, create_graph=True)  # J^T v, linear in v

        def pull(v: Tensor) -> Tensor:
            return torch.autograd.grad(outputs, inputs, v, retain_graph=True)[0]

        total = sum(pull(torch.randn_like(outputs)).square().sum() for _ in range(draws))
        along = torch.randn_like(inputs)
        for _ in range(rounds):  # J w is the gradient of <J^T v, w> with respect to v
            along = pull(torch.autograd.grad(pulled, zero, along / along.norm(), retain_graph=True)[0])
    return torch.as_tensor(total) / draws, along.norm()
