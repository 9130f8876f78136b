"""GrokAlign: identities of Jacobians that hold exactly, its experiments in seconds, and trainings that resume."""

import dataclasses
import gzip
import importlib.util
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from affinequant_research.experiment import Experiment, Found, Trial
from affinequant_research.grokalign import METHOD, training
from affinequant_research.grokalign.blocks import MEASURED, correlations
from affinequant_research.grokalign.data import digits
from affinequant_research.grokalign.drawing import over
from affinequant_research.grokalign.jacobian import (
    centroid_alignment,
    frobenius,
    jacobian_norms,
    jacobians,
    leading_share,
    row_alignment,
    spectrum,
)
from affinequant_research.grokalign.modular import fourier_gini
from affinequant_research.grokalign.robust import attacked
from affinequant_research.grokalign.training import (
    Aligned,
    Grokfast,
    Penalty,
    geometry_probes,
    squared_error,
)
from affinequant_research.grokalign.xor import boundaries
from affinequant_research.rounded import rounded
from affinequant_research.running import run_experiment
from affinequant_research.series import one_of
from affinequant_research.summary import summary
from torch import Tensor, nn

from affinequant.errors import AffineQuantError
from affinequant.fit import Group

EXPERIMENTS = {one.name: one for one in METHOD.experiments}


def net(*widths: int, bias: bool = False, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(a, b, bias=bias, dtype=torch.float64) for a, b in itertools.pairwise(widths)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def points(n: int, width: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_euler_relation_and_what_follows_from_it() -> None:
    network, x = net(6, 16, 16, 4), points(9, 6)
    jacobian, outputs = jacobians(network, x), network(x).detach()
    assert jacobian.shape == (9, 4, 6)
    torch.testing.assert_close(torch.einsum("ncd,nd->nc", jacobian, x), outputs)
    product = row_alignment(jacobian, x) * frobenius(jacobian) * x.norm(dim=1)
    torch.testing.assert_close(product, outputs.norm(dim=1))
    along = centroid_alignment(jacobian, x) * jacobian.sum(1).norm(dim=1) * x.norm(dim=1)
    torch.testing.assert_close(along, outputs.sum(1))
    with_bias = net(6, 16, 4, bias=True)
    assert not torch.allclose(torch.einsum("ncd,nd->nc", jacobians(with_bias, x), x), with_bias(x))


def test_alignment_and_rank_of_jacobians_made_by_hand() -> None:
    x = points(3, 5)
    aligned = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[None, :, None] * x[:, None]
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(row_alignment(aligned, x), ones)
    torch.testing.assert_close(leading_share(aligned), ones)
    torch.testing.assert_close(centroid_alignment(aligned, x), -ones)  # the rows' factors sum to -0.5
    equal = torch.eye(4, 5, dtype=torch.float64)[None]
    torch.testing.assert_close(leading_share(equal), ones[:1] / 4)
    torch.testing.assert_close(frobenius(equal), 2 * ones[:1])


@pytest.mark.parametrize(("rank", "bias"), [(1, 0.818), (2, 0.909), (10, 1.0)])
def test_the_published_estimate_is_too_small_by_what_is_known(rank: int, bias: float) -> None:
    """E of the root of C |v^T J|^2 over |J|; with equal singular values it is Gamma((r+1)/2) Gamma(C/2) sqrt(C/r) /
    (Gamma(r/2) Gamma((C+1)/2))."""
    torch.manual_seed(rank)
    many = 40_000
    inputs = torch.zeros(many, 10, dtype=torch.float64, requires_grad=True)
    outputs = inputs * (torch.arange(10) < rank)
    norm = math.sqrt(rank)
    exact = math.exp(math.lgamma((rank + 1) / 2) + math.lgamma(5) - math.lgamma(rank / 2) - math.lgamma(5.5))
    assert exact * math.sqrt(10 / rank) == pytest.approx(bias, abs=6e-4)
    found = jacobian_norms(outputs, inputs).detach() / norm
    assert float(found.mean()) == pytest.approx(bias, abs=5 * float(found.std()) / math.sqrt(many) + 6e-4)
    squared = jacobian_norms(outputs, inputs, "squared").detach() / rank
    assert float(squared.mean()) == pytest.approx(1, abs=5 * float(squared.std()) / math.sqrt(many) + 1e-12)
    torch.testing.assert_close(jacobian_norms(outputs, inputs, "exact").detach(), torch.full((many,), norm).double())


def test_all_estimates_agree_on_a_network() -> None:
    torch.manual_seed(0)
    network, x, many = net(6, 16, 4), points(5, 6), 4000
    exact = torch.func.vmap(torch.func.jacrev(lambda sample: network(sample[None])[0]))(x)
    torch.testing.assert_close(jacobians(network, x), exact.detach())
    truth = frobenius(jacobians(network, x))
    inputs = x.repeat(many, 1).requires_grad_()
    outputs = network(inputs)
    torch.testing.assert_close(jacobian_norms(outputs, inputs, "exact")[:5].detach(), truth)
    squared = jacobian_norms(outputs, inputs, "squared").detach().reshape(many, 5).mean(0)
    torch.testing.assert_close(squared.sqrt(), truth, rtol=0.05, atol=0)
    roots = jacobian_norms(outputs, inputs, count=16).detach().reshape(many, 5).mean(0)
    torch.testing.assert_close(roots, truth, rtol=0.05, atol=0)
    assert (roots < truth).all()  # the mean of 16 under the root is nearly without the bias of one
    with pytest.raises(AffineQuantError, match="did you mean 'exact'"):
        jacobian_norms(outputs, inputs, "exakt")  # type: ignore[arg-type]


def test_the_spectrum_of_a_jacobian_that_is_not_written_down() -> None:
    torch.manual_seed(0)
    network, x = net(6, 16, 4), points(5, 6)
    values = torch.linalg.svdvals(torch.block_diag(*jacobians(network, x)))  # of all samples as one input
    squared, largest = spectrum(network, x, draws=1000, rounds=400)
    assert float(squared) == pytest.approx(float(values.square().sum()), rel=0.1)
    assert float(largest) == pytest.approx(float(values[0].square()), rel=1e-3)


@pytest.mark.parametrize("estimator", ["projected", "squared", "exact"])
def test_the_penalty_has_the_gradient_of_finite_differences(estimator: str) -> None:
    network, x = net(5, 12, 12, 3), points(7, 5)

    def penalty() -> Tensor:
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        return jacobian_norms(network(inputs), inputs, estimator).mean()  # type: ignore[arg-type]

    parameters = list(network.parameters())
    gradients = torch.autograd.grad(penalty(), parameters)
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, direction in zip(parameters, along, strict=True):
                p.add_(direction, alpha=sign * step)
        values.append(float(penalty().detach()))
        with torch.no_grad():
            for p, direction in zip(parameters, along, strict=True):
                p.sub_(direction, alpha=sign * step)
    expected = (values[0] - values[1]) / (2 * step)
    inner = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
    assert inner == pytest.approx(expected, rel=1e-6)


def test_grokfast_filters_gradients_as_published() -> None:
    network, x = net(3, 4, 2), points(5, 3)
    parameters = list(network.parameters())
    objective = Aligned(
        network=network,
        group=Group(name="network", parameters=parameters, lr=0.01),
        grokfast=Grokfast(parameters=parameters, decay=0.8, gain=0.5),
    )
    labels, means = torch.tensor([0, 1, 0, 1, 1]), list[Tensor]()
    for _ in range(3):
        plain = torch.autograd.grad(squared_error(network(x), labels), parameters)
        means = [0.8 * mean + 0.2 * g for mean, g in zip(means or plain, plain, strict=True)]
        expected = [g + 0.5 * mean for g, mean in zip(plain, means, strict=True)]
        for names, terms in objective.loss((x, labels)):
            assert list(names) == ["network"] and list(terms) == ["task"]
            terms["task"].backward(inputs=parameters)
        for parameter, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, value)
            parameter.grad = None
        with torch.no_grad():
            parameters[0].mul_(0.9)


def test_a_level_holds_the_norm_from_both_sides() -> None:
    inputs = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    outputs = 2 * inputs  # |J| = 2 * 2
    for level, value in ((None, 0.4), (5.0, 0.1), (1.0, 0.3)):
        penalty = Penalty(weight=0.1, level=level, estimator="exact")
        assert float(penalty(outputs, inputs).detach()) == pytest.approx(value)


def test_probes_of_one_moment_share_their_jacobians(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(training, "jacobians", lambda network, x: asked.append(1) or jacobians(network, x))
    network, x = net(3, 4, 2), points(5, 3)
    probes = geometry_probes(network, x)
    before = {name: probe() for name, probe in probes.items()}
    with torch.no_grad():
        next(iter(network.parameters())).mul_(2)
    after = {name: probe() for name, probe in probes.items()}
    assert len(asked) == 2 and after["jac_fro"] == pytest.approx(2 * before["jac_fro"])


def test_rounding_is_the_quantisers() -> None:
    network, x = net(6, 8, 3), points(40, 6)
    errors = [float((rounded(network, bits)(x) - network(x)).detach().norm()) for bits in (8, 4, 3, 2)]
    assert errors == sorted(errors) and errors[0] > 0
    first = next(iter(network.parameters())).detach()
    with torch.no_grad():
        first[0] = torch.tensor([0.0, 1, 2, 3, 3, 1])  # lies on a grid of two bits
        kept = rounded(network, 2)(x)
        first[0] = torch.tensor([0.0, 1.1, 2, 3, 3, 0.9])  # and this is next to it
    torch.testing.assert_close(rounded(network, 2)(x), kept)


def test_mnist_is_read_from_a_folder(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("t10k", 2)):
        pixels = bytes(range(count)) * 784
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes((2051).to_bytes(4, "big") + bytes(12) + pixels)
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress((2049).to_bytes(4, "big") + bytes(4) + bytes(range(count)))
        )
    (x, y), (x_test, y_test) = digits(str(tmp_path), 2, 9, 0, torch.float64)
    assert x.shape == (2, 784) and y.tolist() == [0, 1] and x_test.shape == (2, 784) and y_test.tolist() == [0, 1]
    assert float(x[0, 1]) == pytest.approx((1 / 255 - 0.1307) / 0.3081)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"<html>")
    with pytest.raises(AffineQuantError, match="no such file of MNIST"):
        digits(str(tmp_path), 2, 2, 0, torch.float64)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(AffineQuantError, match="t10k-images-idx3-ubyte is not in") as caught:
        digits(str(tmp_path), 2, 2, 0, torch.float64)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("experiment", "changed", "says"),
    [
        (EXPERIMENTS["digits"], {"arms": ("dekay",)}, "did you mean 'decay'"),
        (EXPERIMENTS["digits"], {"dtype": "float16"}, "unknown dtype"),
        (EXPERIMENTS["digits"], {"train": 1797}, "leave some to test on"),
        (EXPERIMENTS["digits"], {"estimator": "exakt"}, "did you mean 'exact'"),
        (EXPERIMENTS["blocks"], {"scheme": "w4a4kv4"}, "leave kv out"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    experiment: Experiment, changed: dict[str, Any], says: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(experiment.presets["smoke"], **changed)
    with pytest.raises(AffineQuantError) as caught:
        run_experiment("grokalign", experiment, config, (0,), "smoke", tmp_path)
    assert says in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["digits", "inhibit"])
def test_the_authors_settings_ask_for_their_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = EXPERIMENTS[name]
    with pytest.raises(AffineQuantError, match="is not in MNIST"):
        run_experiment("grokalign", one, one.presets["paper"], (0,), "paper", tmp_path)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AffineQuantError, match=r"pip install '\.\[research\]'") as caught:
        digits("", 2, 2, 0, torch.float32)
    assert caught.value.exit_code == 3


def test_the_picture_shows_where_the_slope_changes_and_by_how_much() -> None:
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():  # units that turn at s1 = 0.51, at s2 = -1.51 and at s1 = 1.01; the last one changes nothing
        network[0].weight.copy_(torch.tensor([[2.0, 0.0, -1.02], [0.0, 2.0, 3.02], [1.0, 0.0, -1.01]]))
        network[2].weight.copy_(torch.tensor([[-0.25, 0.75, 0.0]]))
    picture = torch.tensor(boundaries(network, torch.ones(3)))
    cells = len(picture)
    right, below = int((0.51 + 2) / 4 * cells), int((1.51 + 2) / 4 * cells)
    expected = torch.zeros(cells, cells)
    expected[:, right] += 0.25
    expected[below] += 0.75
    torch.testing.assert_close(picture, expected, atol=6e-4, rtol=0)


def test_correlations_are_of_ranks() -> None:
    columns = {name: [1.0, 2.0, 4.0, 3.0] for name in MEASURED} | {
        "kl": [0.1, 0.2, 9.0, 0.3],
        "jac_pc1": [4.0, 3.0, 1.0, 2.0],
    }
    found = correlations(columns)
    assert found["spearman(jac_fro)"].value == pytest.approx(1) and found["spearman(jac_pc1)"].value == pytest.approx(
        -1
    )
    assert 0 <= found["p(jac_fro)"].value < 0.01 and "spearman(kl)" not in found


def test_an_attack_stays_in_reach_and_finds_errors() -> None:
    torch.manual_seed(0)
    network, x = net(4, 8, 2), points(60, 4)
    labels = network(x).argmax(-1)
    shifted, _ = attacked(network, (x, labels), 0.5)
    assert float((shifted - x).abs().max()) <= 0.5 + 1e-12
    by_chance = x + 0.5 * torch.randn_like(x).sign()
    assert training.accuracy(network, (shifted, labels)) < training.accuracy(network, (by_chance, labels)) < 1


def test_few_frequencies_are_told_from_many() -> None:
    at = torch.arange(31)
    one, all_alike = torch.cos(2 * math.pi * 3 / 31 * at)[:, None], torch.eye(31)
    assert fourier_gini(one) == pytest.approx(1 - 1 / 15, abs=1e-5)  # of 15 frequencies one
    assert fourier_gini(all_alike) == pytest.approx(0, abs=1e-5)


def _plain(results: list[dict[str, Any]]) -> list[Any]:
    """All but what a clock says."""
    clocks = ("seconds", "ms_per_update")
    return [
        ({name: one for name, one in result["metrics"].items() if not name.endswith(clocks)}, result["series"])
        for result in results
    ]


@pytest.mark.parametrize("experiment", METHOD.experiments, ids=lambda one: one.name)
def test_smoke(experiment: Experiment, tmp_path: Path) -> None:
    """Each experiment runs, draws itself, and gives the same again where it was cut short."""
    config = experiment.presets["smoke"]
    results = run_experiment("grokalign", experiment, config, (0,), "smoke", tmp_path / "whole")
    report = summary(METHOD, "smoke", [(experiment, config, results)])
    assert report["passed"] and report["figures"]
    assert {row[0] for row in report["tables"][0]["rows"]} >= set(getattr(config, "arms", ()))
    if experiment.build is None:
        return
    seen = 0

    def dies(config: Any, seed: int, arm: str) -> Trial:
        trial = experiment.build(config, seed, arm)  # type: ignore[misc]

        def batches(epoch: int) -> Any:
            nonlocal seen
            seen += 1
            if arm == config.arms[-1] and epoch == 3 and seen < 100:
                seen = 100
                raise KeyboardInterrupt
            return trial.phase.batches(epoch)

        config_of_fit = dataclasses.replace(trial.phase.config, pause_after=1)
        return dataclasses.replace(trial, phase=trial.phase._replace(batches=batches, config=config_of_fit))

    cut = dataclasses.replace(experiment, build=dies)
    with pytest.raises(KeyboardInterrupt):
        run_experiment("grokalign", cut, config, (0,), "smoke", tmp_path / "cut")
    again = run_experiment("grokalign", cut, config, (0,), "smoke", tmp_path / "cut")
    assert _plain(again) == _plain(results)
    kept = [(tmp_path / one / f"seed-0/stages/{config.arms[-1]}/tensors.safetensors") for one in ("whole", "cut")]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_seeds_are_one_line_with_a_band() -> None:
    """Two seeds of which one ends sooner, and stays where it ended."""
    series = [
        {"decay/test_acc": ([0, 10, 20], [0.1, 0.5, 0.9])},
        {"decay/test_acc": ([0, 10, 20, 30], [0.2, 0.3, 0.4, 0.8])},
    ]
    scores = [{"decay/ms_per_update": one_of(value)} for value in (100.0, 300.0)]
    found = Found(config=SimpleNamespace(arms=("decay",)), seeds=(0, 1), scores=tuple(scores), series=tuple(series))
    [line] = over(found, "digits", "test_acc", "", seconds=True).series
    assert line.x == pytest.approx((2, 4, 6)) and line.y == pytest.approx((0.4, 0.65, 0.85))
    assert line.low == (0.3, 0.4, 0.8) and line.high == (0.5, 0.9, 0.9)
    alone = dataclasses.replace(found, seeds=(0,), scores=found.scores[:1], series=found.series[:1])
    [line] = over(alone, "digits", "test_acc", "").series
    assert line.x == (10, 20) and line.y == (0.5, 0.9) and not line.low
