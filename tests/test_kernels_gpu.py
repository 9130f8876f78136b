"""What only a GPU can show: the ops on CUDA tensors, CUDA graphs, streams, torch.compile, the benchmark and the search.

test_kernels_cases.py, which compares every kernel with its reference, runs on a GPU too.
"""

from __future__ import annotations

import pytest
import torch
from affinequant_kernels import linear, online_linear, ops, prepare_weight, reference
from affinequant_kernels.bench import benchmark, layers, report, search
from affinequant_kernels.cuda import configs, gemm, transform
from affinequant_kernels.weight import Weight

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


def sample(n: int, k: int, grouped: bool = False, zero: bool = False) -> Weight:
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, k // 128 if grouped else 1, generator=generator) * 0.01 + 1e-3
    points = torch.randint(-8, 8, scale.shape, dtype=torch.int8, generator=generator)
    return prepare_weight(codes, scale, points if zero else None).to("cuda")


def tokens(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("n, k", [(4096, 4096), (11008, 4096), (4096, 11008), (1000, 1408)])
@pytest.mark.parametrize("m", [1, 2, 3, 16, 17, 64, 65, 256, 2049])
@pytest.mark.parametrize("grouped", [False, True])
def test_linear_of_real_sizes(n: int, k: int, m: int, grouped: bool) -> None:
    x = tokens(m, k)
    for symmetric in (True, False):  # of weights too
        weight = sample(n, k, grouped, zero=not symmetric)
        got = linear(x, weight, act_symmetric=symmetric)
        assert torch.equal(got, reference.linear_dyn(x, weight, act_symmetric=symmetric))


@pytest.mark.parametrize("k, sizes", [(4096, (64, 64)), (11008, (86, 128)), (18944, (128, 148)), (28672, (128, 224))])
@pytest.mark.parametrize("m", [1, 16, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_default_scheme_at_w4a4(k: int, sizes: tuple[int, int], m: int, dtype: torch.dtype) -> None:
    """Zero points on both sides, a Kronecker transform in the quantiser: codes exact for what was quantised, the layer
    exact for its codes."""
    weight, x = sample(1024, k, zero=True), tokens(m, k).to(dtype)
    matrices = [factor.to(dtype) for factor in layers.kron_factors(k, "cuda")]
    assert tuple(len(matrix) for matrix in matrices) == sizes
    for left, right in (matrices, matrices[::-1]):  # rotations have the larger first
        y = torch.empty(m, k, device="cuda")
        rows = transform.kron_quant(x, left, right, bits=4, symmetric=False, clip=0.9, y=y)
        moved = reference.kron_apply(x, left, right)
        assert (y - moved).abs().max() <= (1e-5 if dtype == torch.float32 else 1.6e-2) * moved.abs().max()
        for have, want in zip(rows, reference.row_quant(y, symmetric=False, clip=0.9), strict=True):
            assert torch.equal(have, want)
        wanted = reference.linear(rows.q, rows.scale, rows.zero, weight, None, dtype)
        got = online_linear(x, [left, right], weight, act_symmetric=False, clip=0.9)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("m", [1, 16, 48, 256])
def test_in_a_cuda_graph(m: int) -> None:
    weight, x = sample(4096, 4096), tokens(m, 4096)
    linear(x, weight)  # compile outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, weight)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, reference.linear_dyn(x, weight))


# Tiles of features by tokens, each split: with sums that two threads of a program handled, these gave wrong ones.
RACED = [
    configs.Config(bn=64, bm=64, split=8, warps=4, stages=4),
    configs.Config(bn=128, bm=64, split=4, warps=4, stages=4),
    configs.Config(bn=64, bm=32, split=8, warps=4, stages=4),
    configs.Config(bn=128, bm=128, split=2),
]


@pytest.mark.parametrize("config", RACED, ids=lambda config: f"{config.bn}x{config.bm}")
def test_a_split_product_is_exact_every_time(config: configs.Config) -> None:
    """Two streams, a graph on a third: nothing that one call leaves or another is writing may show in a result."""
    weight = sample(4096, 4096)
    inputs = [reference.row_quant(tokens(m, 4096)) for m in (64, 51, 33)]
    wanted = [reference.linear(q.q, q.scale, None, weight, None, torch.bfloat16) for q in inputs]

    def product(index: int) -> torch.Tensor:
        q = inputs[index]
        return gemm.linear(q.q, q.scale, None, q.rowsum, weight, None, torch.bfloat16, config)

    product(0)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed = product(2)
    streams = [torch.cuda.Stream() for _ in range(3)]
    wrong = torch.zeros(3, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for _ in range(300):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if index == 2:
                    graph.replay()
                got = replayed if index == 2 else product(index)
                wrong[index] += (got != wanted[index]).sum()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")
def test_in_a_tree_of_cuda_graphs() -> None:
    """What `cache_implementation="static"` makes of a model: every memory of a call belongs to the graph."""
    weight = sample(4096, 4096)
    compiled = torch.compile(lambda x: linear(linear(x, weight), weight), mode="reduce-overhead", fullgraph=True)
    for m in (16, 40):
        for _ in range(4):  # twice to warm up, then captured, then replayed
            x = tokens(m, 4096)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x), reference.linear_dyn(reference.linear_dyn(x, weight), weight))


@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")  # torch.compile's advice
def test_compiled() -> None:
    weight = sample(512, 1024)
    compiled = torch.compile(lambda x: linear(x, weight), fullgraph=True, dynamic=True)
    for m in (3, 1, 40):
        x = tokens(m, 1024)
        assert torch.equal(compiled(x), reference.linear_dyn(x, weight))


def test_two_streams_at_once() -> None:
    weight = sample(256, 4096)  # few tiles: split along K
    inputs = [tokens(8, 4096), tokens(9, 4096)]
    wanted = [reference.linear_dyn(x, weight) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    outputs: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[i].append(linear(inputs[i], weight))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted[i]) for i in range(2) for y in outputs[i])


def test_weights_on_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="qweight: expected a tensor on cuda"):
        linear(torch.randn(2, 1024, device="cuda"), sample(8, 1024).to("cpu"))


def test_fused_ops_of_real_sizes() -> None:
    """The identity as a transform leaves what `row_quant` gives."""
    x, eye = tokens(70, 4096), torch.eye(64, device="cuda")
    wanted = ops.row_quant(x)
    assert all(torch.equal(a, b) for a, b in zip(wanted, reference.row_quant(x), strict=True))
    for rows in (torch.ops.affq.kron_quant(x, eye, eye), torch.ops.affq.block_quant(x, eye.unsqueeze(0))):
        assert all(torch.equal(a, b) for a, b in zip(rows, wanted, strict=True))


def test_benchmark() -> None:
    result = benchmark.run(benchmark.Settings(device="cuda", shapes=((512, 1024),), rows=(1, 32), rounds=2))
    assert [size["m"] for size in result["sizes"]] == [1, 32] and "w4a16" in result["sizes"][0]["cold"]
    assert "512 x 1024, 32 tokens" in report.table(result)


def test_search() -> None:
    said: list[str] = []
    found = dict(search.search([(512, 1024)], [1, 128], "channel", 4, 5.0, said.append))
    assert len(found) == 2 and not any("differs from the reference" in line for line in said), said
