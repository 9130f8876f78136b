"""Experts rounded on their own tokens: what each sees, who is starved, and one that nobody asks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant.models.sites import in_expert
from affinequant.rounding.replay import Replay
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
