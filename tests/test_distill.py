"""The end-to-end finish: it starts from what was rounded, follows the true divergence, and is undone where it harms."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import affinequant
from affinequant import costs
from affinequant.costs import blocks_kept
from affinequant.learning import continuous
from affinequant.learning import distill as distillation
from affinequant.learning.distill import Continuous, Distilled, Divergence, distill
from affinequant.learning.divergence import divergence
from affinequant.learning.fit import fit
from affinequant.learning.objective import BlockObjective, folded_exactly
from affinequant.learning.phases import Phase
from affinequant.learning.training import FitReport
from affinequant.models.source import open_source
from affinequant.recipe.scheme import Scheme
from affinequant.rounding.block import round_block
from affinequant.rounding.job import BlockJob
from affinequant.rounding.rounded import Rounded
from affinequant.transforms.online import parts_of
from affinequant.transforms.placements import block_flops
from tests.test_objective import make_job, started
from tests.tiny import quantized_input

Tiny = Callable[..., Path]
Train = Callable[[Phase], FitReport]


class Case(NamedTuple):
    jobs: list[BlockJob]
    rounded: list[Rounded]
    stages: list[dict[str, Tensor]]
    outer: dict[str, Tensor]
    embedded: Tensor
    full: Tensor


ONLINE = {"tier": "online", "transforms": {"mlp_in": "diagonal+kronecker", "vo": "kronecker", "mlp_mid": "hadamard"}}

CACHED = {"scheme": "w4a4kv4", "tier": "online", "transforms": {"qk": "rope-pair+hadamard"}}


def make(folder: Path, numbers: Scheme | None = None, **fields: Any) -> Case:
    """Both blocks rounded, and the full-precision stream behind them. `numbers` in the place of the recipe's scheme."""
    jobs, rounded, stages = [], [], []
    full = quantized = embedded = torch.empty(0)
    for index in range(2):
        job, tensors, x = make_job(folder, index, **{"preset": "fast", "transforms": {}} | fields)
        job = replace(job, scheme=numbers or job.scheme)
        if index == 0:
            full = quantized = embedded = x
        learned = BlockObjective(job, tensors, *started(job, tensors, x))
        made = round_block(job, folded_exactly(learned, tensors), quantized, learned, full)
        on_input = quantized_input(job, made.clips, made.online)
        quantized = job.run_all(made.tensors, quantized, on_input, learned.on_attention)
        full = job.run_all(tensors, full)
        prefix = f"{job.decoder.family.blocks}.{index}."
        jobs.append(job)
        rounded.append(made)
        stages.append({prefix + name: tensor for name, tensor in made.stored.items()})
    source = open_source(folder)
    outer = source.read([name for name in source.entries if ".layers." not in name])
    return Case(jobs, rounded, stages, outer, embedded, full)


def finished(case: Case, train: Train = lambda phase: fit(*phase), **fields: Any) -> Distilled:
    jobs, count = [replace(job, recipe=replace(job.recipe, **fields)) for job in case.jobs], len(case.full)
    return distill(jobs, iter(case.stages), case.outer, case.embedded, case.full, count, lambda text: None, train)


@pytest.mark.parametrize(
    "fields", [{"scheme": "w4a4"}, {"scheme": "w4a16-g32"}, {"scheme": "w4a8-sym"}, ONLINE, CACHED], ids=str
)
def test_it_starts_from_what_was_rounded(tiny: Tiny, fields: dict[str, Any]) -> None:
    case = make(tiny(bias=True), **fields)
    embedded = case.embedded.double()
    for job, made, stored in zip(case.jobs, case.rounded, case.stages, strict=True):
        # In fp64: scaled outputs differ from scaled weights in their last bits, which would move a rounding now and then.
        job = replace(job, decoder=replace(job.decoder, dtype=torch.float64))
        parts = parts_of(made.stored, job.decoder.family.attention)
        heads = job.cached_heads({part: made.stored[name] for part, name in parts.items()})
        assert (heads is None) is (fields is not CACHED) and bool(parts) is (fields is CACHED)
        expected = job.run_all(made.tensors, embedded, quantized_input(job, made.clips, made.online), heads)
        block = Continuous(job, stored)
        assert block.tensors()[1].keys() == (
            set(block.linears) if job.scheme.weight.granularity == "channel" else set()
        )
        torch.testing.assert_close(block.run_all(embedded), expected, rtol=1e-9, atol=1e-9)
        changed = block.changed()
        assert changed.keys() < stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in changed.items())


def test_the_loss_is_the_divergence_of_the_models_own_logits(tiny: Tiny) -> None:
    folder = tiny()
    case = make(folder)
    objective = Divergence([Continuous(j, s) for j, s in zip(case.jobs, case.stages, strict=True)], case.outer, 1e-3)
    x = case.embedded
    for job, made in zip(case.jobs, case.rounded, strict=True):
        x = job.run_all(made.tensors, x, quantized_input(job, made.clips, made.online))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        p, q = (model.lm_head(model.model.norm(h)).softmax(-1) for h in (case.full, x))
        expected = (p * (p.log() - q.log())).sum(-1).mean()
        torch.testing.assert_close(objective.loss((case.embedded, case.full)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, ONLINE], ids=["merged", "online"])
def test_every_kind_of_parameter_gets_a_gradient(tiny: Tiny, fields: dict[str, Any]) -> None:
    case = make(tiny(), activation_clip="search", **fields)
    blocks = [Continuous(j, s) for j, s in zip(case.jobs, case.stages, strict=True)]
    objective = Divergence(blocks, case.outer, 1e-3)
    objective.loss((case.embedded, case.full)).backward()
    for block in blocks:
        for name, parameter in zip(block.names, block.logs, strict=True):
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
    assert objective.log_gain.grad is not None and bool(objective.log_gain.grad.abs().sum() > 0)


@pytest.mark.parametrize("fields", [{}, ONLINE], ids=["merged", "online"])
def test_it_comes_nearer_and_leaves_the_codes_alone(tiny: Tiny, fields: dict[str, Any]) -> None:
    case = make(tiny(), **fields)
    for stage in case.stages:  # so much worse that a few tokens can tell
        for name in stage:
            stage[name] = stage[name] * 1.5 if name.endswith(".scale") else stage[name]
    done = finished(case, finish_epochs=6, finish_lr=3e-2)
    first, *later = done.fitted.series["held-out"]
    assert done.fitted.best == min(later) < 0.7 * first
    stored = {name: tensor for stage in case.stages for name, tensor in stage.items()} | case.outer
    assert not any(name.endswith((".codes", ".zero")) for name in done.tensors)
    for name, tensor in done.tensors.items():
        assert tensor.dtype == stored[name].dtype and tensor.shape == stored[name].shape
        if name.endswith(".scale"):
            assert torch.equal(tensor.bfloat16().float(), tensor)
    # What is returned is what the changed tensors compute.
    stages = [{name: done.tensors.get(name, tensor) for name, tensor in stage.items()} for stage in case.stages]
    x = case.embedded
    with torch.no_grad():
        for job, stage in zip(case.jobs, stages, strict=True):
            x = Continuous(job, stage)(x)
    torch.testing.assert_close(done.after, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{"scheme": "w4a16-g32"}, ONLINE], ids=str)
def test_what_is_kept_is_not_computed_twice_and_changes_no_bit(
    tiny: Tiny, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit to main memory keeps nothing; room for one block keeps the last."""
    case, again, done = make(tiny(), **fields), [], {}
    plain = continuous.checkpoint
    monkeypatch.setattr(continuous, "checkpoint", lambda *given, **how: again.append(1) or plain(*given, **how))
    job = case.jobs[0]
    _, each = blocks_kept(job.recipe, job.decoder.dims, block_flops(job.decoder.family, job.decoder.dims) // 2, "cpu")
    steps = len(case.full) - 1
    for name, room, memory, expected in (("all", 2, "", 0), ("last", 1, "", steps), ("none", 2, "9GB", 2 * steps)):
        monkeypatch.setattr(costs, "FINISH_ROOM", room * each)
        again.clear()
        done[name] = finished(case, finish_epochs=1, finish_lr=1e-2, cpu_memory=memory)
        assert len(again) == expected
    for name in ("last", "none"):
        assert done[name].fitted.series == done["all"].fitted.series
        assert all(torch.equal(tensor, done["all"].tensors[key]) for key, tensor in done[name].tensors.items())


@pytest.mark.parametrize("fields", [{"scheme": "w4a4"}, {"scheme": "w4a16"}, ONLINE, CACHED], ids=str)
def test_a_block_keeps_no_more_than_was_planned(tiny: Tiny, fields: dict[str, Any]) -> None:
    job, tensors, x = make_job(tiny(hidden=128, heads=8, mlp=384), **{"preset": "fast", "transforms": {}} | fields)
    learned = BlockObjective(job, tensors, *started(job, tensors, x))
    stored = round_block(job, folded_exactly(learned, tensors), x, learned).stored
    block, sizes = Continuous(job, stored, keeps=True), dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x[:1].repeat(1, 1, 1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x)
    family, dims = job.decoder.family, job.decoder.dims
    _, each = blocks_kept(job.recipe, dims, block_flops(family, dims) // 2, "cpu")
    assert 0.5 * each < sum(sizes.values()) <= each


def test_what_harms_is_undone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a rate does to the network: held-out text is made to say that what was learned is worse."""
    case, learned = make(tiny()), list[Tensor]()

    def worse(loss: Any, *_: Tensor) -> float:
        learned.append(loss.__self__.log_gain.detach().clone())
        return float(len(learned))

    monkeypatch.setattr(distillation, "mean_loss", worse)
    done = finished(case, finish_epochs=1, finish_lr=1e-2)
    assert done.fitted.series["held-out"] == [1, 2] and done.fitted.best == 1 and not torch.equal(*learned)
    stored = {name: tensor for stage in case.stages for name, tensor in stage.items()} | case.outer
    assert all(torch.equal(tensor, stored[name]) for name, tensor in done.tensors.items())


@pytest.mark.parametrize("units", [True, False])
def test_training_alone_multiplies_in_bfloat16_and_only_where_a_cpu_can(
    tiny: Tiny, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, seen = make(tiny()), set[tuple[bool, str]]()
    setting = torch.backends.mkldnn.matmul
    before, loss = setting.fp32_precision, Divergence.loss

    def watched(self: Divergence, batch: Any) -> Tensor:
        seen.add((torch.is_grad_enabled(), setting.fp32_precision))
        return loss(self, batch)

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(Divergence, "loss", watched)
    finished(case, finish_epochs=1)
    trained, judged = ("bf16", "ieee") if units else (before, before)
    assert {precision for learns, precision in seen if learns} == {trained}
    assert judged in {precision for learns, precision in seen if not learns}
    assert setting.fp32_precision == before


def test_full_ranges_stay_full_where_clipping_was_refused(tiny: Tiny) -> None:
    done = finished(make(tiny(), activation_clip="none"), finish_lr=1e-2)
    clips = [float(tensor) for name, tensor in done.tensors.items() if name.endswith("input_clip")]
    assert clips and set(clips) == {1.0}


def test_its_trace_is_of_every_step_in_one_go_or_two(tiny: Tiny) -> None:
    case, state = make(tiny()), dict[str, Any]()
    fields = {"finish_epochs": 3, "finish_lr": 1e-2}
    whole = finished(case, **fields)
    steps = len(case.full) - 1
    assert len(whole.trace) == 3 * steps
    for epoch, mean in enumerate(whole.fitted.series["loss"]):
        assert sum(whole.trace[epoch * steps :][:steps]) / steps == pytest.approx(mean)  # pyright: ignore[reportArgumentType]

    def stops(phase: Phase) -> FitReport:
        state.update(fit(*phase._replace(config=replace(phase.config, pause_after=1))).state or {})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finished(case, stops, **fields)
    assert finished(case, lambda phase: fit(*phase, state=state), **fields).trace == whole.trace


@pytest.mark.parametrize(
    ("scheme", "tier"),
    [("w4a4", "merged"), ("w8a8", "merged"), ("w4a16-g32", "merged"), ("w4a4", "online"), ("w4a4kv4", "online")],
)
def test_in_the_pipeline(tiny: Tiny, tmp_path: Path, scheme: str, tier: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} green bottles hang on wall {i * 7 % 13}" for i in range(1500)))
    fields = {"preset": "fast", "scheme": scheme, "tier": tier, "data": str(text), "samples": 4, "seq_len": 32}
    plain = affinequant.quantize(tiny(tied=True), out=tmp_path / "plain", **fields)
    done = affinequant.quantize(tiny(tied=True), out=tmp_path / "done", finish="kl", finish_lr=1e-2, **fields)
    assert "finish" not in plain.report
    finish = done.report["finish"]
    assert finish["divergence_last"] <= finish["divergence_first"]
    assert done.report["verified"]["passed"]
    assert done.report["calibration_perplexity"]["full"] == plain.report["calibration_perplexity"]["full"]


def test_the_divergence_and_its_gradients_are_those_of_the_plain_expression() -> None:
    """Over more tokens than are worked on at once, with a parameter behind the logits, and scaled by what follows."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 8, generator=generator)
    log_gain = nn.Parameter(torch.randn(8, generator=generator) / 10)
    student, teacher = (torch.randn(2, 300, 8, generator=generator) for _ in range(2))
    student.requires_grad_()
    decoder: Any = SimpleNamespace(logits=lambda hidden, weight: hidden @ weight["w"].mT)

    def logits(hidden: Tensor) -> Tensor:
        return hidden * log_gain.exp() @ head.mT

    wanted = nn.functional.kl_div(
        logits(student).log_softmax(-1), (teacher @ head.mT).log_softmax(-1), reduction="sum", log_target=True
    )
    expected = torch.autograd.grad(3 * wanted / 600, (student, log_gain))
    got = divergence(decoder, teacher, {"w": head}, student, logits, [log_gain])
    torch.testing.assert_close(got, wanted / 600)
    torch.testing.assert_close(torch.autograd.grad(3 * got, (student, log_gain)), expected)
    with torch.no_grad():
        assert torch.equal(divergence(decoder, teacher, {"w": head}, student, logits, [log_gain]), got)
