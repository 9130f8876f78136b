"""Which way integers are multiplied on a CPU: never a slow one, never an inexact one, and found once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from affinequant_kernels import prepare_weight, reference
from affinequant_kernels.cpu import candidates, engines, layer
from torch import Tensor

Patch = pytest.MonkeyPatch
BEST = engines.CANDIDATES[engines.ALWAYS]


class Clock:
    """Time as the tests make it, so that no machine is too slow or too busy for them."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    thread_time = perf_counter


CLOCK = Clock()


class Timed:
    """float32 that takes so many nanoseconds a multiplication, and counts its calls."""

    def __init__(self, nanoseconds: float, of_many: float | None = None) -> None:
        self.nanoseconds, self.of_many, self.seen = nanoseconds, of_many, []

    def __call__(self, q: Tensor, held: candidates.Held, scale: Tensor | None, total: Tensor | None) -> Tensor:
        self.seen.append(q.numel() * held[0].shape[0])
        slow = self.of_many if self.of_many is not None and len(q) > 32 else self.nanoseconds
        CLOCK.now += slow * 1e-9 * self.seen[-1]
        return BEST.product(q, held, scale, total)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: Patch) -> Iterator[None]:
    """A cache of its own; float32 alone, at the speed of two cores; a machine that does nothing else."""
    monkeypatch.setenv("AFFQ_CACHE", str(tmp_path))
    monkeypatch.delenv("AFFQ_ENGINE", raising=False)
    monkeypatch.setattr(engines, "CANDIDATES", {engines.ALWAYS: replace(BEST, product=Timed(0.02))})
    monkeypatch.setattr(engines, "time", CLOCK)
    monkeypatch.setattr(engines, "_busy", lambda: False)
    engines.forget()
    layer.clear_cache()
    yield
    engines.forget()
    layer.clear_cache()


def add(monkeypatch: Patch, name: str, product: object) -> None:
    monkeypatch.setitem(engines.CANDIDATES, name, replace(BEST, product=product))


def classes() -> list[tuple[int, int]]:
    return [(m, largest) for m in (1, 7, 300) for largest in (8, 128)]


def test_a_slow_candidate_is_called_once_and_never_chosen(monkeypatch: Patch) -> None:
    slow = Timed(8000.0)  # the first product, of one row, takes 0.13 s
    add(monkeypatch, "slow", slow)
    assert {engines.choose(m, largest, False) for m, largest in classes()} == {engines.ALWAYS}
    assert len(slow.seen) == 1 and slow.seen[0] <= 1 << 15
    assert "given up" in str(engines.report()["one row, 4 bits"]["candidates"])


def test_a_candidate_as_slow_as_onednns_reference_code_gets_small_products_only(monkeypatch: Patch) -> None:
    slow, before = Timed(20.0), CLOCK.now  # 512 x 576 x 1536: nine seconds
    add(monkeypatch, "slow", slow)
    assert {engines.choose(m, largest, False) for m, largest in classes()} == {engines.ALWAYS}
    assert max(slow.seen) <= 1 << 23 and CLOCK.now - before < 1.0


@pytest.mark.parametrize("nanoseconds", [20.0, 50.0])  # the first product of many rows takes 0.08 s, or 0.2
def test_a_slow_candidate_takes_no_time_from_those_after_it(nanoseconds: float, monkeypatch: Patch) -> None:
    add(monkeypatch, "slow", Timed(nanoseconds))
    add(monkeypatch, "fast", Timed(0.01))
    assert engines.choose(300, 8, False) == "fast"


def test_what_is_slow_for_many_rows_alone_is_used_for_few(monkeypatch: Patch) -> None:
    add(monkeypatch, "few", Timed(0.01, of_many=0.03))
    assert [engines.choose(m, 8, False) for m in (1, 7, 300)] == ["few", "few", engines.ALWAYS]


@pytest.mark.parametrize("rows", ["few rows", "many rows"])
def test_a_candidate_that_is_exact_for_the_least_rows_of_a_class_alone_is_never_chosen(
    rows: str, monkeypatch: Patch
) -> None:
    """As oneDNN's unsigned product with AMX: up to 11 rows its sums are whole, from 12 on they are fp32 before the zero
    point is taken off."""
    least, most = engines.ROWS[rows][2]

    def rounded(q: Tensor, held: candidates.Held, scale: Tensor | None, total: Tensor | None) -> Tensor:
        product = BEST.product(q, held, scale, total)
        return product if len(q) <= least else product + 1

    add(monkeypatch, "fast", rounded)
    monkeypatch.setattr(engines, "_race", lambda *_: {engines.ALWAYS: 1.0, "fast": 1e-9})
    assert engines.choose(most, 128, False) == engines.ALWAYS


@pytest.mark.parametrize("seconds, forced, expected", [
    (0.9, None, True), (1.2, None, True), (1.3, None, False), ("not exact", None, False),
    (0.9, engines.ALWAYS, False), (1.3, "native", True),
])  # fmt: skip
def test_a_whole_layer_is_one_call_where_its_product_takes_little_longer(
    seconds: engines.Outcome, forced: str | None, expected: bool, monkeypatch: Patch
) -> None:
    add(monkeypatch, "native", BEST.product)
    monkeypatch.setattr(engines, "measure", lambda *_: {engines.ALWAYS: 1.0, "native": seconds})
    if forced:
        monkeypatch.setenv("AFFQ_ENGINE", forced)
    assert engines.at_once(300, 8) == expected


def test_an_inexact_candidate_is_never_chosen(monkeypatch: Patch) -> None:
    def saturating(q: Tensor, held: candidates.Held, scale: Tensor | None, total: Tensor | None) -> Tensor:
        if scale is None and total is None:  # without VNNI sums of pairs stop at what int16 holds
            pairs = q.float().unflatten(1, (-1, 2)).unsqueeze(1) * torch.cat(held, 1).unflatten(1, (-1, 2))
            return pairs.sum(-1).clamp(-32768, 32767).sum(-1)
        return BEST.product(q, held, scale, total)

    add(monkeypatch, "fast", saturating)
    monkeypatch.setattr(engines, "_race", lambda *_: {engines.ALWAYS: 1.0, "fast": 1e-9})
    assert engines.choose(7, 128, False) == engines.ALWAYS
    assert engines.report()["few rows, 8 bits"]["candidates"]["fast"] == {"ms": None, "text": "not exact"}


def test_where_integers_are_needed_those_that_round_are_not_chosen(monkeypatch: Patch) -> None:
    monkeypatch.setitem(engines.CANDIDATES, "rounds", replace(BEST, rounds=True))
    monkeypatch.setattr(engines, "measure", lambda *_: {engines.ALWAYS: 1.0, "rounds": 1e-9})
    assert engines.choose(7, 8, False) == "rounds" and engines.choose(7, 8, True) == engines.ALWAYS


def test_one_that_fails_is_left_out(monkeypatch: Patch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("could not create a primitive\nat line 3")

    add(monkeypatch, "broken", broken)
    assert engines.choose(7, 8, False) == engines.ALWAYS
    assert "could not create a primitive" in str(engines.report()["few rows, 4 bits"]["candidates"]["broken"])


def test_the_variable_overrides_the_times(monkeypatch: Patch) -> None:
    slow = Timed(1.0)
    add(monkeypatch, "slow", slow)
    monkeypatch.setenv("AFFQ_ENGINE", "slow")
    assert engines.choose(7, 8, False) == "slow"
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    weight, x = prepare_weight(codes, torch.ones(16)), torch.randn(40, 64)
    settings = {"act_bits": 4, "act_symmetric": True, "clip": 1.0, "out_dtype": torch.float32}
    got = layer.linear_dyn(x, weight, None, **settings)
    assert torch.equal(got, reference.linear_dyn(x, weight)) and slow.seen[-1] == 40 * 64 * 16


@pytest.mark.parametrize("name, message", [("slwo", "one of float32, wrong, got slwo"), ("wrong", "not exact")])
def test_what_the_variable_may_not_say(monkeypatch: Patch, name: str, message: str) -> None:
    add(monkeypatch, "wrong", lambda *given: BEST.product(*given) + 1)
    monkeypatch.setenv("AFFQ_ENGINE", name)
    with pytest.raises(ValueError, match=f"AFFQ_ENGINE: .*{message}"):
        engines.choose(7, 8, False)


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: Patch) -> None:
    first = engines.measure("few rows", "4 bits")
    monkeypatch.setattr(engines, "measure", lambda *_: first)
    engines.choose(7, 8, False)
    (path,) = (tmp_path / "private").iterdir()
    whole = json.loads(path.read_text())
    assert whole["seconds"] == {"few rows, 4 bits": first} and whole["about"]["torch"] == torch.__version__
    engines.forget()

    def again(*_: object) -> dict[str, engines.Outcome]:
        raise AssertionError("measured again")

    monkeypatch.setattr(engines, "measure", again)
    engines.choose(7, 8, False)
    for broken in (b"", b"{", b"\xff", b"[]", b'{"seconds": {"few rows, 4 bits": {"float32": -1.0}}}'):
        path.write_bytes(broken)
        engines.forget()
        with pytest.raises(AssertionError, match="measured again"):
            engines.choose(7, 8, False)
    monkeypatch.setattr(engines, "measure", lambda *_: first)
    engines.forget()
    engines.choose(7, 8, False)
    assert json.loads(path.read_text()) == whole and len(list(path.parent.iterdir())) == 1
    # Other numbers of threads, and other settings of oneDNN, have times of their own.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    engines.forget()
    engines.choose(7, 8, False)
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("hindrance", ["busy", "late", "nowhere to write"])
def test_what_is_not_worth_keeping_is_not_kept(hindrance: str, tmp_path: Path, monkeypatch: Patch) -> None:
    if hindrance == "busy":
        monkeypatch.setattr(engines, "_busy", lambda: True)
    elif hindrance == "late":
        monkeypatch.setattr(engines, "measure", lambda *_: {engines.ALWAYS: engines.LATE})
    else:
        (tmp_path / "private").write_text("")
    assert engines.choose(7, 8, False) == engines.ALWAYS
    assert not list(tmp_path.glob("private/*"))


@pytest.mark.parametrize("columns", [1000, 9000, 20000])
def test_float32_is_exact_at_any_width(columns: int) -> None:
    for largest in (15, 128):
        q, codes = engines.sample(3, 8, columns, largest)
        wanted = q.double() @ codes.double().t()
        assert torch.equal(BEST.product(q, BEST.prepare(codes), None, None).double(), wanted)
