"""A model that cannot do without a BOS, and a tokenizer that starts no text with it: said, and put there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from affinequant.data.tokenizer import adds_bos, load_tokenizer, without_bos
from affinequant.data.tokens import encode
from affinequant.pipeline import tokens_of
from affinequant.plan import Plan, plan
from affinequant.progress import Silent

Tiny = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words and others " * 2000)
    return tmp_path / "text.txt"


def planned(folder: Path, text: Path) -> Plan:
    return plan(folder, data=text, samples=2, seq_len=16, device="cpu")


def test_gemma_is_given_the_bos_that_its_tokenizer_forgets(tiny: Tiny, text: Path) -> None:
    made = planned(tiny(family="gemma3"), text)
    tokens = tokens_of(made, Silent())
    assert any("starts no text with <s>" in note for note in made.notes)
    assert tokens.bos and (tokens.ids[:, 0] == 0).all() and (tokens.ids[:, 1] != 0).all()


def test_other_families_are_left_alone(tiny: Tiny, text: Path) -> None:
    made = planned(tiny(), text)
    assert not any("starts no text" in note for note in made.notes)
    assert not tokens_of(made, Silent()).bos


def test_a_tokenizer_with_a_bos_is_as_it_was(tiny: Tiny, tiny_copy: Tiny, tmp_path: Path) -> None:
    folder = tiny_copy(family="gemma3")
    assert without_bos(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    assert not without_bos(folder)  # some classes heed that
    saved = load_tokenizer(folder, bos=True)
    saved.save_pretrained(tmp_path / "saved")
    assert not without_bos(tmp_path / "saved") and adds_bos(load_tokenizer(tmp_path / "saved"))
    forced, free = load_tokenizer(tiny(family="gemma3"), bos=True), load_tokenizer(tiny(family="gemma3"))
    assert forced("a word")["input_ids"] == [0, *free("a word")["input_ids"]]
    assert encode(forced, "a word") == encode(free, "a word")


def test_a_tokenizer_that_has_none_gets_none(tiny_copy: Tiny) -> None:
    folder = tiny_copy(family="gemma3")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({name: v for name, v in json.loads(path.read_text()).items() if name != "bos_token"}))
    assert not without_bos(folder) and not adds_bos(load_tokenizer(folder, bos=True))


def test_scores_are_with_it_too(tiny: Tiny, text: Path) -> None:
    from affinequant_evals.checkpoint import prepare

    for family, said in (("gemma3", "each window"), ("llama", "none")):
        ready = prepare(tiny(family=family), text=str(text), seq_len=16, windows=2)
        assert {windows.bos for windows in ready.compared} == {said}
