"""GrokAlign: identities of Jacobians that hold exactly, its experiments in seconds, and trainings that resume."""

import math

import pytest
import torch
from affinequant_research.grokalign.jacobian import (
    centroid_alignment,
    frobenius,
    jacobian_norms,
    jacobians,
    leading_share,
    row_alignment,
)
from torch import Tensor, nn

from affinequant.errors import AffineQuantError


def net(*widths: int, bias: bool = False, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(a, b, bias=bias, dtype=torch.float64) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def points(n: int, width: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_euler_relation_and_what_follows_from_it() -> None:
    network, x = net(6, 16, 16, 4), points(9, 6)
    jacobian, outputs = jacobians(network, x), network(x).detach()
    assert jacobian.shape == (9, 4, 6)
    torch.testing.assert_close(torch.einsum("ncd,nd->nc", jacobian, x), outputs)
    product = row_alignment(jacobian, x) * frobenius(jacobian) * x.norm(dim=1)
    torch.testing.assert_close(product, outputs.norm(dim=1))
    along = centroid_alignment(jacobian, x) * jacobian.sum(1).norm(dim=1) * x.norm(dim=1)
    torch.testing.assert_close(along, outputs.sum(1))
    with_bias = net(6, 16, 4, bias=True)
    assert not torch.allclose(torch.einsum("ncd,nd->nc", jacobians(with_bias, x), x), with_bias(x))


def test_alignment_and_rank_of_jacobians_made_by_hand() -> None:
    x = points(3, 5)
    aligned = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[None, :, None] * x[:, None]
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(row_alignment(aligned, x), ones)
    torch.testing.assert_close(leading_share(aligned), ones)
    torch.testing.assert_close(centroid_alignment(aligned, x), -ones)  # the rows' factors sum to -0.5
    equal = torch.eye(4, 5, dtype=torch.float64)[None]
    torch.testing.assert_close(leading_share(equal), ones[:1] / 4)
    torch.testing.assert_close(frobenius(equal), 2 * ones[:1])


@pytest.mark.parametrize(("rank", "bias"), [(1, 0.818), (2, 0.909), (10, 1.0)])
def test_the_published_estimate_is_too_small_by_what_is_known(rank: int, bias: float) -> None:
    """E of the root of C |v^T J|^2 over |J|; with equal singular values it is Gamma((r+1)/2) Gamma(C/2) sqrt(C/r) /
    (Gamma(r/2) Gamma((C+1)/2))."""
    torch.manual_seed(rank)
    many = 40_000
    inputs = torch.zeros(many, 10, dtype=torch.float64, requires_grad=True)
    outputs = inputs * (torch.arange(10) < rank)
    norm = math.sqrt(rank)
    exact = math.exp(math.lgamma((rank + 1) / 2) + math.lgamma(5) - math.lgamma(rank / 2) - math.lgamma(5.5))
    assert exact * math.sqrt(10 / rank) == pytest.approx(bias, abs=6e-4)
    found = jacobian_norms(outputs, inputs).detach() / norm
    assert float(found.mean()) == pytest.approx(bias, abs=5 * float(found.std()) / math.sqrt(many) + 6e-4)
    squared = jacobian_norms(outputs, inputs, "squared").detach() / rank
    assert float(squared.mean()) == pytest.approx(1, abs=5 * float(squared.std()) / math.sqrt(many) + 1e-12)
    torch.testing.assert_close(jacobian_norms(outputs, inputs, "exact").detach(), torch.full((many,), norm).double())


def test_all_estimates_agree_on_a_network() -> None:
    torch.manual_seed(0)
    network, x, many = net(6, 16, 4), points(5, 6), 4000
    exact = torch.func.vmap(torch.func.jacrev(lambda sample: network(sample[None])[0]))(x)
    torch.testing.assert_close(jacobians(network, x), exact.detach())
    truth = frobenius(jacobians(network, x))
    inputs = x.repeat(many, 1).requires_grad_()
    outputs = network(inputs)
    torch.testing.assert_close(jacobian_norms(outputs, inputs, "exact")[:5].detach(), truth)
    squared = jacobian_norms(outputs, inputs, "squared").detach().reshape(many, 5).mean(0)
    torch.testing.assert_close(squared.sqrt(), truth, rtol=0.05, atol=0)
    roots = jacobian_norms(outputs, inputs, count=16).detach().reshape(many, 5).mean(0)
    torch.testing.assert_close(roots, truth, rtol=0.05, atol=0)
    assert (roots < truth).all()  # the mean of 16 under the root is nearly without the bias of one
    with pytest.raises(AffineQuantError, match="did you mean 'exact'"):
        jacobian_norms(outputs, inputs, "exakt")  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["projected", "squared", "exact"])
def test_the_penalty_has_the_gradient_of_finite_differences(estimator: str) -> None:
    network, x = net(5, 12, 12, 3), points(7, 5)

    def penalty() -> Tensor:
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        return jacobian_norms(network(inputs), inputs, estimator).mean()  # type: ignore[arg-type]

    parameters = list(network.parameters())
    gradients = torch.autograd.grad(penalty(), parameters)
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, direction in zip(parameters, along, strict=True):
                p.add_(direction, alpha=sign * step)
        values.append(float(penalty().detach()))
        with torch.no_grad():
            for p, direction in zip(parameters, along, strict=True):
                p.sub_(direction, alpha=sign * step)
    expected = (values[0] - values[1]) / (2 * step)
    inner = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
    assert inner == pytest.approx(expected, rel=1e-6)
