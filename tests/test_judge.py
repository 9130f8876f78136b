"""A block's judge: no divergence without an error, that of the whole model with one, and the best epoch stands."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import affinequant
from affinequant.fit import FitConfig, FitReport
from affinequant.learning.judge import ModelJudge
from affinequant.learning.network import block_reader
from affinequant.models.decoder import open_decoder
from affinequant.pipeline import tokens_of
from affinequant.plan import plan
from affinequant.progress import Silent
from affinequant.recipe.recipe import resolve
from affinequant.transforms import build

TEXT = " ".join(f"{i} green bottles hang on wall {i * 7 % 13}, and {i % 5} fall down" for i in range(400))
Tiny = Callable[..., Path]


@pytest.fixture
def settings(tiny: Tiny, tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return {
        "model": str(tiny(tied=True)),
        "preset": "default",
        "tier": "merged",
        "data": str(text),
        "judge": "kl",
        "samples": 16,
        "seq_len": 32,
        "epochs": 3,
        "finish": "none",
    }


@pytest.mark.parametrize("residual", ["none", "hadamard"])
def test_it_is_the_divergence_of_the_whole_model(settings: dict[str, Any], residual: str) -> None:
    made = plan(resolve(settings | {"transforms": {"residual": residual}}))
    tokens = tokens_of(made, Silent())
    decoder = open_decoder(made.source, made.family, made.dims, torch.device("cpu"), torch.float32)
    rotation = None
    if residual != "none":
        rotation = build(residual, made.sites["residual"], seed=0, alpha=0.1).double()
    outer = made.source.read(name for name in made.source.entries if ".layers." not in name)
    embedded, kwargs = decoder.embed(tokens.ids[-2:], outer)
    judge, read = ModelJudge(made, decoder, tokens, rotation, kwargs), block_reader(made, decoder)
    assert judge.held == 2

    def turned(hidden: Tensor) -> Tensor:
        return hidden if rotation is None else rotation.on_activations(hidden.double()).float()

    exact = judge.jobs[0].run_all(read(0), embedded)
    assert abs(judge(0, turned(exact))) < 1e-6
    wrong = exact + 0.3 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))

    def log_probabilities(hidden: Tensor) -> Tensor:
        return decoder.logits(judge.jobs[1].run_all(read(1), hidden), decoder.head(outer)).log_softmax(-1)

    full, got = log_probabilities(exact), log_probabilities(wrong)
    wanted = float((full.exp() * (full - got)).sum(-1).mean())
    assert wanted > 1e-3
    assert judge(0, turned(wrong)) == pytest.approx(wanted, rel=1e-4)


def test_what_trains_worse_than_nothing_is_undone(settings: dict[str, Any], tmp_path: Path) -> None:
    """At an absurd rate every epoch is worse than the start, which stands: as if nothing had been learned."""
    absurd: dict[str, Any] = {"scheme": "w4a16", "lr": 3.0, "clip_lr": 30.0}
    judged = affinequant.quantize(**settings, **absurd, out=tmp_path / "judged")
    never = affinequant.quantize(**(settings | {"epochs": 0}), **absurd, out=tmp_path / "never")
    last = affinequant.quantize(**(settings | {"judge": "none"}), **absurd, out=tmp_path / "last")
    same = [(done.path / "model.safetensors").read_bytes() for done in (judged, never, last)]
    assert same[0] == same[1] != same[2]
    for block in judged.report["blocks"]:
        assert len(block["divergence"]) == 4 and min(block["divergence"]) == block["divergence"][0]
    assert "divergence" not in last.report["blocks"][0]


def test_what_judges_is_not_trained_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[int]] = []

    def fit(objective: Any, batches: Any, config: FitConfig, probes: Any) -> FitReport:
        given = list(batches(0))
        seen.append([sum(len(batch[0]) for batch in given), len(given), config.steps_per_epoch])
        return affinequant.fit(objective, batches, config, probes)

    monkeypatch.setattr("affinequant.learning.block.fit", fit)
    done = affinequant.quantize(**settings, batch_size=4, out=tmp_path / "out")
    assert seen == [[14, 4, 4], [14, 4, 4]]
    assert 'judge = "kl"' in (done.path / "recipe.toml").read_text()
