"""Greedy continuations, and what in them looks broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from affinequant_evals.harness import Suite, evaluate
from affinequant_evals.perplexity import LanguageModel
from affinequant_evals.sanity import (
    NEW_TOKENS,
    PROMPTS,
    ROW,
    broken,
    greedy,
    repetition,
    samples,
    suspicion,
    with_samples,
)

import affinequant


@pytest.mark.parametrize(
    ("ids", "share"), [(range(20), 0.0), ([7] * 20, 16 / 17), ([1, 2] * 10, 15 / 17), ([1, 2, 3], 0.0), ([], 0.0)]
)
def test_repetition_is_the_share_of_fours_that_were_there(ids: Any, share: float) -> None:
    assert repetition([*ids]) == pytest.approx(share)


@pytest.mark.parametrize(
    ("ids", "text", "words"),
    [
        ([0] * 16, "!" * 16, "one token 16 times in a row"),
        ([3, *[0] * 15], " Paris" + "!" * 15, "one token 15 times in a row"),
        ([1, 2] * 8, "no no" * 8, "repetition"),
        ([2], "", "nothing is said"),
        ([2, 2], " \n", "nothing is said"),
        ([5, 6, 7], "\ufffd", "nothing is said"),
        (list(range(16)), "Par\ufffdis is\x00", "2 characters that are no text"),
    ],
)
def test_what_looks_broken(ids: list[int], text: str, words: str) -> None:
    assert words in suspicion(ids, text)


@pytest.mark.parametrize(
    "text",
    [" Paris. Paris is the capital.", "100°C (212°F)\n\tat sea level", " 巴黎", "🙂 yes\u200d", " a part of \ufffd"],
)
def test_what_does_not(text: str) -> None:
    assert suspicion(list(range(16)), text) == ""


def test_a_small_loop_of_a_small_model_is_none() -> None:
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8]  # the same sentence twice
    assert 0.3 < repetition(ids) < 0.8 and suspicion(ids, "Paris is a city. Paris is a city.") == ""


@pytest.fixture(scope="module")
def subject(tiny: Callable[..., Path]) -> LanguageModel:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny())
    return LanguageModel(model=affinequant.load(tiny()), tokenizer=tokenizer, name="tiny")


def test_samples_are_greedy(subject: LanguageModel) -> None:
    first, second = samples(subject), samples(subject)
    assert first == second and [one.prompt for one in first] == list(PROMPTS)
    import torch

    ids = subject.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    start, model = ids.shape[1], subject.model
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            new = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
            if int(new) == subject.tokenizer.eos_token_id:
                break
    assert first[0].text == subject.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_a_broken_model_is_told_beside_a_sound_one(subject: LanguageModel, tiny: Callable[..., Path]) -> None:
    import torch

    model = affinequant.load(tiny())
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # as where scales are lost: one token wins everywhere
    dead = LanguageModel(model=model, tokenizer=subject.tokenizer, name="dead")
    suite = Suite(name="", metrics=(greedy(),))
    bad, good = (evaluate(one, suite) for one in (dead, subject))
    (score,) = (row.score for row in bad.rows)
    assert score and score.value > 0.5 and score.n == len(PROMPTS)
    found = with_samples(bad.against(good)).to_json()["samples"]
    assert [sample["prompt"] for sample in found] == list(PROMPTS) and all(sample["suspicious"] for sample in found)
    assert [sample["baseline"] for sample in found] == [
        sample["text"] for sample in (good.score(ROW) or pytest.fail("no row")).about["samples"]
    ]
    sound = [sample | {"baseline_suspicious": ""} for sample in found]
    assert len(broken(sound)) == len(PROMPTS) and PROMPTS[0] in broken(sound)[0]
    assert broken(with_samples(bad.against(bad)).to_json()["samples"]) == []  # the model says so as well
    alone = with_samples(bad).to_json()["samples"]
    assert alone[0]["baseline"] is None and len(broken(alone)) == len(PROMPTS)


def test_a_model_that_cannot_go_on_costs_no_other_score(subject: LanguageModel) -> None:
    said: list[str] = []
    mute = LanguageModel(model=None, tokenizer=subject.tokenizer, name="mute", say=said.append)  # pyright: ignore[reportArgumentType]
    card = evaluate(mute, Suite(name="", metrics=(greedy(),)))
    assert card.rows == () and "no greedy samples" in said[0]
    assert "samples" not in with_samples(card).to_json()
