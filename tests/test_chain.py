"""Two transforms at one site: equivalence, inverses and where starts go."""

import torch

from affinequant.models import LLAMA, Dims, resolve_sites
from affinequant.transforms import build, structures_of

DIMS = Dims(layers=1, hidden=32, mlp=48, heads=4, kv_heads=2, head_dim=8, vocab=16, tied=False)
VO = next(site for site in resolve_sites(LLAMA, DIMS) if site.name == "vo")


def test_a_chain_cancels_between_activations_and_weights() -> None:
    chain = build("hadamard+banded", VO, seed=0, alpha=0.5).double()
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, w = torch.randn(5, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    assert torch.allclose(chain.on_activations(x) @ chain.on_weights(w).mT, x @ w.mT, atol=1e-12)


def test_the_start_goes_to_the_first_part() -> None:
    start = torch.linspace(0.5, 2.0, 16)
    first = build("diagonal+hadamard", VO, seed=0, alpha=0.1, start=start)
    assert torch.allclose(first.on_activations(torch.eye(16))[0].norm(), start[0])
    assert structures_of("hadamard+banded", where="") == ("hadamard", "per-head")
