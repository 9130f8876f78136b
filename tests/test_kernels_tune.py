"""The table of launch configurations: what is in it, how it is looked up, and what the search does without a GPU."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.testing
from affinequant_kernels import reference
from affinequant_kernels.bench import search
from affinequant_kernels.cuda import configs, gemm, quant
from affinequant_kernels.cuda.configs import Config

CUDA = torch.device("cuda", 0)
KINDS = ("channel", "integer", "group")


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU called `Some GPU/X (80 GB)` of 100 processors, and tables in a folder of its own."""
    monkeypatch.setenv("AFFQ_CACHE", str(tmp_path))
    for module in (configs, search):
        monkeypatch.setattr(module, "device_facts", lambda index: ("Some GPU/X (80 GB)", 100, True))
    configs._table.cache_clear()
    yield tmp_path / "Some-GPU-X-80-GB" / "tune.json"
    configs._table.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", configs.BUCKETS)
def test_rule_of_thumb_is_a_kernel_that_exists(m: int, kind: Any) -> None:
    for bits in (4, 8):
        assert_launches(configs.rule(m, 4096, 4096, kind, bits, 132, True), m, kind, bits)


def test_rule_of_thumb_fills_the_gpu() -> None:
    assert configs.rule(1, 4096, 4096, "channel", 4, 132).path == "gemv"
    # 64 tiles: at least two programs for each of 132 processors, but no fewer than four steps for each program.
    assert configs.rule(16, 4096, 4096, "channel", 4, 132).split == 8
    assert configs.rule(16, 4096, 1024, "channel", 4, 132).split == 2
    assert configs.rule(16, 4096, 4096, "group", 4, 132).split == 1
    # A tile of 256 x 128 for each processor, or smaller ones.
    assert [configs.rule(m, 4096, 4096, "channel", 4, 132, True).bn for m in (1024, 2048)] == [128, 256]
    assert configs.rule(2048, 4096, 4096, "channel", 4, 132).bn == 128
    assert [configs.a16_tile(m, 4096, 4096, CUDA) for m in (1, 32, 64, 4096)] == [(16, 4), (32, 4), (64, 4), (64, 1)]


def test_every_bucket_is_searched() -> None:
    assert sorted(search.SEARCHED) == list(configs.BUCKETS) and search.SEARCHED[:6] == (1, 16, 64, 256, 2048, 8192)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(4096, 4096), (22016, 4096), (576, 1536)])
def test_rows_to_meet_meet_every_kernel(kind: Any, n: int, k: int) -> None:
    rows = configs.rows_to_meet(n, k, kind, 4, CUDA)
    assert len(rows) <= 9

    def choices(m: int) -> tuple[object, ...]:
        return configs.lookup(m, n, k, kind, 4, CUDA), configs.a16_tile(m, n, k, CUDA)

    met = [choices(m) for m in rows]
    for m in range(1, 9000):
        assert choices(m)[0] in [config for config, _ in met] and choices(m)[1] in [tile for _, tile in met], m


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 5, 16, 33, 64, 65, 8192])
def test_candidates_are_kernels_that_exist(m: int, kind: Any) -> None:
    for bits in (4, 8):
        found = search.candidates(m, 4096, 4096, kind, bits, 132, True)
        assert found[0] == configs.rule(m, 4096, 4096, kind, bits, 132, True)
        assert 3 <= len(found) <= 20 and len(set(found)) == len(found)
        for config in found:
            assert_launches(config, m, kind, bits)


def assert_launches(config: Config, m: int, kind: str, bits: int) -> None:
    if config.path == "gemv":
        assert kind == "channel" and bits == 4 and m <= 2 and config.bm == 1
        assert config.bj in (64, 128) and config.split == 1 and config.programs is None
        return
    # Powers of two, as tl.arange asks; at least 16, as tl.dot does.
    for size in (config.bn, config.bm, config.bj):
        assert size >= 16 and size & (size - 1) == 0
    assert config.bm <= max(64, 2 * m) or config == configs.rule(m, 4096, 4096, kind, bits, 132, True)
    assert config.bj in (32, 64) and config.split in (1, 2, 4, 8) and config.warps in (4, 8)
    if config.bn == 256:  # the ahead-of-time checks have it at these settings only
        assert kind == "channel" and bits == 4 and (config.bm, config.warps) == (128, 8) and config.programs is None
    assert config.split == 1 or (kind != "group" and config.programs is None)
    # A step of both operands, in bytes, in as many stages: what a Hopper or Ampere processor's shared memory holds.
    assert config.stages * (config.bm * 128 + config.bn * (64 if bits == 4 else 128)) <= 227 << 10


def test_what_was_written_is_looked_up(own_tables: Path) -> None:
    config = Config(bn=64, bm=16, split=2, warps=4)
    key = configs.size_key(5, 4096, 4096, "channel", 4)
    configs.write_table(own_tables, {key: config}, {"device": "Some GPU/X (80 GB)"})
    assert configs.lookup(7, 4096, 4096, "channel", 4, CUDA) == config  # 5 and 7 share a bucket
    for other in ((9, 4096, 4096, "channel", 4), (7, 4096, 4096, "channel", 8), (7, 4096, 2048, "channel", 4)):
        assert configs.lookup(*other, CUDA) == configs.rule(*other, 100, True)
    assert configs.lookup(7, 4096, 4096, "channel", 4, torch.device("cpu")) == configs.rule(
        7, 4096, 4096, "channel", 4, 8
    )
    # A later search of other sizes adds to the table, one of the same size replaces.
    persistent = Config(programs=200)
    configs.write_table(own_tables, {configs.size_key(512, 64, 128, "group", 4): persistent}, {})
    configs.write_table(own_tables, {key: persistent}, {})
    assert configs.read_table(own_tables) == {key: persistent, configs.size_key(512, 64, 128, "group", 4): persistent}
    assert [path.name for path in own_tables.parent.iterdir()] == [own_tables.name]


def test_the_users_table_wins_over_the_shipped_one(
    own_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "package" / "tables" / own_tables.parent.name / "tune.json"
    ours, theirs, key = Config(bm=16), Config(bm=32), configs.size_key(8, 64, 128, "channel", 4)
    configs.write_table(shipped, {key: ours, configs.size_key(16, 64, 128, "channel", 4): ours}, {})
    configs.write_table(own_tables, {key: theirs}, {})
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "package" / "cuda" / "configs.py"))
    assert configs.lookup(8, 64, 128, "channel", 4, CUDA) == theirs
    assert configs.lookup(16, 64, 128, "channel", 4, CUDA) == ours


@pytest.mark.parametrize("text", ["{", "[]", '{"configs": {"a": {"tile": 3}}}', '{"configs": 3}'])
def test_a_broken_table_is_named(own_tables: Path, text: str) -> None:
    own_tables.parent.mkdir()
    own_tables.write_text(text)
    with pytest.raises(ValueError, match=r"Some-GPU-X-80-GB/tune\.json: not a table of configurations"):
        configs.lookup(1, 64, 128, "channel", 4, CUDA)


def test_a_lookup_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "search", None)
    monkeypatch.setattr(search, "_time_candidates", None)
    monkeypatch.setattr(triton.testing, "do_bench", None)
    assert configs.lookup(300, 4096, 4096, "channel", 4, CUDA) == configs.rule(300, 4096, 4096, "channel", 4, 100, True)


# The search, with a GPU that is played by the reference.


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Kernels that are exact but for split 8, do not fit at bn 128, and are the faster the more they split."""
    asked: list[Config] = []

    def linear(q: Any, scale: Any, zero: Any, rowsum: Any, weight: Any, bias: Any, out: Any, config: Config) -> Any:
        assert zero is not None and weight.zero is not None and int(weight.zero.abs().max()) > 0  # as a run makes them
        if config.bn == 128:
            raise RuntimeError("out of resource: shared memory")
        asked.append(config)
        return reference.linear(q, scale, zero, weight, bias, out) + (1 if config.split == 8 else 0)

    def do_bench(call: functools.partial[Any], **_: Any) -> float:
        return 1.0 / call.args[-1].split

    monkeypatch.setattr(gemm, "linear", linear)
    monkeypatch.setattr(quant, "row_quant", reference.row_quant)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    sample, randn = search.sample_weight, torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device="cpu", **more: randn(*size, **more))
    monkeypatch.setattr(
        search, "sample_weight", lambda n, k, kind, bits, device, zero: sample(n, k, kind, bits, zero=zero)
    )
    return asked


def test_the_search_takes_the_fastest_that_is_exact(pretend: list[Config]) -> None:
    said: list[str] = []
    found = dict(search.search([(64, 256), (32, 128)], [5, 16], "channel", 4, 5.0, said.append))
    assert list(found) == [configs.size_key(m, n, k, "channel", 4) for m in (5, 16) for n, k in ((64, 256), (32, 128))]
    assert all(config.split == 4 and config.bn == 64 for config in found.values())
    assert any(config.split == 8 for config in pretend)
    assert any("differs from the reference" in line and "split=8" in line for line in said)
    assert any("skipped, RuntimeError" in line and "bn=128" in line for line in said)


def test_the_search_stops_in_time_and_says_what_is_left_out(pretend: list[Config]) -> None:
    said: list[str] = []
    assert not list(search.search([(64, 256)], [1, 16], "channel", 4, 0.0, said.append)) and not pretend
    assert said == [f"{configs.size_key(m, 64, 256, 'channel', 4)}: left out for want of time" for m in (1, 16)]


def test_where_nothing_works_the_rule_stays(pretend: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "candidates", lambda *_: [Config(bn=128)])
    said: list[str] = []
    assert not list(search.search([(64, 256)], [16], "channel", 4, 5.0, said.append))
    assert "the rule of thumb stays" in said[-1]


def test_main_writes_the_table_of_this_gpu(
    own_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(bn=64)
    monkeypatch.setattr(search, "search", lambda *a: iter([(configs.size_key(5, 64, 128, a[2], a[3]), config)]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU/X (80 GB)")
    monkeypatch.setattr(sys, "argv", ["tune", "--shapes", "64x128", "--rows", "5"])
    assert search.main() == 0
    assert capsys.readouterr().out == f"{own_tables}\n"
    written = json.loads(own_tables.read_text())
    assert {"device", "triton", "torch", "date", "configs"} == set(written)
    assert configs.lookup(5, 64, 128, "channel", 4, CUDA) == config
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(tmp_path / "elsewhere")])
    assert search.main() == 0
    assert (tmp_path / "elsewhere" / own_tables.parent.name / "tune.json").is_file()


def test_a_search_that_is_ended_has_written_what_it_found(own_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = configs.size_key(5, 64, 128, "channel", 4)

    def ended(*_: Any) -> Iterator[tuple[str, Config]]:
        yield key, Config(bn=64)
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "search", ended)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU/X (80 GB)")
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(KeyboardInterrupt):
        search.main()
    assert configs.read_table(own_tables) == {key: Config(bn=64)}


def test_without_a_gpu_the_command_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run([sys.executable, "-m", "affinequant_kernels.tune"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert "measures on a CUDA device, and there is none here" in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shapes", "64"], "shapes: expected NxK"),
        (["--rows", "a"], "rows: expected whole numbers"),
        (["--rows", "0"], "rows: expected positive numbers"),
        (["--kind", "integer", "--bits", "8"], "bits: expected 4"),
        (["--minutes", "0"], "minutes: expected a positive number"),
    ],
)
def test_bad_arguments_are_exit_code_2(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", *words])
    with pytest.raises(SystemExit) as ended:
        search.main()
    shown = capsys.readouterr()
    assert ended.value.code == 2 and message in shown.err and shown.out == ""
