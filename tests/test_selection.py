"""Transforms chosen block by block: the right one wins, within the budget, the same one each time, and it is shown."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import affinequant
from affinequant.cli import main
from affinequant.cli.comparison import online_cost
from affinequant.learning.selection import Option, cheapest_best, frontier, select
from affinequant.learning.starts import Seen
from affinequant.models import LLAMA, resolve, resolve_sites
from affinequant.models.source import open_source
from affinequant.progress import Silent
from affinequant.recipe.recipe import CHOICE_SITES
from affinequant.rounding.job import BlockJob
from affinequant.rounding.ways import OutputError, output_error
from affinequant.transforms.placements import block_flops, candidates, flops_of
from tests.test_objective import make_job

Tiny = Callable[..., Path]


def option(name: str, flops: int, error: float, spread: float = 0.0) -> Option:
    noise = spread * torch.tensor([1.0, -1.0, 1.0, -1.0])
    return Option(name=name, flops=flops, off=OutputError(relative=error + noise, total=error))


def test_a_dearer_option_must_be_better_by_more_than_chance() -> None:
    none, cheap, dear = option("none", 0, 1.0), option("cheap", 10, 0.5), option("dear", 20, 0.49, spread=0.1)
    assert [one.name for one in frontier([none, cheap, dear])] == ["none", "cheap"]
    sure = option("dear", 20, 0.49, spread=0.001)
    assert [one.name for one in frontier([none, cheap, sure])] == ["none", "cheap", "dear"]
    # Of equals in cost the better one; within chance the one that is listed first.
    assert [one.name for one in frontier([none, option("free", 0, 0.7), cheap])] == ["free", "cheap"]
    assert [one.name for one in frontier([none, option("free", 0, 0.99, spread=0.1)])] == ["none"]


@pytest.mark.parametrize("most", [0, 5, 10, 14, 15, 29, 30, 45, 100])
def test_the_best_combination_within_the_budget(most: int) -> None:
    frontiers = {
        "a": [option("none", 0, 1.0), option("k", 10, 0.3)],
        "b": [option("none", 0, 0.9), option("h", 5, 0.4), option("k", 20, 0.1)],
        "c": [option("none", 0, 0.2), option("k", 15, 0.1)],
    }
    best = cheapest_best(frontiers, most)
    assert list(best) == list(frontiers) and sum(one.flops for one in best.values()) <= most
    least = min(
        sum(one.error for one in chosen)
        for chosen in itertools.product(*frontiers.values())
        if sum(one.flops for one in chosen) <= most
    )
    assert sum(one.error for one in best.values()) == pytest.approx(least)


def test_one_massive_token_counts_though_tokens_outvote_it() -> None:
    wanted = torch.ones(100, 4)
    wanted[0] = 1000.0
    even, missed = wanted * 1.1, wanted * 1.05
    missed[0] = 500.0
    assert output_error(missed, wanted).relative.mean() < output_error(even, wanted).relative.mean()
    assert output_error(missed, wanted).error > 5 * output_error(even, wanted).error
    assert output_error(torch.zeros(3, 2), torch.zeros(3, 2)).error == 0


def chosen(job: BlockJob, tensors: dict[str, Tensor], rows: Tensor, at: str) -> tuple[str, dict[str, float]]:
    found, report = select(job, tensors, {at: Seen.of(rows)})
    assert found.recipe.transforms.get(at, "none") == report[at]["transform"]
    return report[at]["transform"], report[at]["errors"]


def rows_of(width: int, count: int = 1024) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("tier", ["merged", "online"])
def test_an_outlier_channel_is_balanced(tiny: Tiny, tier: str) -> None:
    """A diagonal takes it away; nothing that mixes features does so better. Without it nothing is done."""
    job, tensors, _ = make_job(tiny(), preset="rtn", tier=tier, transforms={"mlp_mid": "auto"}, cost_budget=0.0)
    weight, rows = tensors["mlp.down_proj.weight"], rows_of(128)
    assert chosen(job, tensors, rows, "mlp_mid")[0] == "none"
    rows[:, 9] *= 40
    tensors = tensors | {"mlp.down_proj.weight": weight * torch.where(torch.arange(128) == 9, 1 / 40, 1.0)}
    name, errors = chosen(job, tensors, rows, "mlp_mid")
    assert name == "diagonal" and errors["diagonal"] < 0.5 * errors["none"]
    assert list(errors) == ["none", "diagonal"]


def planted(kind: str, width: int) -> Tensor:
    """A badly conditioned matrix of this structure on `width` features."""
    generator = torch.Generator().manual_seed(7)

    def bad(n: int) -> Tensor:
        u, v = torch.linalg.qr(torch.randn(2, n, n, generator=generator)).Q
        return (u * torch.logspace(0, -2, n)) @ v

    if kind == "block":
        return torch.block_diag(*(bad(64) for _ in range(width // 64)))
    return torch.kron(bad(8), bad(width // 8))


@pytest.mark.parametrize("kind", ["block", "kronecker"])
def test_the_structure_that_is_there_is_found(tiny: Tiny, kind: str) -> None:
    job, tensors, _ = make_job(tiny(), preset="rtn", tier="online", transforms={"mlp_mid": "auto"}, cost_budget=100.0)
    matrix = planted(kind, 128)
    weight = tensors["mlp.down_proj.weight"] @ torch.linalg.inv(matrix).mT
    # Inputs and weights are planted the opposite way, so that undoing it evens out both.
    name, errors = chosen(job, tensors | {"mlp.down_proj.weight": weight}, rows_of(128) @ matrix, "mlp_mid")
    assert name == f"diagonal+{kind}" and errors[name] < 0.7 * errors["diagonal+hadamard"]


def test_heads_get_matrices_of_their_own_that_fold(tiny: Tiny) -> None:
    """Directions of each KV head far larger than others and mixed: neither a rotation nor a diagonal undoes that."""
    job, tensors, _ = make_job(tiny(), preset="rtn", transforms={"vo": "auto"})
    matrix = torch.block_diag(*(planted("kronecker", 16) for _ in range(4)))
    weight = tensors["self_attn.o_proj.weight"] @ torch.linalg.inv(matrix).mT
    name, errors = chosen(job, tensors | {"self_attn.o_proj.weight": weight}, rows_of(64) @ matrix, "vo")
    assert name == "block" and errors["block"] < 0.7 * errors["hadamard"]


@pytest.mark.parametrize("budget", [0.0, 10.0, 20.0, 100.0])
def test_a_block_spends_no_more_than_its_budget(tiny: Tiny, budget: float) -> None:
    job, tensors, _ = make_job(tiny(), preset="rtn", tier="online", transforms="auto", cost_budget=budget)
    seen = {
        name: Seen.of(rows)
        for name, members in job.decoder.family.input_groups()
        for rows in [rows_of(tensors[f"{members[0]}.weight"].shape[1]) ** 3]
    }
    found, report = select(job, tensors, seen)
    block = block_flops(job.decoder.family, job.decoder.dims)
    spent = sum(one["flops"] for one in report.values())
    assert list(report) == list(CHOICE_SITES) and spent <= block * budget / 100
    assert (spent > 0) is (budget > 0)
    for name, one in report.items():
        assert one["flops"] == flops_of(one["transform"], job.sites[name])
        assert list(one["errors"]) == list(candidates(job.sites[name], job.recipe, block))
    assert "auto" not in found.recipe.transforms.values()
    assert select(job, tensors, seen) == (found, report)


def test_a_job_without_a_choice_is_left_alone(tiny: Tiny) -> None:
    job, tensors, _ = make_job(tiny(), preset="fast")
    assert select(job, tensors, {}) == (job, {})


def test_choices_are_made_where_linears_read_quantised_inputs() -> None:
    assert tuple(name for name, _ in LLAMA.input_groups()) == CHOICE_SITES


class Stops(Silent):
    """A run that is interrupted after its first block."""

    def block(self, index: int, report: Any) -> None:
        raise KeyboardInterrupt


def test_a_run_says_what_it_chose_and_resumes_to_the_same_bytes(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(2500)))
    recipe = affinequant.Recipe(
        model=str(tiny()),
        preset="fast",
        tier="online",
        transforms={"residual": "hadamard", **dict.fromkeys(CHOICE_SITES, "auto")},
        cost_budget=60.0,
        rounding="auto",
        finish="kl",
        finish_epochs=1,
        samples=8,
        seq_len=32,
        data=str(tmp_path / "text.txt"),
        out=str(tmp_path / "whole"),
    )
    report = affinequant.quantize(recipe).report
    assert report["verified"]["passed"] and report["events"] == []
    assert set(report["choices"]) == {
        f"{kind} at {site}" for kind in ("transform", "rounding") for site in CHOICE_SITES
    }
    spent, block = online_cost(report)
    assert 0 < spent <= 0.6 * block
    assert main(["inspect", str(tmp_path / "whole")]) == 0
    shown = capsys.readouterr().out
    assert all(what in shown for what in report["choices"])
    ours = json.loads((tmp_path / "whole/config.json").read_text())["quantization_config"]["affinequant"]
    rows = ours["transforms_by_block"]
    assert [{site: one["transform"] for site, one in block["transforms"].items()} for block in report["blocks"]] == rows
    dims = resolve(open_source(Path(recipe.model)).config, where="")[1]
    sites = {site.name: site for site in resolve_sites(LLAMA, dims)}
    stored = load_file(tmp_path / "whole/affinequant.safetensors")
    for index, row in enumerate(rows):
        for site, members in LLAMA.input_groups():
            kept = any(name.startswith(f"model.layers.{index}.{members[0]}.online") for name in stored)
            assert kept is (flops_of(row[site], sites[site]) > 0)
    for site in CHOICE_SITES:
        taken = {row[site] for row in rows}
        assert ours["placements"][site]["reason"] == f"chosen block by block: {', '.join(sorted(taken))}"
    again = replace(recipe, out=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        affinequant.quantize(again, progress=Stops())
    affinequant.quantize(again)
    for file in ("affinequant.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
