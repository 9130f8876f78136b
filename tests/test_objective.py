"""One block's objective: what is trained, what is compared, and the gradual mask over a whole fit."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from affinequant.fit import FitConfig, fit
from affinequant.learning.objective import BlockObjective, folded_exactly
from affinequant.learning.starts import Watch, build_transforms
from affinequant.models import resolve, resolve_sites
from affinequant.models.decoder import open_decoder
from affinequant.models.source import open_source
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.recipe.recipe import resolve as resolve_recipe
from affinequant.rounding.job import BlockJob
from affinequant.transforms import Transform, build
from affinequant.transforms.banded import Banded

Tiny = Callable[..., Path]


def make_job(folder: Path, index: int = 0, **fields: Any) -> tuple[BlockJob, dict[str, Tensor], Tensor]:
    """(job, the block's tensors in float32, what reaches it [4, 24, hidden]); in the merged tier, unless asked."""
    source = open_source(folder)
    family, dims = resolve(source.config, where="")
    decoder = open_decoder(source, family, dims, torch.device("cpu"), torch.float32)
    small = {"model": str(folder), "tier": "merged", "samples": 4, "seq_len": 24, "batch_size": 2}
    recipe = resolve_recipe(small | fields)
    ids = torch.randint(2, 320, (4, 24), generator=torch.Generator().manual_seed(0))
    embedding = source.read([f"{family.embedding}.weight"])
    x, kwargs = decoder.embed(ids, {name: tensor.float() for name, tensor in embedding.items()})
    job = BlockJob(
        decoder=decoder,
        index=index,
        sites={site.name: site for site in resolve_sites(family, dims)},
        recipe=recipe,
        scheme=recipe.parsed_scheme,
        kwargs=kwargs[index],
        store=torch.bfloat16,
    )
    prefix = f"{family.blocks}.{index}."
    tensors = source.read(source.names_under(prefix[:-1]))
    return job, {name[len(prefix) :]: tensor.float() for name, tensor in tensors.items()}, x


def unlearned(job: BlockJob) -> dict[str, Transform]:
    """The recipe's transforms, which all fold, as they are without a start."""
    wanted = {name: job.recipe.transforms[name] for name in job.sites if name in job.recipe.transforms}
    wanted.pop("residual", None)
    return {name: build(chosen, job.sites[name], seed=job.seed(name), alpha=0.1) for name, chosen in wanted.items()}


def started(job: BlockJob, tensors: dict[str, Tensor], x: Tensor) -> Any:
    """The recipe's transforms, those that fold and those that stay online, from where they start on `x`."""
    watch = Watch(x.shape[0], x.shape[1], job.seed("rows"))
    job.run_all(tensors, x, watch)
    return build_transforms(job, tensors, watch.seen())


def objective_of(job: BlockJob, tensors: dict[str, Tensor], x: Tensor) -> BlockObjective:
    return BlockObjective(job, tensors, *started(job, tensors, x))


def distort(objective: BlockObjective) -> None:
    """Every transform away from where it starts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in objective.transforms.values():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("shape", [{}, {"bias": True}, {"kv_heads": 1}], ids=str)
@pytest.mark.parametrize("preset", ["smoothquant", "paper", "default"])
def test_transforms_alone_change_nothing(tiny: Tiny, preset: str, shape: dict[str, Any]) -> None:
    job, tensors, x = make_job(tiny(**shape), preset=preset)
    objective = objective_of(job, tensors, x)
    distort(objective)
    with torch.no_grad():
        torch.testing.assert_close(job.run(objective.folded(), x), job.run(tensors, x), rtol=1e-3, atol=2e-4)
    exact = folded_exactly(objective, {name: tensor.double() for name, tensor in tensors.items()})
    assert all(tensor.dtype == torch.float64 for tensor in exact.values())
    assert any(not torch.equal(exact[name].float(), tensor) for name, tensor in tensors.items())


def test_nothing_is_lost_without_rounding_error(tiny: Tiny) -> None:
    """At 8 bits the objective is near zero, at 4 bits it is not: what it measures is the rounding."""
    losses = {}
    for scheme in ("w8a8", "w4a4"):
        job, tensors, x = make_job(tiny(), preset="rtn", scheme=scheme)
        target = job.run_all(tensors, x)
        with torch.no_grad():
            losses[scheme] = float(objective_of(job, tensors, x).loss((x, target))["block"])
    assert 0 < losses["w8a8"] < 0.01 * losses["w4a4"]


def test_what_is_trained_follows_the_recipe(tiny: Tiny) -> None:
    def groups(**fields: Any) -> dict[str, tuple[int, float]]:
        job, tensors, x = make_job(tiny(), **fields)
        return {g.name: (len(g.parameters), g.lr) for g in objective_of(job, tensors, x).groups()}

    assert groups(preset="rtn") == {"transforms": (0, 5e-3), "clipping": (0, 1e-2)}
    # two diagonals at norms and one at mlp_mid, rope-pair (2), banded (2); 7 linears with two ends each
    assert groups(preset="paper", lr=0.1, clip_lr=0.2) == {"transforms": (7, 0.1), "clipping": (14, 0.2)}
    learned = {"preset": "rtn", "activation_clip": "learn"}
    assert groups(**learned)["clipping"][0] == 4
    assert groups(preset="rtn", weight_clip="learn+search")["clipping"][0] == 14


def test_weights_are_never_trained(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), preset="default", epochs=1)
    objective = objective_of(job, tensors, x)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    fit(objective, lambda _: [(x, job.run_all(tensors, x))], FitConfig(epochs=1, steps_per_epoch=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_learning_lowers_the_loss(tiny: Tiny, preset: str) -> None:
    """Four channels are loud; the transforms start at the identity and must learn to quieten them."""
    job, tensors, x = make_job(tiny(), preset=preset, lr=0.04, clip_lr=0.04, epochs=3)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{norm}.weight"][:4] *= 8
    target = job.run_all(tensors, x)
    objective = BlockObjective(job, tensors, unlearned(job))

    def error() -> float:
        with torch.no_grad():
            return float(objective.loss((x, target))["block"])

    first = error()
    report = fit(objective, lambda _: [(x, target)] * 8, FitConfig(epochs=3, steps_per_epoch=8, schedule="cosine"))
    assert report.stopped == "done" and error() < 0.8 * first


def test_the_mask_is_diagonal_in_the_first_epoch_and_dense_in_the_last(tiny: Tiny) -> None:
    epochs, steps = 5, 3
    job, tensors, x = make_job(tiny(), preset="paper", epochs=epochs, alpha=0.1)
    objective = objective_of(job, tensors, x)
    banded = objective.transforms["vo"]
    assert isinstance(banded, Banded)
    widths, released = [], []
    original, ask = objective.loss, objective.progress
    objective.loss = lambda batch: widths.append(int((banded.mask[0] > 0).sum()) + 1) or original(batch)
    objective.progress = lambda t: released.append(list(ask(t))) or released[-1]
    target = job.run_all(tensors, x)
    fit(objective, lambda _: [(x, target)] * steps, FitConfig(epochs=epochs, steps_per_epoch=steps))
    n = 16
    # the paper's widths, each for a whole epoch, and once more where the end is judged
    expected = [width for e in range(epochs) for width in [(n - 1) * e // (epochs - 1) + 1] * steps]
    assert widths == [*expected, n]
    assert banded.mask.unique().tolist() == pytest.approx([0.0, 0.1])
    own = set(banded.parameters())
    assert [bool(r) for r in released] == [step in (3, 6, 9, 12) for step in range(15)]
    assert all(set(r) == own for r in released if r)
    assert bool((banded.off_diagonal.detach()[:, 0, -1] != 0).all()), "the corner was never trained"


def test_one_epoch_has_the_whole_matrix(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), preset="paper", epochs=1)
    objective = objective_of(job, tensors, x)
    objective.progress(0.0)
    assert bool((objective.transforms["vo"].mask.fill_diagonal_(1) > 0).all())  # pyright: ignore[reportAttributeAccessIssue]


def test_first_tokens_count_as_any_other(tiny: Tiny) -> None:
    """The relative loss weighs tokens by their own power; the plain one by none. Neither leaves a token out."""
    for loss, fields in (("relative", {}), ("mse", {"loss": "mse"})):
        job, tensors, x = make_job(tiny(), preset="rtn", scheme="w8a8", **fields)
        objective = objective_of(job, tensors, x)
        target = job.run_all(tensors, x)
        target[:, 0] += 10
        with torch.no_grad():
            value = float(objective.loss((x, target))["block"])
            y = job.run(objective.quantized(), x, objective.on_input)
        error = (y - target).square()
        expected = (error.sum(-1) / target.square().sum(-1)).mean() if loss == "relative" else error.mean()
        assert value == pytest.approx(float(expected), rel=1e-5)


def test_the_auxiliary_error_is_a_term_of_its_own(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), preset="paper", aux_loss=True)
    objective = objective_of(job, tensors, x)
    target = job.run_all(tensors, x)
    terms = objective.loss((x, target, target))
    assert set(terms) == {"block", "auxiliary"} and torch.equal(terms["block"], terms["auxiliary"])
    assert set(objective.loss((x, target))) == {"block"}


@pytest.mark.parametrize(
    ("clip", "ratio"), [("none", 1.0), ("search", 1.0), ("learn", 0.9820138), ("learn+search", 0.9820138)]
)
def test_inputs_are_rounded_over_the_range_that_is_learned(tiny: Tiny, clip: str, ratio: float) -> None:
    job, tensors, x = make_job(tiny(), preset="rtn", activation_clip=clip)
    objective = objective_of(job, tensors, x)
    grid = job.activation_grid("vo")
    assert grid is not None
    with torch.no_grad():
        torch.testing.assert_close(objective.on_input("vo", x), fake_quantize_activation(x, grid, ratio))


def test_weight_only_leaves_inputs_alone(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), scheme="w4a16")
    assert objective_of(job, tensors, x).on_input("vo", x) is x


def test_seeds_differ_by_purpose_block_and_recipe(tiny: Tiny) -> None:
    jobs = [make_job(tiny(), index=index, seed=seed)[0] for index in (0, 1) for seed in (0, 1)]
    seeds = [job.seed(purpose) for job in jobs for purpose in ("vo", "order")]
    assert len(set(seeds)) == 8 and seeds == [job.seed(purpose) for job in jobs for purpose in ("vo", "order")]


def step_flops(folder: Path, preset: str, tokens: int) -> int:
    """Floating-point operations of one training step of a block of LLaMA-2-7B's sizes, counted without computing it."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "num_hidden_layers": 1,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    family, dims = resolve(config, where="")
    with torch.device("meta"):
        source: Any = SimpleNamespace(folder=folder, entries={}, config=config)
        decoder = open_decoder(source, family, dims, torch.device("meta"), torch.float32)
        recipe = resolve_recipe({"model": str(folder), "preset": preset, "tier": "merged", "seq_len": tokens})
        position = (torch.empty(1, tokens, 128), torch.empty(1, tokens, 128))
        job = BlockJob(
            decoder=decoder,
            index=0,
            sites={site.name: site for site in resolve_sites(family, dims)},
            recipe=recipe,
            scheme=recipe.parsed_scheme,
            kwargs={"position_embeddings": position, "attention_mask": None},
            store=torch.bfloat16,
        )
        tensors = {name: torch.empty(tensor.shape) for name, tensor in decoder.block(0).state_dict().items()}
        objective = BlockObjective(job, tensors, unlearned(job))
        objective.progress(1.0)
        x = torch.empty(1, tokens, dims.hidden)
        solve = torch.ops.aten._linalg_solve_ex.default
        with FlopCounterMode(display=False, custom_mapping={solve: solve_flops}) as counter:
            torch.stack(list(objective.loss((x, x)).values())).sum().backward()
    return counter.get_total_flops()


def solve_flops(matrix: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """A factorisation, and two triangular systems for each right side."""
    *batch, n, _ = matrix
    return math.prod(batch) * (2 * n**3 // 3 + 2 * n**2 * right[-1])


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_transforms_cost_a_fraction_of_dense_inversions(tmp_path: Path, preset: str) -> None:
    """What a step costs whatever its tokens, against four inversions of 4096 x 4096 and their backward passes, which is
    what a step of the published code has."""
    tokens = (512, 1024, 2048)
    *_, constant = numpy.polyfit(tokens, [step_flops(tmp_path, preset, count) for count in tokens], 2)
    assert 1e10 < constant < 4 * 6 * 4096**3 / 50
