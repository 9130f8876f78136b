"""The compiled CPU code: its transforms, its agreement with itself at any number of tokens, and how it does without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_kernels import cache, online_linear, prepare_weight, reference
from affinequant_kernels.cpu import compiling, engines, layer, native
from affinequant_kernels.weight import Weight
from torch import Tensor

K, N = 576, 70
GENERATOR = torch.Generator().manual_seed(0)
compiled = pytest.mark.skipif(native.available() is not None, reason=f"no compiled code: {native.available()}")


each = pytest.mark.parametrize("arithmetic", compiling.UNITS, indirect=True)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """The code with the arithmetic of a file, also where there is a better one."""
    lacking, compiler = compiling.lacking()[request.param], compiling.find_compiler()
    if native.available() is not None or lacking:
        pytest.skip(f"no compiled code: {native.available()}" if not lacking else f"this CPU has no {lacking[0]}")
    assert compiler is not None
    before = native._LIBRARY[:]
    layer.clear_cache()
    native._load(compiling.library(compiler, cache.private_folder(), request.param))
    yield
    native._LIBRARY[:] = before
    layer.clear_cache()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


FACTORS = {
    "none": [],
    "kronecker": [(random(9, 9), random(64, 64))],
    "kronecker of odd sizes": [(random(48, 48), random(12, 12))],
    "blocks": [(random(9, 64, 64),)],
    "one block for all": [(random(1, 36, 36),)],
    "dense": [(random(1, K, K),)],
    "three": [(random(9, 64, 64),), (random(9, 9), random(64, 64)), (random(1, 32, 32),)],
}


def weight() -> Weight:
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=GENERATOR)
    zero = torch.randint(-8, 8, (N,), dtype=torch.int8, generator=GENERATOR)
    return prepare_weight(codes, torch.rand(N, generator=GENERATOR) * 0.01 + 1e-3, zero)


def dense(factor: tuple[Tensor, ...]) -> Tensor:
    if len(factor) == 2:
        return torch.kron(factor[0].double(), factor[1].double())
    return torch.block_diag(*factor[0].double().expand(K // factor[0].shape[1], -1, -1))


@each
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("m", [1, 3, 6])
def test_a_transform_is_that_of_fp64_up_to_fp32(factors: list[tuple[Tensor, ...]], m: int) -> None:
    x, whole = random(m, K), torch.eye(K, dtype=torch.float64)
    for factor in factors:
        whole = whole @ dense(factor)
    rows = native.rows(native.prepare(weight(), K, factors, x.dtype), x, bits=8, symmetric=False, clip=0.9)
    wanted = reference.row_quant((x.double() @ whole).float(), bits=8, symmetric=False, clip=0.9)
    torch.testing.assert_close(rows.scale, wanted.scale, rtol=1e-5, atol=0)
    assert int((rows.q.int() - wanted.q).abs().max()) <= 1 and float((rows.q != wanted.q).float().mean()) < 1e-3
    assert torch.equal(rows.rowsum, rows.q.sum(1, dtype=torch.int32))


@each
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("dtype", native.TYPES)
@pytest.mark.parametrize("name", ["kronecker", "three"])
def test_roundings_between_and_within_factors_are_the_references(dtype: torch.dtype, name: str) -> None:
    # Small integers: no sum is rounded, whatever its order, so that all that is left are the roundings to x's type.
    factors = [tuple(matrix.mul(2).round() for matrix in factor) for factor in FACTORS[name]]
    x = torch.randint(-3, 4, (5, K), generator=GENERATOR).to(dtype)
    given = weight()
    wanted = reference.linear_dyn(
        reference.transform(x, factors), given, out_dtype=dtype, act_symmetric=False, clip=0.9
    )
    settings = {"act_bits": 4, "act_symmetric": False, "clip": 0.9, "out_dtype": dtype}
    assert torch.equal(layer.linear_dyn(x, given, None, factors=factors, **settings), wanted)


@each
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_token_comes_out_the_same_whatever_its_company(act_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, matrices = weight(), [matrix for factor in FACTORS["three"] for matrix in factor]
    monkeypatch.setattr(engines, "at_once", lambda m, _: m <= layer.FEW_ROWS)
    monkeypatch.setattr(engines, "choose", lambda *_: engines.ALWAYS)
    x = random(layer.FEW_ROWS + 9, K).bfloat16()
    many = online_linear(x, matrices, given, act_bits=act_bits, clip=0.9)
    for count in (1, 2, 7, layer.FEW_ROWS):
        assert torch.equal(online_linear(x[:count], matrices, given, act_bits=act_bits, clip=0.9), many[:count])


@each
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("largest", [15, 127, 128])
@pytest.mark.parametrize(
    "m, n, k", [(1, 1, 1), (3, 5, 17), (4, 4, 128), (6, 7, 200), (9, 3, 1300), (37, 70, 384), (300, 6, 2056)]
)
def test_no_sum_of_products_is_cut_off(m: int, n: int, k: int, largest: int) -> None:
    codes = torch.randint(-largest, min(largest, 127) + 1, (n, k), dtype=torch.int8, generator=GENERATOR)
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=GENERATOR)
    codes[0], q[0] = -largest, -128  # all pairs of products at their largest, of either sign
    codes[-1], q[-1] = min(largest, 127), -128
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = native.product(q, *native.hold(codes))
        assert got.dtype == torch.int32 and torch.equal(got.long(), q.long() @ codes.long().t())


@each
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m, n, k", [(1, 3, 20), (7, 9, 129), (43, 50, 257), (50, 6, 1416), (600, 33, 1000)])
def test_a_layer_in_one_call_is_the_references_at_any_size(m: int, n: int, k: int, bits: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), dtype=torch.int8, generator=GENERATOR)
    zero = torch.randint(-half, half, (n,), dtype=torch.int8, generator=GENERATOR)
    given = prepare_weight(codes, torch.rand(n, generator=GENERATOR) + 0.01, zero, bits=bits)
    assert native.serves(given, k)
    for dtype in native.TYPES:
        x, bias = (random(m, k) + 0.2).to(dtype), random(n)
        made = native.prepare(given, k, (), dtype)
        for act_bits, symmetric in ((4, True), (8, False)):
            settings = {"symmetric": symmetric, "clip": 0.9}
            got = native.linear(made, x, bias, bits=act_bits, out_dtype=dtype, **settings)
            wanted = reference.linear_dyn(x, given, bias, act_bits=act_bits, act_symmetric=symmetric, clip=0.9)
            assert torch.equal(got, wanted), (dtype, act_bits)


@each
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("size", [24, 32, 64, 128, 384])
@pytest.mark.parametrize("with_zero", [True, False])
@pytest.mark.parametrize("of", ["the weight", "rows", "both"])
def test_a_layer_in_groups_in_one_call_is_the_references(of: str, size: int, with_zero: bool) -> None:
    k, n = 3 * size, 39
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=GENERATOR)
    codes[0], codes[1] = -8, 7
    groups, act_group = 1 if of == "rows" else 3, 0 if of == "the weight" else size
    zero = torch.randint(-8, 8, (n, groups), dtype=torch.int8, generator=GENERATOR) if with_zero else None
    given = prepare_weight(codes, torch.rand(n, groups, generator=GENERATOR) + 0.01, zero, act_group=act_group)
    assert native.serves(given, k) == (size != 24)
    if not native.serves(given, k):
        return
    for m in (1, 2, 3, 4, 9, 61):
        x, bias = random(m, k).bfloat16() + 0.2, random(n)
        x[0] = 3.0  # all of a row's codes at their largest
        x[-1] = -3.0
        made = native.prepare(given, k, (), x.dtype)
        for act_bits, symmetric in ((4, True), (8, False)):
            settings = {"symmetric": symmetric, "clip": 0.9}
            got = native.linear(made, x, bias, bits=act_bits, out_dtype=torch.float32, **settings)
            settings = {"act_symmetric": symmetric, "clip": 0.9, "out_dtype": torch.float32}
            assert torch.equal(got, reference.linear_dyn(x, given, bias, act_bits=act_bits, **settings))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each layer in one call."""
    right, seen = native.linear, []

    def linear(*given: Any, **settings: Any) -> Tensor:
        seen.append(given[1].shape[0])
        return right(*given, **settings)

    monkeypatch.setattr(native, "linear", linear)
    return seen


@each
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("m", [1, layer.FEW_ROWS + 8])
def test_a_layer_is_one_call_only_where_that_is_the_fastest(
    m: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, x = weight(), random(m, K)
    wanted = reference.linear_dyn(x, given)
    always = m == 1 and native.in_lanes()  # few rows: it alone reads 4 bits
    monkeypatch.setattr(engines, "choose", lambda *_: engines.ALWAYS)
    for fastest, expected in ((True, [m]), (False, [m] * (1 + always))):
        monkeypatch.setattr(engines, "at_once", lambda *_, fastest=fastest: fastest)
        assert torch.equal(online_linear(x, [], given), wanted) and calls == expected


@each
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("forced", [None, "native", engines.ALWAYS])
@pytest.mark.parametrize("of", ["the weight", "rows"])
def test_a_layer_in_groups_is_one_call_unless_another_way_is_asked_for(
    of: str, forced: str | None, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=GENERATOR)
    scale = torch.rand(N, 1 if of == "rows" else 9, generator=GENERATOR) + 0.01
    given = prepare_weight(codes, scale, act_group=64 if of == "rows" else 0)
    monkeypatch.setattr(engines, "choose", lambda *_: engines.ALWAYS)
    monkeypatch.setattr(engines, "overridden", lambda: forced)
    for m in (1, 100):
        x = random(m, K)
        assert torch.equal(online_linear(x, [], given), reference.linear_dyn(x, given))
    assert calls == ([] if forced == engines.ALWAYS else [1, 100])


@each
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("kind", ["channel", "group", "integer"])
def test_a_layer_does_not_keep_its_weight_alive(kind: str) -> None:
    for _ in range(4):
        codes = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=GENERATOR)
        zero = torch.randint(-8, 8, (N, 1 if kind == "channel" else 9), dtype=torch.int8, generator=GENERATOR)
        mul = torch.ones(N, 9, dtype=torch.uint8) if kind == "integer" else None
        scale = torch.rand(N, 9 if kind == "group" else 1, generator=GENERATOR) + 0.01
        online_linear(random(1, K), [], prepare_weight(codes, scale, zero, mul=mul))
    layer.clear_cache(dead_only=True)
    assert not layer._MADE


@compiled
def test_matrices_that_change_in_place_are_seen() -> None:
    given, blocks, x = weight(), random(9, 64, 64), random(2, K)
    before = online_linear(x, [blocks], given)
    blocks.mul_(-1)
    assert not torch.equal(online_linear(x, [blocks], given), before)


@pytest.mark.parametrize("hindrance", ["no compiler", "a compiler that fails", "switched off"])
def test_without_it_the_reason_is_known_and_the_result_the_same(
    hindrance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, x = weight(), random(3, K)
    wanted = reference.linear_dyn(x, given)
    monkeypatch.setenv("AFFQ_CACHE", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiling, "UNITS", {"native_avx2.h": ()})
    if hindrance == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        expected = "no C compiler"
    elif hindrance == "a compiler that fails":
        broken = tmp_path / "broken-cc"
        broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal error: none" >&2\nexit 1\n')
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        expected = "fatal error: none"
    else:
        monkeypatch.setenv("AFFQ_NATIVE", "0")
        expected = "AFFQ_NATIVE=0"
    reason = native.available.__wrapped__()
    assert reason is not None and expected in reason
    monkeypatch.setattr(native, "available", lambda: reason)
    engines.forget()
    assert torch.equal(
        layer.linear_dyn(x, given, None, act_bits=4, act_symmetric=True, clip=1.0, out_dtype=x.dtype), wanted
    )
    engines.forget()
    assert not list(tmp_path.rglob("*.so"))


@compiled
def test_wrong_results_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.linear
    monkeypatch.setattr(native, "linear", lambda *args, **settings: right(*args, **settings) + 1)
    assert "not the reference's" in str(native.available.__wrapped__())


@compiled
def test_compiling_at_once_in_several_processes_leaves_one_whole_library(tmp_path: Path) -> None:
    check = "from affinequant_kernels.cpu import native; assert native.available() is None, native.available()"
    environment = os.environ | {"AFFQ_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", check], env=environment) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list(tmp_path.glob("private/native-*"))) == 1


# Where compiled code may lie.


def refused(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(compiling, "UNITS", {"native_avx2.h": ()})
    monkeypatch.delenv("AFFQ_NATIVE", raising=False)

    def loaded(*_: object) -> None:
        raise AssertionError("code was loaded")

    monkeypatch.setattr(native.ctypes, "CDLL", loaded)
    return str(native.available.__wrapped__())


@pytest.mark.parametrize(
    "fault", ["relative", "everybody may write", "others may look", "a link", "a file", "another user's", "open above"]
)
def test_an_unsafe_folder_is_refused(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "cache"
    folder = home / "private"
    home.mkdir()
    if fault == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif fault == "a file":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o700)
    if fault == "everybody may write":
        folder.chmod(0o777)
    elif fault == "others may look":
        folder.chmod(0o755)
    elif fault == "open above":
        home.chmod(0o777)
    elif fault == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    monkeypatch.setenv("AFFQ_CACHE", "cache" if fault == "relative" else str(home))
    assert "no safe place for compiled code" in refused(monkeypatch)
    assert fault == "a file" or not list(folder.iterdir())


@pytest.mark.parametrize("planted", ["writable by all", "a link", "another user's"])
def test_a_planted_library_is_not_loaded(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFFQ_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "UNITS", {"native_avx2.h": ()})
    names: list[Path] = []
    monkeypatch.setattr(native, "_load", names.append)
    monkeypatch.setattr(native, "_right", lambda: True)
    broken = tmp_path / "cc"  # no real compiler is needed to learn the name
    broken.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\nexit 0\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert native.available.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setenv("AFFQ_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", str(broken))
    (library,) = names
    if planted == "writable by all":
        library.chmod(0o666)
    elif planted == "a link":
        library.rename(tmp_path / "real.so")
        library.symlink_to(tmp_path / "real.so")
    else:
        real = os.lstat

        def lstat(path: Path, **options: object) -> os.stat_result:
            found = real(path)
            return os.stat_result([*found[:4], found[4] + 1, *found[5:]]) if Path(path) == library else found

        monkeypatch.setattr(Path, "lstat", lambda self: lstat(self))
    assert "not safe to load" in refused(monkeypatch)


def test_without_a_home_there_is_a_folder_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFFQ_CACHE", raising=False)

    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    folder = cache.private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700 and folder == cache.private_folder()
    engines.forget()
    x, given = random(3, K), weight()
    settings = {"act_bits": 4, "act_symmetric": True, "clip": 1.0, "out_dtype": x.dtype}
    assert torch.equal(layer.linear_dyn(x, given, None, **settings), reference.linear_dyn(x, given))
    engines.forget()


def test_a_home_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFFQ_CACHE", "/proc/nowhere/kernels")
    assert cache.private_folder().stat().st_mode & 0o777 == 0o700
