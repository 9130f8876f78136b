"""Charts of rotations where the quantiser learns one: the residual stream's and the values', by each chart in turn.

Continuity is about maps onto all rotations, which a network has to learn. A quantiser looks for one rotation from a good
start, near which every chart is smooth, so nothing is to be had from topology. What may differ is how well the loss is
conditioned in the parameters and what a step costs. The quantiser's own stage is what runs here: its objective, its
rates, which turn features by the same angle at first in every chart, and its judge on held-out text.

QR as DartQuant has it (arXiv 2511.04063) is the chart `gram-schmidt`: columns differ in sign alone, which no symmetric
range sees. Its 1.4 times a step is said against Cayley *steps*, an optimizer of its own; `orthogonal` is the Cayley *map*.
"""

import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from affinequant_evals import Score, Suite
from affinequant_evals.harness import Battery
from safetensors.torch import load_file, save_file
from torch import Tensor

from affinequant.data.tokenizer import load_tokenizer
from affinequant.data.tokens import Tokens, calibration_tokens
from affinequant.fit import FitConfig, FitReport
from affinequant.learning.divergence import mean_loss
from affinequant.learning.phases import Phase
from affinequant.learning.rotation import Rotations, problem
from affinequant.learning.work import Work
from affinequant.models.decoder import open_decoder
from affinequant.models.source import locate
from affinequant.plan import plan
from affinequant.progress import Silent
from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant.run.run import Run
from affinequant.transforms import LEARNED_ROTATIONS, build
from affinequant_research.experiment import Claim, Experiment, Found, Series, Trial, arms
from affinequant_research.rotations.angles import Scores
from affinequant_research.rotations.learner import seeded
from affinequant_research.series import one_of, value_at

VOCAB = 256
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`model`: a folder or a name as `affinequant quantize` takes it, cut to so many layers; empty for one that is made up,
    of that width. `every`: updates between two looks at held-out text. `seconds`: of one core, at which charts are
    compared. `widths`: at which the maps alone are timed."""

    charts: tuple[str, ...] = LEARNED_ROTATIONS
    model: str = ""
    layers: int = 2
    width: int = 64
    scheme: str = "w4a4"
    updates: int = 60
    every: int = 10
    angle: float = 0.05
    tokens: int = 64
    pieces: int = 40
    seconds: float = 1.0
    widths: tuple[int, ...] = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What one chart is to learn."""

    objective: Rotations
    embedded: Tensor
    full: Tensor
    held: int
    name: str


def new_problem(config: Settings, seed: int, chart: str) -> Problem:
    """The quantiser's stage of learned rotations, prepared on the model that the settings name."""
    folder = Path(tempfile.mkdtemp(prefix="charts-"))
    model = folder / "model"
    if config.model:
        cut(locate(config.model), model, config.layers)
    else:
        make_up(model, config, seed)
    sizes = {"samples": config.pieces, "seq_len": config.tokens, "rotation_len": config.tokens}
    how = {"rotation_steps": config.updates, "rotation_lr": config.angle, "scheme": config.scheme, "seed": seed}
    sites = {"residual": chart, "vo": chart, "mlp_mid": "hadamard"}
    made = plan(str(model), out=str(folder / "out"), preset="rtn", tier="online", transforms=sites, **sizes, **how)
    tokens = _tokens(made.source.folder, config, seed)
    decoder = open_decoder(made.source, made.family, made.dims, torch.device("cpu"), torch.float32)
    work = Work(made=made, run=Run.open(folder / "run", {}), tokens=tokens, decoder=decoder, listen=Silent())
    objective, embedded, full, held = problem(work)
    given = Problem(objective=objective, embedded=embedded, full=full, held=held, name=chart)
    weakref.finalize(given, shutil.rmtree, folder, ignore_errors=True)  # weights are read from it in every step
    return given


def _tokens(folder: Path, config: Settings, seed: int) -> Tokens:
    if config.model:
        tokenizer = load_tokenizer(folder)
        return calibration_tokens("demo", tokenizer, samples=config.pieces, seq_len=config.tokens, seed=seed)
    ids = torch.randint(VOCAB, (config.pieces, config.tokens), generator=seeded(seed, 0))
    return Tokens(ids=ids, source="random", sha256="", bos=False, available=ids.numel())


def cut(source: Path, folder: Path, layers: int) -> None:
    """The first layers of a model with a single file of weights."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(source / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in state.items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def make_up(folder: Path, config: Settings, seed: int) -> None:
    """A Llama of random weights. Every embedding holds one large vector of normal entries, which no fixed rotation spreads
    evenly over the features, so that there is something to learn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    heads = config.width // 16
    model = LlamaForCausalLM(
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=VOCAB,
            hidden_size=config.width,
            intermediate_size=2 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            max_position_embeddings=max(512, config.tokens),
            tie_word_embeddings=False,
        )
    )
    generator = seeded(seed, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        embedding = dict(model.named_parameters())["model.embed_tokens.weight"]
        embedding.add_(torch.randn(config.width, generator=generator), alpha=2.0)
    model.config.save_pretrained(folder)
    save_file(model.bfloat16().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def build_trial(config: Settings, seed: int, chart: str) -> Trial:
    """The trial of one chart."""
    given = new_problem(config, seed, chart)
    train = len(given.full) - given.held

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randint(train, (config.every,), generator=seeded(seed, epoch)):
            yield given.embedded[index][None], given.full[index][None]

    def held_out() -> float:
        return mean_loss(given.objective.loss, given.embedded[train:], given.full[train:])

    def outcome(fitted: FitReport, series: Mapping[str, Series]) -> dict[str, Score]:
        seen, step = series["held-out"], _step(given)
        within = value_at(seen, config.seconds / step)
        return {
            "start": value_at(seen, 0),
            "equal updates": one_of(min(seen[1])),
            "equal seconds": within,
            "step": Score(value=step, stderr=None, n=REPEATS),
        }

    sequence = FitConfig(
        epochs=config.updates // config.every,
        steps_per_epoch=config.every,
        schedule="cosine",
        probe_every=1,
        judge="held-out",
    )
    costs = Battery(name="maps", function=lambda one: _maps(one, config.widths))
    phase = Phase(given.objective, batches, sequence, {"held-out": held_out})
    return Trial(phase=phase, subject=given, suite=Suite(name="charts", metrics=(costs,)), outcome=outcome)


def _step(given: Problem) -> float:
    batch = given.embedded[:1], given.full[:1]
    return _cpu_seconds(lambda: given.objective.loss(batch).backward())


def _maps(given: Problem, widths: tuple[int, ...]) -> Scores:
    """What a chart's map costs, there and back, at several widths."""
    site = given.objective.blocks[0].job.sites["residual"]
    found = {}
    for width in widths:
        module: Any = build(given.name, replace(site, width=width), seed=0, alpha=0.0)
        seconds = _cpu_seconds(lambda module=module: module.blocks().square().sum().backward())
        found[f"map@n{width}"] = "lower", Score(value=seconds, stderr=None, n=REPEATS)
    return found


def _cpu_seconds(call: Callable[[], object]) -> float:
    """Of all threads, the least of some: other work on the machine shows least in it."""
    seen = []
    for _ in range(REPEATS):
        began = time.process_time()
        call()
        seen.append(time.process_time() - began)
    return min(seen)


def drawn(found: Found) -> tuple[Figure, ...]:
    """Held-out divergence over updates and over seconds of one core."""
    charts = [name for name in found.config.charts if f"{name}/held-out" in found.series[0]]
    made = []
    for axis, unit in (("updates", ""), ("time on one core", "s")):
        lines = []
        for name in charts:
            x, y = found.series[0][f"{name}/held-out"]
            scale = found.values(f"{name}/step")[0] if unit else 1.0
            lines.append(Line(name=name, x=tuple(scale * at for at in x), y=tuple(y)))
        made.append(
            Figure(
                kind="line",
                title=f"charts: learned rotations, over {axis}",
                series=tuple(lines),
                x=Axis(label=axis, unit=unit),
                y=Axis(label="divergence on held-out text", unit="nats per token"),
                caption=f"Seed {found.seeds[0]}. Lower is better; every chart starts from the same rotation.",
            )
        )
    return tuple(made) if charts else ()


MADE_UP = Settings()
EXPERIMENT = Experiment(
    name="charts",
    about="charts of the quantiser's learned rotation; divergence in nats per token, costs in CPU seconds",
    source="arXiv 1812.07035, 2405.16406 and 2511.04063",
    presets={
        "smoke": replace(MADE_UP, charts=("polar",), updates=2, every=1, tokens=16, pieces=8, widths=(16,)),
        "ci": MADE_UP,
        # SmolLM2's first two blocks; 15 pieces of 120 judge.
        "bench": replace(MADE_UP, model="demo", every=15, pieces=120, seconds=20.0, widths=(64, 576, 1024)),
    },
    stages=lambda config: arms(config.charts),
    build=build_trial,
    claims={
        preset: tuple(
            Claim(metric=f"{chart}/equal updates", op="<=", than=f"{chart}/start", factor=0.95, source=source)
            for chart in LEARNED_ROTATIONS
        )
        for preset, source in (("ci", "derived: there is something to learn"),)
    },
    figures=drawn,
)
