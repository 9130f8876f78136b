"""What stays at run time: the small matrices are the transform, they cost what the plan says, and names are split
into what folds and what stays."""

import itertools
from typing import Any

import pytest
import torch

from affinequant.errors import AffineQuantError
from affinequant.models import LLAMA, Dims, resolve_sites
from affinequant.models.sites import Edge, Kind, Site, kronecker_factors, place
from affinequant.transforms import TRANSFORMS, build, split_parts, structures_of
from affinequant.transforms.kronecker import Kronecker
from affinequant.transforms.online import apply_online, flops
from affinequant.transforms.svd import LIMIT, BoundedMatrix
from affinequant.transforms.wush import balance, wush_kronecker_rows
from tests.test_transforms import random, randomised

WIDTHS = (1, 16, 60, 61, 72, 96)
GQA = Dims(layers=2, hidden=64, mlp=96, heads=4, kv_heads=2, head_dim=24, vocab=320, tied=False)
SITES = {s.name: s for s in resolve_sites(LLAMA, GQA)}


def site(kind: Kind, width: int) -> Site:
    source, sink = Edge(module="m", side="rows"), Edge(module="n", side="columns")
    return Site(name="s", kind=kind, width=width, sources=(source,), sinks=(sink,))


def online(name: str, where: Site) -> bool:
    return all(place(where, structure).how == "online" for structure in structures_of(name, where="test"))


KINDS: tuple[Kind, ...] = ("norm", "linear")
ONLINE = [
    (name, where)
    for name in TRANSFORMS
    for where in [*(site(kind, width) for kind, width in itertools.product(KINDS, WIDTHS)), SITES["vo"]]
    if online(name, where)
]


def read_width(where: Site) -> int:
    return where.width * where.sinks[0].copies


def identify(value: Any) -> str:
    return f"{value.kind}-{value.width}" if isinstance(value, Site) else str(value)


def test_the_matrix_is_not_empty() -> None:
    assert {name for name, _ in ONLINE} >= {"kronecker", "hadamard"}
    assert any(where.kind == "heads" for _, where in ONLINE)


@pytest.mark.parametrize(("name", "where"), ONLINE, ids=identify)
def test_what_runs_is_the_transform_that_the_weights_were_shaped_for(name: str, where: Site) -> None:
    transform, n = randomised(build(name, where, seed=3, alpha=1.0)), read_width(where)
    x, w = random(2, 5, n), random(7, n, seed=1)
    tensors = transform.online()
    assert all(not tensor.requires_grad and tensor.dtype == torch.float64 for tensor in tensors.values())
    y = apply_online(x, tensors)
    torch.testing.assert_close(y, transform.on_activations(x, where.sinks[0].copies), rtol=1e-12, atol=1e-12)
    shaped = transform.on_weights(w, where.sinks[0].copies)
    torch.testing.assert_close(y @ shaped.mT, x @ w.mT, rtol=1e-10, atol=1e-10)
    if n > 1:
        assert float((y - x).abs().max()) > 0.1


@pytest.mark.parametrize(("name", "where"), ONLINE, ids=identify)
def test_it_costs_what_the_plan_says(name: str, where: Site) -> None:
    tensors: Any = build(name, where, seed=3, alpha=1.0)
    (structure,) = structures_of(name, where="test")
    assert flops(tensors.online(), read_width(where)) == place(where, structure).flops


@pytest.mark.parametrize(("name", "where"), ONLINE, ids=identify)
def test_the_condition_number_is_the_matrix_s(name: str, where: Site) -> None:
    transform = randomised(build(name, where, seed=3, alpha=1.0), 0.2)
    matrix = apply_online(torch.eye(read_width(where), dtype=torch.float64), transform.online())
    # Of blocks, the worst block's: a factor between blocks is no difficulty for any of them.
    width = transform.online()["blocks"].shape[-1] if "blocks" in transform.online() else len(matrix)
    blocks = matrix.unfold(0, width, width).unfold(1, width, width).diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    assert transform.condition() == pytest.approx(float(torch.linalg.cond(blocks).max()), rel=1e-6)


def test_online_tensors_follow_the_input_s_dtype() -> None:
    transform: Any = build("kronecker", site("norm", 60), seed=0, alpha=1.0)
    assert transform.online()["left"].dtype == torch.float32
    assert apply_online(torch.randn(3, 60, dtype=torch.bfloat16), transform.online()).dtype == torch.bfloat16


def test_parts_of_a_chain_act_in_order() -> None:
    chain: Any = randomised(build("hadamard+kronecker", site("norm", 60), seed=0, alpha=1.0))
    assert set(chain.online()) == {"0.left", "0.right", "1.left", "1.right"}
    x = random(4, 60)
    torch.testing.assert_close(apply_online(x, chain.online()), chain.on_activations(x))
    assert flops(chain.online(), 60) == 2 * 60 * (15 + 4 + 6 + 10)


def test_one_matrix_serves_queries_and_keys() -> None:
    """After RoPE a Hadamard rotation acts on every query head and on the KV head that it reads."""
    transform: Any = build("hadamard", SITES["qk"], seed=3, alpha=1.0)
    assert transform.online()["blocks"].shape == (1, 24, 24)
    for copies in (1, 2):
        x = random(5, 48 * copies)
        torch.testing.assert_close(apply_online(x, transform.online()), transform.on_activations(x, copies))


@pytest.mark.parametrize("width", [576, 1536, 4864, 11008, 14336, 18944, 1009])
def test_kronecker_of_the_widths_of_real_models(width: int) -> None:
    transform: Any = randomised(build("kronecker", site("linear", width), seed=0, alpha=1.0), 0.1)
    x, w = random(3, width), random(4, width, seed=1)
    product = transform.on_activations(x) @ transform.on_weights(w).mT
    torch.testing.assert_close(product, x @ w.mT, rtol=1e-8, atol=1e-8)


def test_kronecker_starts_from_its_factors() -> None:
    n1, n2 = kronecker_factors(SITES["vo"])
    first, second = random(n1, n1), random(n2, n2, seed=1)
    transform: Any = build("kronecker", SITES["vo"], seed=0, alpha=1.0, start=(first, second)).double()
    tensors = transform.online()
    torch.testing.assert_close(tensors["left"], first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tensors["right"], second, rtol=1e-12, atol=1e-12)
    assert torch.equal(Kronecker(SITES["vo"], seed=0, alpha=1.0).online()["left"], torch.eye(n1))


def test_a_closed_form_start_is_built_part_by_part() -> None:
    where = SITES["mlp_mid"]
    folded, stays = split_parts("diagonal+kronecker", where)
    x, w = random(200, 96) * torch.logspace(-2, 2, 96), random(64, 96, seed=1)
    d = balance(x.square().sum(0), w.square().sum(0))
    factors = wush_kronecker_rows(x * d, w / d, *kronecker_factors(where))
    first: Any = build(folded, where, seed=0, alpha=1.0, start=d).double()
    second: Any = build(stays, where, seed=1, alpha=1.0, start=factors).double()
    y = apply_online(first.on_activations(x), second.online())
    torch.testing.assert_close(y, x * d @ torch.kron(*factors), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y @ second.on_weights(first.on_weights(w)).mT, x @ w.mT)
    energies = y.detach().square().sum(0)
    assert float(energies.max() / energies.min()) < 3 < float(x.square().sum(0).max() / x.square().sum(0).min())


def test_a_bounded_matrix_starts_where_it_is_told_and_its_two_forms_cancel() -> None:
    start = random(3, 20, 20)
    assert torch.linalg.cond(start).max() < 2900
    bounded = BoundedMatrix(3, 20, start=start)
    torch.testing.assert_close(bounded.matrix(), start.float(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # as if trained in fp32
        for parameter in bounded.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    fp32 = bounded.matrix().detach().double()
    double = bounded.double()
    product = double.matrix() @ double.inverse_transpose().mT
    torch.testing.assert_close(product, torch.eye(20).double().expand(3, 20, 20), rtol=0, atol=1e-12)
    torch.testing.assert_close(double.matrix().detach(), fp32, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e3, 1e6])
def test_the_spectrum_is_bounded_whatever_the_parameters(size: float) -> None:
    bounded = randomised(BoundedMatrix(2, 12, start=random(2, 12, 12)), size)
    most = torch.linalg.cond(bounded.matrix().detach()).max()
    assert float(most) == pytest.approx(bounded.condition(), rel=1e-6)
    assert bounded.condition() <= torch.tensor(2 * LIMIT).exp() * (1 + 1e-12)
    bounded.float().matrix().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in bounded.parameters())


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_singular_start_is_raised_to_the_bound(rank: int) -> None:
    start = random(8, rank) @ random(rank, 8, seed=1)
    bounded = BoundedMatrix(8, start=start).double()
    assert bounded.condition() < torch.tensor(2 * LIMIT).exp()
    assert bool(bounded.inverse_transpose().isfinite().all())
    if rank == 3:  # what was there stays
        torch.testing.assert_close(torch.linalg.svdvals(bounded.matrix())[:3], torch.linalg.svdvals(start)[:3])


def test_names_are_split_into_what_folds_and_what_stays() -> None:
    assert split_parts("diagonal+kronecker", SITES["attn_in"]) == ("diagonal", "kronecker")
    assert split_parts("diagonal", SITES["mlp_mid"]) == ("diagonal", "")
    assert split_parts("hadamard+kronecker", SITES["mlp_mid"]) == ("", "hadamard+kronecker")
    assert split_parts("hadamard+banded+kronecker", SITES["vo"]) == ("hadamard+banded", "kronecker")


@pytest.mark.parametrize(
    ("site_name", "name", "what", "fix"),
    [
        ("attn_in", "kronecker+diagonal", "follows kronecker", r"diagonal\+kronecker"),
        ("vo", "hadamard+kronecker+banded", "follows kronecker", r"banded\+hadamard\+kronecker"),
        ("qk", "kronecker", "kronecker at qk is refused", "folded there: rope-pair; online there: hadamard"),
        ("residual", "diagonal", "only orthogonal maps", "folded there: hadamard"),
        ("attn_in", "kroneker", "unknown transform", "did you mean 'kronecker'"),
    ],
)
def test_what_cannot_be_split_says_what_to_do(site_name: str, name: str, what: str, fix: str) -> None:
    with pytest.raises(AffineQuantError, match=what) as caught:
        split_parts(name, SITES[site_name])
    assert caught.match(fix)
