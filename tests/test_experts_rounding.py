"""Experts rounded on their own tokens: what each sees, who is starved, and one that nobody asks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant.learning.objective import BlockObjective
from affinequant.models.sites import in_expert
from affinequant.numbers import grid_of
from affinequant.numbers.weights import codes_of, dequantize, weight_range
from affinequant.recipe.scheme import Scheme
from affinequant.rounding.block import round_block
from affinequant.rounding.gptq import gptq
from affinequant.rounding.replay import Replay
from affinequant.rounding.ways import output_error
from tests.test_objective import make_job
from tests.tiny import tiny_llama

Tiny = Callable[..., Path]
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(3500)))
    return path


def quantized(folder: Path, text: Path, out: Path, **fields: Any) -> affinequant.Result:
    wanted = {"scheme": "w4a4", "tier": "online", "preset": "fast", "samples": 8, "seq_len": 32}
    return affinequant.quantize(folder, data=text, out=out, **wanted | fields)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_sees_the_tokens_that_come_to_it(family: str, scheme: str, tiny: Tiny) -> None:
    """By the hooks of a pass of the block as it is run: every row that reaches an expert's down, in its order."""
    job, tensors, x = make_job(tiny(family=family), preset="rtn", scheme=scheme)
    clips = {site: 0.9 for site, _ in job.family.input_groups() if not in_expert(site)}
    passing = Replay(job, x, {})
    for site in clips:
        passing.reach(site, tensors, clips)
    counts = passing.route(tensors, clips)
    seen: dict[int, list[Tensor]] = {}
    handles = [
        job.decoder.block(job.index)
        .get_submodule(job.family.expert(number))
        .register_forward_pre_hook(lambda _, args, number=number: seen.setdefault(number, []).append(args[0]))
        for number in range(job.decoder.dims.experts)
    ]
    inputs = {site: job.site_input(site, clip=clips.get(site)) for site, _ in job.family.input_groups()}
    with torch.no_grad():
        for part in (slice(0, 2), slice(2, 4)):
            job.run(tensors, x[part], lambda site, value: inputs[site].rounded(value))
    for handle in handles:
        handle.remove()
    assert sum(counts) == x.shape[0] * x.shape[1] * job.decoder.dims.routed
    for number, count in enumerate(counts):
        found = [rows[0] for _, rows in passing.of_expert(job.family.branch, number)]
        met = torch.cat(seen[number]) if number in seen else torch.empty(0, job.decoder.dims.hidden)
        assert torch.equal(inputs[job.family.branch].rounded(torch.cat(found)), met) and len(met) == count


@pytest.mark.parametrize("family", MIXTURES)
def test_the_report_counts_tokens_and_names_the_starved(family: str, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    made = quantized(tiny(family=family), text, tmp_path / "out")
    width = json.loads((made.path / "config.json").read_text())["hidden_size"]
    blocks = [block for block in made.report["blocks"] if "experts" in block]
    assert len(blocks) == (1 if family in ("qwen3_moe", "qwen3_next") else 2)  # of which one block is dense
    for block in blocks:
        tokens, starved = block["experts"]["tokens"], block["experts"]["starved"]
        assert sum(tokens) == 8 * 32 * 2  # two experts a token
        few = {number for number, count in enumerate(tokens) if count < width}
        named = {int(name.split("experts.")[1].split(".")[0]) for name in starved}
        assert few <= named
        said = [event for event in block["events"] if "fewer tokens than they have inputs" in event]
        assert bool(said) is bool(starved)
    assert made.report["verified"]["passed"]


def test_an_expert_that_nobody_asks_is_rounded_all_the_same(text: Path, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", family="mixtral")
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("block_sparse_moe.gate.weight")]:
        stored[name] = stored[name] * 0
        stored[name][2:] = -stored[name][2:]
    # Ties go to the first: experts 2 and 3 get no token.
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    made = quantized(folder, text, tmp_path / "out", rounding="auto")
    for block in made.report["blocks"]:
        tokens = block["experts"]["tokens"]
        assert 0 in tokens and made.report["verified"]["passed"]
        unasked = {number for number, count in enumerate(tokens) if not count}
        assert {f"block_sparse_moe.experts.{number}.w1" for number in unasked} <= set(block["experts"]["starved"])
    model = affinequant.load(made.path)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(12)[None]).logits).all())


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_of_few_tokens_gate_and_up_are_rounded_on_those_of_all_too(scheme: str, tiny: Tiny) -> None:
    """By moments that are taken anew; an expert that nobody asks takes those of all."""
    job, tensors, x = make_job(
        tiny(family="mixtral", num_local_experts=8), preset="rtn", rounding="gptq", scheme=scheme
    )
    where = job.family.expert()
    router = where.replace(".experts", ".gate.weight")
    tensors[router] = torch.cat(
        [tensors[router][:7], -1e3 * tensors[router][:1].abs()]
    )  # is the last one seldom asked?
    made = round_block(job, tensors, x, BlockObjective(job, tensors, {}))
    assert 0 < sum(made.routed) == x.shape[0] * x.shape[1] * 2 and set(made.drawn) < set(made.starved)
    passing = Replay(job, x, {})
    for site in (site for site, _ in job.family.input_groups() if not in_expert(site)):
        passing.reach(site, made.tensors, made.clips)
    assert passing.route(made.tensors, made.clips) == list(made.routed)
    read = job.site_input(job.family.branch, clip=made.clips[job.family.branch])
    every = torch.cat([read.rounded(given) for given, _ in passing.routed])
    for number, count in enumerate(made.routed):
        own = torch.cat([read.rounded(given[(index == number).any(-1)]) for given, index in passing.routed])
        hessian = (own.mT @ own + len(every.mT) * every.mT @ every / len(every)) / (count + len(every.mT))
        for name in ("w1", "w3"):
            member = f"{where}.{number}.{name}"
            assert (member in made.drawn) is (count < len(every.mT)), member
            grid, weight = job.weight_grid(job.family.branch), tensors[f"{member}.weight"]
            scale, zero = grid.params(*weight_range(weight, grid), job.store)
            codes = gptq(weight, hessian, scale, zero, grid, damping=job.recipe.damping)
            if member in made.drawn:  # the sums have another order
                assert float((codes == made.stored[f"{member}.codes"]).float().mean()) > 0.98, member
    nearest = round_block(
        replace(job, recipe=replace(job.recipe, rounding="nearest")), tensors, x, BlockObjective(job, tensors, {})
    )
    assert nearest.starved and not nearest.drawn


def test_few_tokens_and_those_of_all_err_less_than_nearest_on_others() -> None:
    """Loud channels, a falling spectrum, and for every expert features of its own."""
    generator = torch.Generator().manual_seed(0)
    width, few, grid = 128, 32, grid_of(Scheme.parse("w4a16").weight)
    fall = torch.diag(torch.arange(1, width + 1).float() ** -0.5) @ torch.randn(width, width, generator=generator)
    weight = torch.randn(64, width, generator=generator)
    scale, zero = grid.params(*weight_range(weight, grid), torch.bfloat16)

    def tokens(count: int, own: Tensor) -> Tensor:
        x = torch.randn(count, width, generator=generator) @ fall + torch.randn(count, 8, generator=generator) @ own
        x[:, :3] *= 20
        return x

    experts = [torch.randn(8, width, generator=generator) / 4 for _ in range(8)]
    every = torch.cat([tokens(200, own) for own in experts])
    pool = every.mT @ every / len(every)
    for own in experts:
        seen, others = tokens(few, own), tokens(2000, own)
        hessian = (seen.mT @ seen + width * pool) / (few + width)
        found = [gptq(weight, hessian, scale, zero, grid, damping=0.01), codes_of(weight, scale, zero, grid)]
        drawn, nearest = (
            output_error(others @ dequantize(codes, scale, zero, grid).mT, others @ weight.mT).error for codes in found
        )
        assert drawn < 0.9 * nearest


WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"preset": "best", "scheme": "w4a4kv4"}),
    ("qwen2_moe", {"preset": "default", "transforms": "auto", "rounding": "auto", "cost_budget": 60.0}),
    ("qwen3_moe", {"preset": "best", "tier": "merged", "judge": "kl"}),
]


@pytest.mark.parametrize(("family", "fields"), WHOLE)
def test_what_takes_most_comes_to_its_end(
    family: str, fields: dict[str, Any], tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    """Learned, chosen, refined in sweeps, finished; and what is loaded is what was made."""
    made = quantized(tiny(family=family), text, tmp_path / "out", epochs=1, finish_epochs=1, **fields)
    report = made.report
    assert report["verified"]["passed"] and report["finish"]["steps"] == 7  # the eighth sample judges
    blocks = [block for block in report["blocks"] if "experts" in block]
    for block in blocks:
        names = {name.split(".experts.")[0] for name in block["linears"] if ".experts." in name}
        assert len(names) == 1 and block["steps"] > 0 and not block["non_finite"]
        if fields.get("transforms") == "auto":
            assert list(block["transforms"]) == ["attn_in", "vo", "mlp_in", "mlp_mid"]
            fed = {name for name, one in block["roundings"].items() if "errors" in one}
            assert any(in_expert(site) for site in fed) and any(site.startswith("mlp_in.") for site in fed)
    model = affinequant.load(made.path)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(12)[None]).logits).all())


def test_twice_and_after_a_kill_the_same_bytes(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from affinequant.learning import block as stage

    folder, whole = tiny(family="qwen2_moe"), stage.block_stage
    once = quantized(folder, text, tmp_path / "once", preset="default")

    def killed(work: Any, which: Any, carry: Any) -> Any:
        if which.block == 1:
            raise KeyboardInterrupt
        return whole(work, which, carry)

    monkeypatch.setattr(stage, "block_stage", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(folder, text, tmp_path / "twice", preset="default")
    monkeypatch.setattr(stage, "block_stage", whole)
    twice = quantized(folder, text, tmp_path / "twice", preset="default", resume=True)
    for path in once.path.glob("*.safetensors"):
        assert path.read_bytes() == (twice.path / path.name).read_bytes()
