"""Windows and perplexity, against a loop written out by hand and against lm-eval's own likelihoods."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals import evaluate, logits, perplexity
from affinequant_evals.harness import Suite
from affinequant_evals.perplexity import LanguageModel, window_losses
from affinequant_evals.reference import Live
from affinequant_evals.suites import Measurements, build_suite
from affinequant_evals.windows import cut_windows

from affinequant import progress
from affinequant.data.tokens import encode

TEXT = " ".join(random.Random(0).choices(["heron", "reed", "the", "an", "over", "bridge", "water", "in"], k=900))


@pytest.fixture(scope="module")
def subject(tiny: Callable[..., Path]) -> LanguageModel:
    """A tiny Llama in float32; its tokenizer adds no BOS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return LanguageModel(model=model, tokenizer=AutoTokenizer.from_pretrained(folder), name="tiny")


def test_scoring_says_how_far_it_is(subject: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
    lines: list[str] = []
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=48, windows=3)
    perplexity.perplexity(windows)(replace(subject, say=lines.append))
    assert [line.partition(",")[0] for line in lines] == ["windows: 1/3", "windows: 2/3"]


@torch.no_grad()
def losses_by_hand(model: Any, ids: torch.Tensor) -> list[float]:
    """Mean of -log softmax at the next token, from whole logits in float64."""
    found = []
    for window in ids:
        logs = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        found.append(
            -sum(logs[place, window[place + 1]].item() for place in range(len(window) - 1)) / (len(window) - 1)
        )
    return found


def test_losses_are_those_of_a_plain_loop(subject: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=48, windows=5)
    expected = losses_by_hand(subject.model, windows.ids)
    assert window_losses(subject.model, windows.ids).tolist() == pytest.approx(expected, rel=1e-5)
    # Seven rows of logits at a time.
    monkeypatch.setattr(logits, "BUDGET", 4 * 4 * 320 * 7)
    assert window_losses(subject.model, windows.ids).tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def perplexity_by_hand(model: Any, tokenizer: Any, text: str, seq_len: int, stride: int) -> float:
    """As one would write it down: token by token from whole logits in float64, each scored once."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total, scored, begin = 0.0, 0, 0
    while begin + seq_len <= len(ids):
        window = torch.tensor([ids[begin : begin + seq_len]])
        logs = model(input_ids=window).logits[0].double().log_softmax(-1)
        fresh = seq_len - 1 if begin == 0 or stride == seq_len else stride
        for place in range(seq_len - 1 - fresh, seq_len - 1):
            total -= logs[place, window[0, place + 1]].item()
            scored += 1
        begin += stride
    return math.exp(total / scored)


@pytest.mark.parametrize("stride", [None, 5, 16, 47])
def test_perplexity_of_a_file_is_that_of_a_plain_loop(
    subject: LanguageModel, tmp_path: Path, stride: int | None
) -> None:
    (tmp_path / "birds.txt").write_text(TEXT[:1500])
    wanted = Measurements(texts=(str(tmp_path / "birds.txt"),), seq_len=48, stride=stride)
    suite = build_suite(wanted, subject.tokenizer)
    card = evaluate(subject, suite)
    name = "perplexity@birds.txt,seq48" + (f",stride{stride}" if stride else "")
    assert [row.name for row in card.rows] == [name] and not card.failed
    score = card.score(name)
    expected = perplexity_by_hand(subject.model, subject.tokenizer, TEXT[:1500], 48, stride or 48)
    assert score and score.value == pytest.approx(expected, rel=1e-5) and score.about.get("stride") == stride


def test_the_error_of_windows_that_count_differently_many(subject: LanguageModel) -> None:
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=48, windows=9, stride=12)
    sums = perplexity.read(subject, windows)["loss"]
    score = perplexity.perplexity(windows)(subject)
    counts = torch.tensor([47.0] + 8 * [12.0], dtype=torch.float64)
    mean = sums.sum() / counts.sum()
    assert score.value == pytest.approx(mean.exp().item(), rel=1e-12) and score.n == 9
    # The error of a ratio of two sums over 9 windows, as textbooks have it, and that of its exponential.
    spread = ((sums - mean * counts) ** 2).sum() / 8
    expected = (mean.exp() * spread.sqrt() / counts.mean() / 3).item()
    assert score.stderr == pytest.approx(expected, rel=1e-9)


def test_perplexity_and_its_error(subject: LanguageModel) -> None:
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=48)
    metric = perplexity.perplexity(windows)
    assert (metric.name, metric.better) == ("perplexity@text,seq48", "lower")
    score = metric(subject)
    losses = torch.tensor(losses_by_hand(subject.model, windows.ids), dtype=torch.float64)
    count = len(encode(subject.tokenizer, TEXT)) // 48
    assert score.n == len(losses) == count
    assert score.value == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert score.stderr == pytest.approx((score.value * losses.std() / math.sqrt(count)).item(), rel=1e-4)
    assert score.about["tokens_scored"] == 47 * count and score.about["bos"] == "none"


def test_lm_eval_finds_the_same_likelihoods(subject: LanguageModel) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from affinequant_evals.lm_eval_model import InMemory

    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=40, windows=4)
    requests = [(("", ""), window[:1], window[1:]) for window in windows.ids.tolist()]
    found = InMemory(subject, "auto")._loglikelihood_tokens(requests, disable_tqdm=True)
    theirs = [-total / 39 for total, _ in found]
    assert window_losses(subject.model, windows.ids).tolist() == pytest.approx(theirs, rel=1e-5)


def test_a_model_that_scales_its_logits() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=0.25,
    )
    model = GraniteForCausalLM(config).eval()
    ids = torch.randint(320, (3, 24))
    assert logits.open_logits(model, ids[0]).piecewise
    assert window_losses(model, ids).tolist() == pytest.approx(losses_by_hand(model, ids), rel=1e-5)


def test_a_model_that_caps_its_logits() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 16,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 16}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5)).eval()
    ids = torch.randint(320, (3, 24))
    assert logits.open_logits(model, ids[0]).piecewise
    assert window_losses(model, ids).tolist() == pytest.approx(losses_by_hand(model, ids), rel=1e-5)


def test_a_model_whose_logits_need_the_whole_window(subject: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = subject.model.forward

    def odd(*given: Any, **named: Any) -> Any:
        found: Any = forward(*given, **named)
        found.logits = found.logits - 0.5 * found.logits.mean(dim=1, keepdim=True)
        return found

    monkeypatch.setattr(subject.model, "forward", odd)
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=48, windows=2)
    assert not logits.open_logits(subject.model, windows.ids[0]).piecewise
    monkeypatch.setattr(logits, "BUDGET", 4 * 4 * 320 * 7)
    expected = losses_by_hand(subject.model, windows.ids)
    assert window_losses(subject.model, windows.ids).tolist() == pytest.approx(expected, rel=1e-5)
    beside = replace(subject, reference=Live(load=lambda: subject.model))
    assert perplexity.read(beside, windows)["kl"].tolist() == [0.0, 0.0]


def test_bfloat16_is_scored_in_float32(subject: LanguageModel, tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.bfloat16).eval()
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=48, windows=3)
    expected = losses_by_hand(model, windows.ids)
    assert window_losses(model, windows.ids).tolist() == pytest.approx(expected, rel=1e-3)


def test_nan_is_a_row(subject: LanguageModel, tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=30, windows=2)
    broken = LanguageModel(model=model, tokenizer=subject.tokenizer, name="broken")
    card = evaluate(broken, Suite(name="", metrics=(perplexity.perplexity(windows),)))
    assert [row.error for row in card.rows] == ["the value is nan"]
