"""Addition modulo p by a transformer of one layer, the Jacobian taken with respect to the embeddings.

A sequence is `a b =`; what is asked for is (a + b) mod p in the logits of its last token. One layer of attention and MLP,
without normalisation, as the paper's; a plain softmax, since fused attention has no second derivative. The loss is taken in
float64: in float32 the gradient of what has been memorised is lost in rounding (arXiv 2501.04697).
"""

import dataclasses
from dataclasses import dataclass

import torch
from affinequant_evals import Metric, Suite
from jaxtyping import Float, Int
from torch import Tensor, nn

from affinequant.fit import FitConfig, Group
from affinequant.learning.phases import Phase
from affinequant.report.figure import Figure
from affinequant_research.experiment import Claim, Experiment, Found, Trial, arms
from affinequant_research.grokalign.drawing import over
from affinequant_research.grokalign.training import (
    Aligned,
    Batch,
    Penalty,
    accuracy,
    delays,
    geometry,
    hits,
    measured,
)
from affinequant_research.series import one_of

TOKENS = 3
PROBED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Modular:
    """Settings; every update takes the whole training half.

    Attributes:
        share: of all p^2 sums, how many are trained on.
        reach: test accuracy at which training ends.
    """

    arms: tuple[str, ...] = ("decay", "grokalign")
    p: int = 59
    share: float = 0.5
    width: int = 64
    heads: int = 4
    mlp: int = 256
    jacobian: float = 1e-4
    rate: float = 1e-3
    decay: float = 1.0
    updates: int = 3000
    probe_every: int = 50
    reach: float = 0.95
    device: str = "cpu"


class Adder(nn.Module):
    """Embeddings [n, 3, width] -> logits of the last token [n, p]; `embed` makes them of tokens."""

    def __init__(self, config: Modular) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.tokens = nn.Parameter(torch.randn(config.p + 1, width) / width**0.5)
        self.places = nn.Parameter(torch.randn(TOKENS, width) / width**0.5)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, config.mlp)
        self.down = nn.Linear(config.mlp, width)
        self.head = nn.Linear(width, config.p, bias=False)

    def embed(self, tokens: Int[Tensor, "n 3"]) -> Float[Tensor, "n 3 width"]:
        """What the Jacobian is taken with respect to."""
        return nn.functional.embedding(tokens, self.tokens) + self.places

    def forward(self, x: Float[Tensor, "n 3 width"]) -> Float[Tensor, "n p"]:
        """The last token alone asks: attention is over all three."""
        query = self.query(x[:, -1:]).unflatten(-1, (self.heads, -1))
        key, value = self.key_value(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        scores = (query * key).sum(-1, keepdim=True) / key.shape[-1] ** 0.5  # matrices of 1 x 3 are slower multiplied
        mixed = (scores.softmax(1) * value).sum(1).flatten(1)
        last = x[:, -1] + self.out(mixed)
        return self.head(last + self.down(torch.relu(self.up(last))))


def sums(config: Modular, seed: int) -> tuple[Batch, Batch]:
    """(train, test): all pairs, split at random by the seed."""
    pairs = torch.cartesian_prod(torch.arange(config.p), torch.arange(config.p))
    tokens = torch.cat([pairs, torch.full((len(pairs), 1), config.p)], 1).to(config.device)
    labels = pairs.sum(1).remainder(config.p).to(config.device)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    count = round(config.share * len(pairs))
    return tuple((tokens[part], labels[part]) for part in (order[:count], order[count:]))  # type: ignore[return-value]


@torch.no_grad()
def fourier_gini(rows: Float[Tensor, "p width"]) -> float:
    """How few frequencies modulo p the rows use: Gini's coefficient of the norms of their Fourier components, 0 where all
    are alike, nearly 1 where there is one."""
    norms = torch.fft.rfft(rows.cpu(), dim=0)[1:].abs().square().sum(1).sqrt().sort().values
    ranks = torch.arange(1, len(norms) + 1)
    return float(((2 * ranks - len(norms) - 1) * norms).sum() / (len(norms) * norms.sum()))


def build(config: Modular, seed: int, arm: str) -> Trial:
    """The training of one arm, from the same weights and sums as the others of its seed."""
    network = Adder(config).to(config.device)
    train, test = sums(config, seed)
    group = Group(
        name="network",
        parameters=list(network.parameters()),
        lr=config.rate,
        weight_decay=config.decay,
        options={"betas": (0.9, 0.98)},
    )
    objective = Aligned(
        network=network,
        group=group,
        task=lambda outputs, labels: nn.functional.cross_entropy(outputs.double(), labels),
        penalty=Penalty(weight=config.jacobian * (arm == "grokalign")),
        enter=network.embed,
    )
    fit = FitConfig(
        epochs=config.updates,
        steps_per_epoch=1,
        probe_every=config.probe_every,
        stop_when=("test_acc", ">", config.reach),
        pause_after=20 * config.probe_every,
        double_backward=True,
    )

    def tell(tokens: Tensor) -> Tensor:
        return network(network.embed(tokens))

    def norms(count: int) -> Tensor:
        return geometry(network, network.embed(test[0][:count]).detach())["jac_fro"].cpu()

    metrics = (
        measured("train_acc", "higher", lambda subject: hits(tell, train).cpu()),
        measured("test_acc", "higher", lambda subject: hits(tell, test).cpu()),
        measured("jac_fro", "lower", lambda subject: norms(256)),
        Metric(
            name="fourier_gini", better="higher", function=lambda subject: one_of(fourier_gini(subject.tokens[:-1]))
        ),
    )
    probes = {
        "train_acc": lambda: accuracy(tell, train),
        "test_acc": lambda: accuracy(tell, test),
        "jac_fro": lambda: float(norms(PROBED).mean()),
    }
    return Trial(
        phase=Phase(objective, lambda epoch: [train], fit, probes),
        subject=network,
        suite=Suite(name="modular", metrics=metrics),
        outcome=lambda fitted, series: delays(
            fitted, series, config.reach + 1e-9
        ),  # `stop_when` asks for more than that
        tensors=lambda: {name: tensor.cpu() for name, tensor in network.state_dict().items()},
    )


def figures(found: Found) -> list[Figure]:
    """Accuracy and Jacobians over updates."""
    ends = f"A line ends where its training has reached {found.config.reach:g}, or with its budget."
    return [
        over(found, "modular", "test_acc", ends),
        over(
            found, "modular", "test_acc", "The same trainings: an update with the penalty takes longer.", seconds=True
        ),
        over(found, "modular", "jac_fro", "Of the last token's logits, with respect to the three embeddings."),
    ]


BENCH = Modular()
MEASURED = "measured: seed 0"
EXPERIMENT = Experiment(
    name="modular",
    about="updates until a transformer adds numbers modulo p that it has not seen",
    source="arXiv 2506.12284",
    presets={
        "smoke": dataclasses.replace(BENCH, p=7, width=16, heads=2, mlp=16, updates=6, probe_every=2),
        "ci": dataclasses.replace(BENCH, updates=300),
        "bench": BENCH,
        "paper": dataclasses.replace(
            BENCH, p=113, share=0.3, width=128, mlp=512, jacobian=1e-3, updates=48_000, probe_every=100, device="cuda"
        ),
    },
    stages=lambda config: arms(config.arms, BENCH.arms),
    build=build,
    claims={
        "ci": (
            Claim(metric="decay/train_acc", op=">=", than=0.95, source=MEASURED),
            Claim(metric="grokalign/jac_fro", op="<=", than="decay/jac_fro", factor=0.9, source=MEASURED),
        ),
        "bench": (
            Claim(metric="decay/test_acc", op=">=", than=BENCH.reach, source=MEASURED),
            Claim(metric="decay/updates", op=">=", than="decay/updates_to_train", factor=2, source=MEASURED),
            Claim(metric="grokalign/updates", op="<=", than="decay/updates", source="arXiv 2506.12284, in kind"),
        ),
    },
    figures=figures,
)
