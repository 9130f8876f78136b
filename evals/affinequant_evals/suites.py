"""Named suites, and what can be measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from affinequant.data.text import MOST_CHARACTERS
from affinequant.data.tokens import evaluation_text
from affinequant.data.wheels import Say, quiet
from affinequant.errors import AffineQuantError, unknown_name
from affinequant_evals.backends import Backend, find_backend
from affinequant_evals.derived import task_mean
from affinequant_evals.harness import Suite
from affinequant_evals.perplexity import LanguageModel, on_text
from affinequant_evals.sample_log import SampleLog
from affinequant_evals.sanity import greedy
from affinequant_evals.tasks import TaskOptions, task_batteries, tokenizer_hash
from affinequant_evals.windows import C4, PAPER_WINDOWS, Bos, Windows, check_bos, cut_windows

METRICS: dict[str, str] = {
    "perplexity@TEXT,seqN": "exp of the mean next-token loss over windows of N tokens; lower is better",
    "kl@TEXT,seqN": "mean divergence of the next-token distribution from the baseline's, in nats; lower is better",
    "agreement@TEXT,seqN": "share of tokens before which both hold the same token most likely; higher is better",
    "flips@TEXT,seqN": "share of tokens that exactly one of the two predicts right; lower is better",
    "drift@TEXT,seqN": "how many times as far a text is from the calibration text, in what linears read, as halves of that "
    "are from each other, by sliced W2 over windows of N tokens; lower is better",
    "drift_gaussian@TEXT,seqN": "the same by the W2 of normal distributions; lower is better",
    "repetition@greedy": "share of repeated sequences of four tokens in greedy samples; lower is better",
    "TASK,acc": "share of an lm-eval task's documents answered right; higher is better",
    "TASK,acc_norm": "the same with each answer's likelihood divided by its length; higher is better",
    "lambada_openai,perplexity": "perplexity of the last word; lower is better",
    "TASK,flips": "share of documents that exactly one of checkpoint and baseline has right; lower is better",
    "mean@SUITE": "mean over the suite's tasks of acc_norm, or acc where a task has no other; higher is better",
}
"""What `affinequant list metrics` shows. An lm-eval task brings whatever other metrics it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What is measured: perplexity of texts, drift, and tasks. None means all windows, all documents, lm-eval's own shots,
    windows side by side (else they start every `stride` tokens).

    Attributes:
        kl: next-token distributions are compared with the baseline's where there is one.
        samples: a few greedy continuations beside a text.
        chat_template: a task's prompts are a chat's turns, as the tokenizer's template writes them.
        backend: in what the model runs, see `backends.BACKENDS`.
        log_samples: a new folder for every document's prompt and answers; "" for none.
        mean: the suite of whose tasks the mean is a row too; "" for none.
        drift: texts of which it is measured how far they are from the calibration text (`drift`).
        drift_from: what is calibrated on, where a checkpoint does not say or another is meant; "" for the checkpoint's.
    """

    about: str = "as asked"
    texts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    windows: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    seq_len: int = 2048
    bos: Bos = "auto"
    stride: int | None = None
    kl: bool = True
    samples: bool = False
    chat_template: bool = False
    backend: str = "auto"
    log_samples: str = ""
    mean: str = ""
    drift: tuple[str, ...] = ()
    drift_from: str = ""


AFFINEQUANT_TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
FLATQUANT_TASKS = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "lambada_openai")

_PAPER = Measurements(
    about="as AffineQuant was evaluated: WikiText-2 test, the older C4, six tasks without shots; needs a hub",
    texts=("wikitext2", "c4"),
    tasks=AFFINEQUANT_TASKS,
    num_fewshot=0,
    bos="first",
    mean="paper",
)
_FLATQUANT = replace(
    _PAPER,
    about="as FlatQuant was evaluated: WikiText-2 test, the newer C4, six tasks without shots; needs a hub",
    texts=("wikitext2", "c4-new"),
    tasks=FLATQUANT_TASKS,
    mean="flatquant",
)


def _tasks_of(suite: Measurements) -> Measurements:
    """A paper's suite without its texts."""
    about = f"the tasks of {suite.mean} alone, which need no hub: {', '.join(suite.tasks)}"
    return replace(suite, about=about, texts=(), bos="no", mean=f"{suite.mean}-tasks")


SUITES: dict[str, Measurements] = {
    "quick": Measurements(
        about="perplexity on 6 windows of the demo's text and 100 documents of four tasks; no hub needed",
        texts=("demo",),
        tasks=("piqa", "arc_easy", "hellaswag", "lambada_openai"),
        windows=6,
        limit=100,
        mean="quick",
    ),
    **{suite.mean: suite for one in (_PAPER, _FLATQUANT) for suite in (one, _tasks_of(one))},
}


def find_suite(name: str) -> Measurements:
    """The suite of that name.

    Raises:
        AffineQuantError: unknown, with the nearest spelling.
    """
    if name not in SUITES:
        raise unknown_name("suite", name, SUITES, where="--suite")
    return SUITES[name]


def build_suite(
    wanted: Measurements,
    tokenizer: Any,
    *,
    name: str = "",
    verbose: bool = False,
    say: Say = quiet,
    backend: Backend | None = None,
    log: SampleLog | None = None,
) -> Suite[LanguageModel]:
    """The metrics of `wanted`, with every text read and every task name checked before anything is measured.

    Args:
        backend: that of `wanted`, where it has been found already.
        log: where tasks write what was answered.

    Raises:
        AffineQuantError: a text, task, BOS, chat template or backend that is not there (exit 2 or 3), or too little text
            (exit 3).
    """
    backend = backend or find_backend(wanted.backend)
    check_bos(tokenizer, wanted.bos)
    _check_chat(wanted, tokenizer, backend)
    # Tasks speak of a BOS in each prompt or none; the papers put none there.
    options = TaskOptions(
        limit=wanted.limit,
        num_fewshot=wanted.num_fewshot,
        bos="no" if wanted.bos == "first" else wanted.bos,
        tokenizer=tokenizer_hash(tokenizer) if wanted.tasks else "",
        chat_template=wanted.chat_template or backend.chat,
        backend=backend,
        log=log,
        verbose=verbose,
    )
    batteries = task_batteries(wanted.tasks, options, say)
    windows = [_windows(text, wanted, tokenizer, say) for text in wanted.texts]
    spoken = [greedy()] if wanted.samples and wanted.texts and backend.all_logits else []
    derived = (task_mean(wanted.mean, wanted.tasks),) if wanted.mean else ()
    return Suite(name=name, metrics=(*map(on_text, windows), *batteries, *spoken), derived=derived)


def _check_chat(wanted: Measurements, tokenizer: Any, backend: Backend) -> None:
    if backend.chat and wanted.texts:
        what = "a perplexity is made of tokens' probabilities, which no chat tells"
        raise AffineQuantError(what, "--backend", "give the server's /v1/completions, or --tasks alone")
    if wanted.chat_template and not backend.chat and not tokenizer.chat_template:
        raise AffineQuantError("the tokenizer has no chat template", "--chat-template", "leave it out")


def _windows(text: str, wanted: Measurements, tokenizer: Any, say: Say) -> Windows:
    size: dict[str, Any] = {"seq_len": wanted.seq_len}
    if text in C4 and wanted.bos == "first":
        if wanted.stride is not None:
            fix = f"leave it out, or {text}: its windows are those of the papers"
            raise AffineQuantError(f"{text} has no sliding windows", "--stride", fix)
        return C4[text](tokenizer, **size, count=wanted.windows or PAPER_WINDOWS)
    most = max(MOST_CHARACTERS, 8 * (wanted.windows or 0) * wanted.seq_len)  # as for calibration
    name, content = evaluation_text(text, most=most, say=say)
    return cut_windows(name, content, tokenizer, **size, windows=wanted.windows, bos=wanted.bos, stride=wanted.stride)


def measurements(
    *,
    suite: str | None = None,
    text: str | None = None,
    tasks: Sequence[str] = (),
    drift: Sequence[str] | None = None,
    **given: Any,
) -> Measurements:
    """A suite with what was given in its place; a text, tasks or drift without a suite are measured alone, and nothing at
    all is the suite `quick`.

    Args:
        text: instead of the suite's texts.
        tasks: instead of the suite's tasks; their mean is then no row.
        drift: texts whose drift is measured; none of them stands for those whose perplexity is.
        given: other fields of `Measurements`; None leaves the suite's.

    Raises:
        AffineQuantError: unknown suite, a policy for BOS that is not one, or windows where there is no text.
    """
    if given.get("bos") not in (None, *get_args(Bos)):
        raise unknown_name("BOS policy", str(given["bos"]), get_args(Bos), where="--bos")
    if suite is None and (text or tasks or drift):
        start = Measurements(texts=(text,) if text else (), tasks=tuple(tasks))
    else:
        start = find_suite(suite or "quick")
    given |= {"texts": (text,) if text else None, "tasks": tuple(tasks) or None, "mean": "" if tasks else None}
    wanted = replace(start, **{name: value for name, value in given.items() if value is not None})
    for name in ("seq_len", "windows", "stride"):
        if suite and not wanted.texts and given.get(name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise AffineQuantError(f"{flag} is about text, and the suite {suite} has none", flag, "add --text")
    if drift is None and wanted.drift_from:
        raise AffineQuantError("--drift-from is about drift, and none is asked for", "--drift-from", "add --drift TEXT")
    return wanted if drift is None else _drifting(wanted, drift)


def _drifting(wanted: Measurements, drift: Sequence[str]) -> Measurements:
    if not drift and not wanted.texts:
        raise AffineQuantError("the drift of no text is asked for", "--drift", "name texts: --drift demo my.txt")
    return replace(wanted, drift=tuple(drift) or wanted.texts)
