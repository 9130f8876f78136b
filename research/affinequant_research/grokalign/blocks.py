"""Does the Jacobian of a language model's block tell how much the model suffers when that block is quantised?

For noise e of covariance s^2 I before a block, E |f(x + e) - f(x)|^2 = s^2 |J|^2 to first order: a block of large norm
should be sensitive. Against that stand that quantisation noise is no such noise, that weights are rounded too, and that
what follows decides what an error costs. So it is measured: each block alone rounded to nearest on the quantiser's own
grids, weights per output channel and activations per token, and the rank correlation over blocks with the divergence of
the model's predictions. Alignment has no meaning for a block with a residual stream and is not asked for.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from affinequant_evals import Score
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from affinequant.data.demo import demo_model
from affinequant.data.tokenizer import load_tokenizer
from affinequant.data.tokens import calibration_tokens
from affinequant.data.wheels import Say
from affinequant.errors import AffineQuantError
from affinequant.models import resolve
from affinequant.models.decoder import Decoder, open_decoder, run_block
from affinequant.models.source import Source, open_source, settle
from affinequant.numbers import grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.numbers.weights import fake_quantize, weight_range
from affinequant.progress import Steps
from affinequant.recipe.scheme import Scheme
from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant.stages import Carry, Stage
from affinequant_research.experiment import Experiment, Found
from affinequant_research.grokalign.jacobian import spectrum
from affinequant_research.running import Work, commit

MEASURED = {
    "kl": "KL of the model when this block is quantised",
    "jac_fro": "norm of the block's Jacobian",
    "branch_fro": "norm without the residual stream",
    "jac_pc1": "share of the leading direction",
    "branch_pc1": "share without the residual stream",
    "block_error": "error behind the block",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Settings.

    Attributes:
        model: `tiny`, made up of random weights; `demo`; or a model folder.
        data: what the tokens are from (not of `tiny`, whose are random).
        draws, rounds: cotangents for a norm, and power iterations for the leading singular value.
    """

    model: str = "demo"
    data: str = "demo"
    samples: int = 2
    tokens: int = 64
    scheme: str = "w4a4"
    draws: int = 4
    rounds: int = 6


def blocks_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """Measure every block, correlate, commit."""
    began, config = time.perf_counter(), work.config
    if Scheme.parse(config.scheme).kv is not None:
        raise AffineQuantError("only weights and activations are rounded here", "--set scheme", "leave kv out")
    torch.manual_seed(work.seed)
    with _opened(config, work.seed, work.say) as (source, decoder, ids):
        network = Network(source, decoder, ids)
        told = Steps(work.say, f"blocks, seed {work.seed}", len(network.blocks))
        rows = []
        for index in range(len(network.blocks)):
            rows.append(_measured(network, index, config))
            told()
    columns = {name: [row[name] for row in rows] for name in MEASURED}
    series = {name: (list(range(len(rows))), values) for name, values in columns.items()}
    commit(work, stage, began, correlations(columns), series=series)
    return {}


def correlations(columns: Mapping[str, list[float]]) -> dict[str, Score]:
    """Spearman's rank correlation of every column with `kl` over blocks, and its two-sided p value."""
    from scipy.stats import spearmanr

    scores = {}
    for name, values in columns.items():
        if name != "kl":
            found: Any = spearmanr(values, columns["kl"])
            for what, value in (("spearman", found.statistic), ("p", found.pvalue)):
                scores[f"{what}({name})"] = Score(value=float(value), stderr=None, n=len(values))
    return scores


class Network:
    """A language model block by block: its weights, what reaches each block, and what it predicts."""

    def __init__(self, source: Source, decoder: Decoder, ids: Int[Tensor, "samples tokens"]) -> None:
        self.decoder, family = decoder, decoder.family
        inside = [f"{family.blocks}.{index}." for index in range(decoder.dims.layers)]
        outer = source.read(name for name in source.entries if not name.startswith(f"{family.blocks}."))
        self.blocks = [
            {
                name.removeprefix(prefix): tensor.to(decoder.dtype)
                for name, tensor in source.read(name for name in source.entries if name.startswith(prefix)).items()
            }
            for prefix in inside
        ]
        hidden, self.kwargs = decoder.embed(ids, outer)
        self.hidden, self.head = [hidden], decoder.head(outer)
        with torch.no_grad():
            for index in range(len(self.blocks)):
                self.hidden.append(self.run(index, self.hidden[-1]))
            self.predicted = decoder.logits(self.hidden[-1], self.head).log_softmax(-1)

    def run(self, index: int, x: Tensor, **changed: Any) -> Float[Tensor, "samples tokens hidden"]:
        """Block `index` on x; `changed`: as `run_block` takes it."""
        family, block = self.decoder.family.at(self.decoder.dims, index), self.decoder.block(index)
        return run_block(
            block, family, **{"tensors": self.blocks[index], "x": x, "kwargs": self.kwargs[index], **changed}
        )

    def divergence(self, index: int, hidden: Tensor) -> float:
        """KL(full precision || this) in nats a token, where `hidden` stands behind block `index`."""
        for later in range(index + 1, len(self.blocks)):
            hidden = self.run(later, hidden)
        other = self.decoder.logits(hidden, self.head).log_softmax(-1)
        return float((self.predicted.exp() * (self.predicted - other)).sum(-1).mean())


def _measured(network: Network, index: int, config: Blocks) -> dict[str, float]:
    x, true = network.hidden[index], network.hidden[index + 1]
    found = {}
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for name, function in (
            ("jac", lambda x: network.run(index, x)),
            ("branch", lambda x: network.run(index, x) - x),
        ):
            squared, largest = (float(one) for one in spectrum(function, x, config.draws, config.rounds))
            found |= {f"{name}_fro": squared**0.5, f"{name}_pc1": largest / squared}
    with torch.no_grad():
        rounded = quantized(network, index, x, Scheme.parse(config.scheme))
        return found | {
            "block_error": float((rounded - true).square().mean()),
            "kl": network.divergence(index, rounded),
        }


def quantized(network: Network, index: int, x: Tensor, scheme: Scheme) -> Float[Tensor, "samples tokens hidden"]:
    """Block `index` with weights and what its linears read rounded to the nearest of the scheme's grids."""
    weights, tensors = grid_of(scheme.weight), dict(network.blocks[index])
    for linear in network.decoder.family.at(network.decoder.dims, index).linears:
        weight = tensors[f"{linear.name}.weight"].float()
        tensors[f"{linear.name}.weight"] = fake_quantize(weight, *weight_range(weight, weights), weights).to(x)
    if scheme.activation is None:
        return network.run(index, x, tensors=tensors)
    tokens = grid_of(scheme.activation)
    return network.run(index, x, tensors=tensors, on_input=lambda site, x: fake_quantize_activation(x, tokens))


@contextmanager
def _opened(config: Blocks, seed: int, say: Say) -> Iterator[tuple[Source, Decoder, Tensor]]:
    with tempfile.TemporaryDirectory() as scratch:
        tiny = config.model == "tiny"
        folder = _tiny(Path(scratch)) if tiny else demo_model(say) if config.model == "demo" else Path(config.model)
        source = open_source(folder)
        family, dims = resolve(source.config, where=str(folder))
        source, dims = settle(source, family, dims)
        decoder = open_decoder(source, family, dims, torch.device("cpu"), torch.float32)
        if tiny:
            ids = torch.randint(dims.vocab, (config.samples, config.tokens))
        else:
            tokenizer = load_tokenizer(folder, dims.vocab)
            ids = calibration_tokens(
                config.data, tokenizer, samples=config.samples, seq_len=config.tokens, seed=seed, say=say
            ).ids
        yield source, decoder, ids


def _tiny(folder: Path) -> Path:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=64,
        num_hidden_layers=6,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def figures(found: Found) -> list[Figure]:
    """What was measured, block by block; of the first seed."""
    series, scores = found.series[0], found.scores[0]
    lines = []
    for name, label in MEASURED.items():
        blocks, values = series[f"blocks/{name}"]
        lines.append(Line(name=name, panel=label, x=tuple(blocks), y=tuple(one if one > 0 else None for one in values)))
    said = ", ".join(
        f"{name} {scores[f'blocks/spearman({name})'].value:+.2f} (p {scores[f'blocks/p({name})'].value:.2g})"
        for name in MEASURED
        if name != "kl"
    )
    return [
        Figure(
            kind="line",
            key="blocks",
            title=f"Jacobians of blocks and what {found.config.scheme.upper()} of each alone costs",
            series=tuple(lines),
            x=Axis(label="block"),
            y=Axis(label="value", log=True),
            caption=f"Spearman's rank correlation with the KL over {len(lines[0].y)} blocks: {said}.",
        )
    ]


BENCH = Blocks()
TINY = dataclasses.replace(BENCH, model="tiny", samples=2, tokens=16, draws=4, rounds=4)
EXPERIMENT = Experiment(
    name="blocks",
    about="rank correlation over blocks of a Jacobian's norm and rank with what quantising the block costs",
    source="this project; the norm is that of arXiv 2506.12284",
    presets={"smoke": TINY, "ci": TINY, "bench": BENCH},
    stages=lambda config: (Stage(name="blocks", does="affinequant_research.grokalign.blocks:blocks_stage"),),
    figures=figures,
)
