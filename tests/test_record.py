"""What a run remembers of itself: figures against what they are said to be, taken without touching what is learned."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import affinequant
from affinequant.learning import record
from affinequant.learning.block import _phases
from affinequant.learning.fit import fit
from affinequant.learning.objective import BlockObjective, folded_exactly
from affinequant.learning.record import Bands, Noise, histogram, matrices, picture, portrait
from affinequant.learning.starts import Watch
from affinequant.models.sites import place
from affinequant.progress import Steps
from affinequant.rounding import block as rounding
from affinequant.rounding import replay
from affinequant.rounding.block import round_block
from affinequant.run.durable import json_text
from affinequant.transforms import TRANSFORMS, build, structures_of
from affinequant.transforms.fold import rotate_block
from tests.test_objective import distort, make_job, objective_of

Tiny = Callable[..., Path]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("part", [record._PART, 100], ids=["whole", "some rows at a time"])
def test_a_histogram_is_numpy_s(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_PART", part)
    values = normal(300, 40)
    values[7, 3] = 200.0
    found, exact = histogram(values), values.double().numpy()
    rms = math.sqrt((exact**2).mean())
    high = 6 * rms
    assert found["low"] == -found["high"] and found["high"] == pytest.approx(high, rel=1e-5)
    assert found["counts"] == numpy.histogram(exact, 60, (-high, high))[0].tolist()
    assert found["outside"] == pytest.approx((abs(exact) > high).mean(), rel=1e-5)
    assert found["absmax"] == 200.0 and found["rms"] == pytest.approx(rms, rel=1e-5)
    assert found["kurtosis"] == pytest.approx((exact**4).mean() / rms**4, rel=1e-5)
    row = abs(exact).max(1) / numpy.sqrt((exact**2).mean(1))
    assert found["crest"] == pytest.approx(row.mean(), rel=1e-5)


@pytest.mark.parametrize(("rows", "left"), [(100, 10), (19, 19), (25, 13), (9, 9)])
def test_rows_are_chosen_at_equal_distances(rows: int, left: int) -> None:
    chosen = record.evenly(torch.arange(rows)[:, None], 10).flatten()
    assert len(chosen) == left and len(chosen.diff().unique()) == 1


@pytest.mark.parametrize("values", [torch.zeros(3, 4), torch.tensor([[1.0, torch.inf]])], ids=["nothing", "infinite"])
def test_a_histogram_is_json_whatever_the_values(values: Tensor) -> None:
    found = json.loads(json.dumps(histogram(values), allow_nan=False))
    assert found["high"] == 1.0 and len(found["counts"]) == 60


def test_a_picture_has_the_largest_of_each_tile() -> None:
    matrix = normal(100, 7)
    matrix[:3, :2], matrix[50, 6] = 0.0, 1e-9
    seen = picture(matrix)
    assert (seen["rows"], seen["columns"]) == (100, 7)
    assert len(seen["cells"]) == 34 and all(len(row) == 7 for row in seen["cells"])
    for index, row in enumerate(seen["cells"]):
        for column, cell in enumerate(row):
            most = float(matrix[3 * index : 3 * index + 3, column].abs().max())
            assert cell == (round(math.log10(most), 2) if most else None)
    assert picture(torch.eye(2))["cells"] == [[0.0, None], [None, 0.0]]
    assert picture(torch.zeros(1, 2))["cells"] == [[None, None]]


@pytest.mark.parametrize("name", [*TRANSFORMS, "hadamard+banded"])
def test_what_is_seen_of_a_transform_is_what_acts(tiny: Tiny, name: str) -> None:
    """The first head or block, or the whole as the product of what is seen."""
    sites = make_job(tiny(hidden=96, heads=4, bias=True))[0].sites.values()
    kinds = structures_of(name, where="")
    fits = [one for one in sites if all(place(one, kind).how != "refused" for kind in kinds)]
    site = next(one for one in fits if one.kind != "residual")
    transform: Any = build(name, site, seed=3, alpha=1.0).double()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.1 * normal(*parameter.shape))
    transform.progress(1.0)
    seen = matrices(transform)
    whole = transform.on_activations(torch.eye(site.width, dtype=torch.float64)).detach()
    if name == "shift":
        whole = -transform.on_activations(torch.zeros(1, site.width, dtype=torch.float64)).detach()
    if name == "diagonal":
        whole = whole.diagonal()[None]
    expected = torch.ones(1, 1, dtype=torch.float64)
    for matrix in seen.values():
        expected = matrix if "+" in name and len(expected) == 1 else _next(expected, matrix, name)
    rows, columns = expected.shape
    torch.testing.assert_close(whole[:rows, :columns], expected, rtol=1e-9, atol=1e-12)


def _next(expected: Tensor, matrix: Tensor, name: str) -> Tensor:
    return expected @ matrix if "+" in name else torch.kron(expected, matrix)


def rows_of(job: Any, tensors: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """By site, every token that reaches it in full precision."""
    watch = Watch(x.shape[0], x.shape[1], 0)
    job.run_all(tensors, x, watch)
    return {site: one.rows for site, one in watch.seen().items()}


def alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Histograms of values that differ by rounding: some of these may pass the edge of a bin."""
    total = sum(one["counts"])
    assert sum(other["counts"]) == pytest.approx(total, abs=0.002 * total)
    moved = numpy.abs(numpy.cumsum(numpy.subtract(one["counts"], other["counts"]))).max()
    assert moved <= 0.01 * total
    for name in ("high", "absmax", "rms", "crest", "kurtosis"):
        assert one[name] == pytest.approx(other[name], rel=1e-3), name


@pytest.mark.parametrize("tier", ["merged", "online"])
def test_histograms_are_of_what_the_folded_block_reads_and_holds(tiny: Tiny, tier: str) -> None:
    job, tensors, x = make_job(tiny(), preset="default", tier=tier)
    objective = objective_of(job, tensors, x)
    distort(objective)
    state = torch.get_rng_state()
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    folded = folded_exactly(objective, exact)
    seen = rows_of(job, tensors, x)
    drawn = portrait(job, objective, seen, folded, lambda name: tensors[name], None)
    assert torch.equal(torch.get_rng_state(), state)
    reads: dict[str, list[Tensor]] = {}

    def on_input(site: str, value: Tensor) -> Tensor:
        value = objective.online[site].on_activations(value) if site in objective.online else value
        reads.setdefault(site, []).append(value.detach().flatten(0, -2))
        return value

    job.run_all(folded, x, on_input, objective.on_attention)
    for site, parts in reads.items():
        alike(drawn["inputs"][site]["after"], histogram(torch.cat(parts)))
    for site, rows in seen.items():
        assert drawn["inputs"][site]["before"] == histogram(rows)
        assert drawn["inputs"][site]["after"] != drawn["inputs"][site]["before"]
    assert list(drawn["weights"]) == [linear.name for linear in job.family.linears]
    for name, both in drawn["weights"].items():
        assert both["before"] == histogram(tensors[f"{name}.weight"])
        assert both["after"] == histogram(folded[f"{name}.weight"])
    cells = {"attn_in", "mlp_in", "mlp_mid"} | ({"qk", "vo hadamard", "vo banded"} if tier == "merged" else set())
    for name in cells:
        assert name in drawn["pictures"]
    if tier == "online":
        left, right = objective.online["mlp_mid"].online().values()
        assert drawn["pictures"]["mlp_mid online left"] == picture(left)
        assert drawn["pictures"]["mlp_mid online right"] == picture(right)


def test_before_is_before_the_residual_stream_is_rotated(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), preset="quarot", tier="online")
    rotation: Any = build("hadamard", job.sites["residual"], seed=1, alpha=1.0).double()
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    turned = {n: t.float() for n, t in rotate_block(exact, job.family, job.sites["residual"], rotation).items()}
    seen = rows_of(job, turned, rotation.on_activations(x))
    drawn = portrait(job, BlockObjective(job, turned, {}), seen, turned, lambda name: tensors[name], rotation)
    for site, rows in rows_of(job, tensors, x).items():
        alike(drawn["inputs"][site]["before"], histogram(rows))
        rotated = job.sites[site].kind == "norm"
        assert (drawn["inputs"][site]["before"] != drawn["inputs"][site]["after"]) is rotated


@pytest.mark.parametrize("room", [0, replay.KEPT_BYTES], ids=["again", "kept"])
@pytest.mark.parametrize("fields", [{"preset": "fast", "tier": "online"}, {"preset": "rtn"}], ids=["online", "rtn"])
def test_noise_is_that_of_what_the_rounded_block_reads(
    tiny: Tiny, fields: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replay.Replay
    monkeypatch.setattr(rounding, "Replay", lambda *given, **more: plain(*given, **more, room=room))
    job, tensors, x = make_job(tiny(), **fields)
    objective = objective_of(job, tensors, x)
    noise = Noise(len(x), x.shape[1], 0)
    made = round_block(job, folded_exactly(objective, tensors), x, objective, x, noted=noise)
    shares: dict[str, list[Tensor]] = {}

    def on_input(site: str, value: Tensor) -> Tensor:
        online = objective.online[site].on_activations if site in objective.online else None
        site_input = job.site_input(site, online, made.clips[site])
        exact = site_input.transformed(value)
        rounded = site_input.rounded(exact)
        shares.setdefault(site, []).append(((rounded - exact).norm(dim=-1) / exact.norm(dim=-1)).square())
        return rounded

    job.run_all(made.tensors, x, on_input, objective.on_attention)
    found = noise.sqnr()
    assert list(found) == [site for site, _ in job.family.input_groups()]
    for site, seen in shares.items():
        assert found[site] == pytest.approx(-10 * math.log10(float(torch.cat(seen).mean())), abs=0.05), site


def test_bands_are_pictured_as_they_widen(tiny: Tiny) -> None:
    """On so many epochs, evenly; what lies beyond a band is empty."""
    job, tensors, x = make_job(tiny(), preset="paper", epochs=12, alpha=1.0)
    objective = objective_of(job, tensors, x)
    bands, target = Bands(objective), job.run_all(tensors, x)
    told = Steps(lambda line: None, "", 1)
    (phase,) = _phases(job, objective, tensors, x, x, target, told, bands)
    fitted = fit(*phase)
    epochs = bands.epochs()["vo"]
    widths = [math.floor(15 * epoch / 11) + 1 for epoch in range(12)]
    assert fitted.series["band"] == widths and len(fitted.series["loss"]) == 12
    assert [one["epoch"] for one in epochs] == [1, 3, 4, 6, 7, 9, 10, 12]
    for one in epochs:
        assert one["band"] == widths[one["epoch"] - 1]
        empty = [[abs(i - j) >= one["band"] for j in range(16)] for i in range(16)]
        assert [[cell is None for cell in row] for row in one["cells"]] == empty
    assert epochs[-1]["cells"] == picture(matrices(objective.transforms["vo"])[""])["cells"]
    (plainly,) = _phases(job, objective_of(job, tensors, x), tensors, x, x, target, told, None)
    assert list(fit(*plainly).series["loss"]) == list(fitted.series["loss"])


def test_which_blocks_are_pictured(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a few words " * 2000)
    fields = {"data": str(tmp_path / "text.txt"), "samples": 2, "seq_len": 16, "preset": "rtn"}
    made = affinequant.quantize(tiny(layers=5, tied=True), out=tmp_path / "out", **fields).report
    assert [index for index, block in enumerate(made["blocks"]) if "pictures" in block] == [0, 2, 4]
    assert all(list(block["inputs"]) == ["attn_in", "vo", "mlp_in", "mlp_mid"] for block in made["blocks"])
    assert all(0 < one["sqnr"] < 60 for block in made["blocks"] for one in block["inputs"].values())
    assert all(("before" in one) == ("weights" in b) for b in made["blocks"] for one in b["inputs"].values())
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(made))


def test_lists_of_numbers_take_one_line() -> None:
    value = {"a": [[1.5, None, 2], []], "b": ["x", "[1,\n 2]"], "c": [{"d": [0]}]}
    text = json_text(value)
    assert json.loads(text) == value and "[1.5,null,2]" in text and '"[1,\\n 2]"' in text
