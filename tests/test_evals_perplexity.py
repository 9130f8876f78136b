"""Windows and perplexity, against a loop written out by hand and against lm-eval's own likelihoods."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals import evaluate, logits, perplexity
from affinequant_evals.harness import Suite
from affinequant_evals.perplexity import LanguageModel, window_losses
from affinequant_evals.windows import c4_windows, cut_windows

from affinequant import progress
from affinequant.data.tokens import encode
from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError

TEXT = " ".join(random.Random(0).choices(["heron", "reed", "the", "an", "over", "bridge", "water", "in"], k=900))


@pytest.fixture(scope="module")
def subject(tiny: Callable[..., Path]) -> LanguageModel:
    """A tiny Llama in float32; its tokenizer adds no BOS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return LanguageModel(model=model, tokenizer=AutoTokenizer.from_pretrained(folder), name="tiny")


@pytest.fixture(scope="module")
def bos_tokenizer(tiny: Callable[..., Path]) -> Any:
    """A tokenizer that starts each text with its BOS."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    made: Any = AutoTokenizer.from_pretrained(tiny())
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


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


def test_bfloat16_is_scored_in_float32(subject: LanguageModel, tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.bfloat16).eval()
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=48, windows=3)
    expected = losses_by_hand(model, windows.ids)
    assert window_losses(model, windows.ids).tolist() == pytest.approx(expected, rel=1e-3)


def test_windows_lie_side_by_side(subject: LanguageModel) -> None:
    ids = encode(subject.tokenizer, TEXT)
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=30, windows=4)
    assert windows.ids.flatten().tolist() == ids[:120]
    assert cut_windows("text", TEXT, subject.tokenizer, seq_len=30).ids.shape[0] == len(ids) // 30


@pytest.mark.parametrize(
    ("bos", "adds", "expected"),
    [
        ("auto", False, "none"),
        ("auto", True, "each window"),
        ("yes", False, "each window"),
        ("yes", True, "each window"),
        ("no", True, "none"),
        ("first", True, "start of the text"),
        ("first", False, "none"),
    ],
)
def test_bos_policies(subject: LanguageModel, bos_tokenizer: Any, bos: Any, adds: bool, expected: str) -> None:
    tokenizer = bos_tokenizer if adds else subject.tokenizer
    ids = encode(subject.tokenizer, TEXT)
    windows = cut_windows("text", TEXT, tokenizer, seq_len=30, windows=3, bos=bos)
    assert windows.bos == expected and windows.ids.shape == (3, 30)
    text = {
        "none": [ids[:30], ids[30:60], ids[60:90]],
        "each window": [[0, *ids[:29]], [0, *ids[29:58]], [0, *ids[58:87]]],
        "start of the text": [[0, *ids[:29]], ids[29:59], ids[59:89]],
    }
    assert windows.ids.tolist() == text[expected]


def test_bos_without_a_bos_token(subject: LanguageModel, tiny: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny())
    tokenizer.bos_token = None
    with pytest.raises(AffineQuantError, match="no BOS token") as caught:
        cut_windows("text", TEXT, tokenizer, seq_len=30, bos="yes")
    assert caught.value.exit_code == USAGE
    assert cut_windows("text", TEXT, tokenizer, seq_len=30, bos="auto").bos == "none"


def test_too_little_text_says_what_would_fit(subject: LanguageModel) -> None:
    with pytest.raises(AffineQuantError) as caught:
        cut_windows("text", TEXT, subject.tokenizer, seq_len=100, windows=1000)
    assert caught.value.exit_code == PREFLIGHT
    fits = int(re.findall(r"--windows (\d+)", caught.value.fix)[0])
    assert cut_windows("text", TEXT, subject.tokenizer, seq_len=100, windows=fits).ids.shape == (fits, 100)
    with pytest.raises(AffineQuantError):
        cut_windows("text", TEXT, subject.tokenizer, seq_len=100, windows=fits + 1)
    with pytest.raises(AffineQuantError) as caught:
        cut_windows("text", "short", subject.tokenizer, seq_len=100)
    assert "--seq-len" in caught.value.fix


@pytest.mark.parametrize(("seq_len", "count"), [(1, 4), (8, 0)])
def test_no_windows_are_refused(subject: LanguageModel, seq_len: int, count: int) -> None:
    with pytest.raises(AffineQuantError) as caught:
        cut_windows("text", TEXT, subject.tokenizer, seq_len=seq_len, windows=count)
    assert caught.value.exit_code == USAGE


def test_nan_is_a_row(subject: LanguageModel, tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    windows = cut_windows("text", TEXT, subject.tokenizer, seq_len=30, windows=2)
    broken = LanguageModel(model=model, tokenizer=subject.tokenizer, name="broken")
    card = evaluate(broken, Suite(name="", metrics=(perplexity.perplexity(windows),)))
    assert [row.error for row in card.rows] == ["the value is nan"]


def test_c4_draws_as_the_papers_do(bos_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from affinequant.data import text

    draws = random.Random(7)
    rows = [{"text": "".join(draws.choices("abcdefgh", k=draws.randrange(10, 120)))} for _ in range(50)]
    monkeypatch.setattr(text, "hub_rows", lambda repo, config, **options: rows)
    windows = c4_windows(bos_tokenizer, seq_len=32, count=20)
    # Python's global generator, seeded with 0, as in the published loaders.
    random.seed(0)
    expected = []
    for _ in range(20):
        while True:
            ids = bos_tokenizer(rows[random.randint(0, len(rows) - 1)]["text"])["input_ids"]
            if len(ids) >= 32:
                break
        start = random.randint(0, len(ids) - 32 - 1)
        expected.append(ids[start : start + 32])
    assert windows.ids.tolist() == expected
    with pytest.raises(AffineQuantError, match="too little text"):
        c4_windows(bos_tokenizer, seq_len=200, count=1)
