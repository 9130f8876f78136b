"""Windows of a text: where they lie, what counts in them, where a BOS stands, and the papers' own cuts of C4."""

import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals.windows import Windows, c4_new_windows, c4_windows, cut_windows

from affinequant.data.tokens import encode
from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError

TEXT = " ".join(random.Random(0).choices(["heron", "reed", "the", "an", "over", "bridge", "water", "in"], k=900))


def test_windows_lie_side_by_side(tokenizer: Any) -> None:
    ids = encode(tokenizer, TEXT)
    windows = cut_windows("text", TEXT, tokenizer, seq_len=30, windows=4)
    assert windows.ids.flatten().tolist() == ids[:120]
    assert cut_windows("text", TEXT, tokenizer, seq_len=30).ids.shape[0] == len(ids) // 30
    assert windows.counts == (29,) * 4 and windows.label == "text,seq30" and windows.key == windows.sha256
    assert windows.sha256 == hashlib.sha256(windows.ids.numpy().astype("<i8").tobytes()).hexdigest()
    assert windows.about.keys() == {"text", "windows", "seq_len", "tokens_scored", "bos", "sha256"}


@pytest.mark.parametrize("bos", ["no", "yes", "first"])
@pytest.mark.parametrize("stride", [1, 7, 16, 28])
def test_sliding_windows_score_each_token_once(bos_tokenizer: Any, bos: Any, stride: int) -> None:
    ids = encode(bos_tokenizer, TEXT)
    windows = cut_windows("text", TEXT, bos_tokenizer, seq_len=29, windows=12, bos=bos, stride=stride)
    stream = [0, *ids] if bos == "first" else ids
    scored: list[int] = []
    for index, window in enumerate(windows.ids.tolist()):
        own = window[bos == "yes" :]
        start = index * stride
        assert own == stream[start : start + len(own)]  # where it lies in the text
        places = windows.places(index)
        assert places.stop == 28 and len(places) == (28 if index == 0 else stride)
        if index:
            assert places.start + 1 >= 29 - stride  # tokens before the first that counts
        scored += [start + place + 1 - (bos == "yes") for place in places]
    first = 0 if bos == "yes" else 1
    assert scored == list(range(first, first + len(scored)))
    assert windows.label == f"text,seq29,stride{stride}" and windows.about["stride"] == stride
    assert sum(windows.counts) == windows.about["tokens_scored"] == len(scored)
    assert windows.key != windows.sha256


@pytest.mark.parametrize("stride", [0, -1, 30, 31])
def test_a_stride_that_leaves_tokens_out_is_refused(tokenizer: Any, stride: int) -> None:
    with pytest.raises(AffineQuantError, match="twice or never") as caught:
        cut_windows("text", TEXT, tokenizer, seq_len=30, stride=stride)
    assert caught.value.exit_code == USAGE and "1 to 29" in caught.value.fix


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
def test_bos_policies(tokenizer: Any, bos_tokenizer: Any, bos: Any, adds: bool, expected: str) -> None:
    ids = encode(tokenizer, TEXT)
    windows = cut_windows("text", TEXT, bos_tokenizer if adds else tokenizer, seq_len=30, windows=3, bos=bos)
    assert windows.bos == expected and windows.ids.shape == (3, 30)
    text = {
        "none": [ids[:30], ids[30:60], ids[60:90]],
        "each window": [[0, *ids[:29]], [0, *ids[29:58]], [0, *ids[58:87]]],
        "start of the text": [[0, *ids[:29]], ids[29:59], ids[59:89]],
    }
    assert windows.ids.tolist() == text[expected]


def test_bos_without_a_bos_token(tiny: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny())
    tokenizer.bos_token = None
    with pytest.raises(AffineQuantError, match="no BOS token") as caught:
        cut_windows("text", TEXT, tokenizer, seq_len=30, bos="yes")
    assert caught.value.exit_code == USAGE
    assert cut_windows("text", TEXT, tokenizer, seq_len=30, bos="auto").bos == "none"


@pytest.mark.parametrize("stride", [None, 13])
def test_too_little_text_says_what_would_fit(tokenizer: Any, stride: int | None) -> None:
    with pytest.raises(AffineQuantError) as caught:
        cut_windows("text", TEXT, tokenizer, seq_len=100, windows=1000, stride=stride)
    assert caught.value.exit_code == PREFLIGHT
    fits = int(re.findall(r"--windows (\d+)", caught.value.fix)[0])
    whole = cut_windows("text", TEXT, tokenizer, seq_len=100, windows=fits, stride=stride)
    assert whole.ids.shape == cut_windows("text", TEXT, tokenizer, seq_len=100, stride=stride).ids.shape == (fits, 100)
    with pytest.raises(AffineQuantError):
        cut_windows("text", TEXT, tokenizer, seq_len=100, windows=fits + 1, stride=stride)
    with pytest.raises(AffineQuantError) as caught:
        cut_windows("text", "short", tokenizer, seq_len=100, stride=stride)
    assert "--seq-len" in caught.value.fix


@pytest.mark.parametrize(("seq_len", "count"), [(1, 4), (8, 0)])
def test_no_windows_are_refused(tokenizer: Any, seq_len: int, count: int) -> None:
    with pytest.raises(AffineQuantError) as caught:
        cut_windows("text", TEXT, tokenizer, seq_len=seq_len, windows=count)
    assert caught.value.exit_code == USAGE


class Shard:
    """Stands in for the first shard of C4's validation set."""

    def __init__(self, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
        from affinequant.data import text

        def hub_rows(repo: str, config: str | None, *, split: str, data_files: dict[str, str], flag: str) -> Any:
            assert (repo, config, split) == ("allenai/c4", None, "validation")
            assert data_files == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
            return rows

        monkeypatch.setattr(text, "hub_rows", hub_rows)


def test_c4_draws_as_the_papers_do(bos_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = random.Random(7)
    rows = [{"text": "".join(draws.choices("abcdefgh", k=draws.randrange(10, 120)))} for _ in range(50)]
    Shard(rows, monkeypatch)
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
    assert windows.ids.tolist() == expected and windows.label == "c4,seq32"
    with pytest.raises(AffineQuantError, match="too little text"):
        c4_windows(bos_tokenizer, seq_len=200, count=1)


@pytest.mark.parametrize("documents", [1300, 300])
def test_c4_new_joins_as_the_papers_do(bos_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, documents: int) -> None:
    draws = random.Random(8)
    rows = [{"text": "".join(draws.choices("abcdefgh", k=draws.randrange(5, 12)))} for _ in range(documents)]
    Shard(rows, monkeypatch)
    windows = c4_new_windows(bos_tokenizer, seq_len=32)
    # The published loaders: one text of 1100 documents, its first 256 windows, `input_ids.numel() // seqlen` of them.
    whole = bos_tokenizer(" ".join(row["text"] for row in rows[:1100]))["input_ids"][: 256 * 32]
    count = len(whole) // 32
    assert (count == 256) == (documents > 1100)
    assert windows.ids.tolist() == [whole[32 * place : 32 * place + 32] for place in range(count)]
    assert windows.label == "c4-new,seq32" and windows.bos == "start of the text" and windows.ids[0, 0] == 0
    assert c4_new_windows(bos_tokenizer, seq_len=32, count=3).ids.tolist() == windows.ids[:3].tolist()


def test_a_window_s_hash_knows_its_ids_and_the_key_what_counts() -> None:
    ids = torch.arange(24).view(2, 12)
    one = Windows(ids=ids, text="a", bos="none")
    assert one.key != Windows(ids=ids + 1, text="a", bos="none").key
    assert one.key != Windows(ids=ids, text="a", bos="none", stride=4).key
    assert one.sha256 == Windows(ids=ids, text="b", bos="none", stride=4).sha256
