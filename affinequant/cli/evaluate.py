"""`affinequant eval`: perplexity and tasks, next to the model that the checkpoint was made from."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from affinequant.cli.arguments import Parser, choice, whole
from affinequant.cli.gates import add_gates, gate_code, judged, limits_of, print_gates
from affinequant.cli.output import Screen, between, freedom, minutes, with_error
from affinequant.cli.published import as_published, beside_published
from affinequant.cli.report import add_report, check_report, place_of, report_on
from affinequant.errors import AffineQuantError
from affinequant.recipe.recipe import Device, Dtype

if TYPE_CHECKING:
    from affinequant_evals.gates import Limits
    from affinequant_evals.harness import Row, Scorecard

DEFAULT_WINDOWS, DEFAULT_SEQ_LEN = 6, 2048
BOS_TEXT = "BOS before each window and prompt, or first: before the text only, as in the papers (default: auto)"
BACKEND_TEXT = "what runs the models (default: auto, which is affinequant, this package's own runtime)"
SUITE_TEXT = (
    "a named set of texts and tasks: quick, paper, flatquant, or paper-tasks and flatquant-tasks, which need no hub"
)
DRIFT_TEXT = "how far texts are from the calibration text; without TEXT those that are scored anyway"
USAGE = "CKPT [--text FILE|demo] [--tasks A,B] [--suite NAME] [--drift [TEXT...]] ..."
EPILOG = f"""
Without options: perplexity on {DEFAULT_WINDOWS} windows of the demo's held-out text. The baseline (the model that the
checkpoint was made from, or --baseline) sees the same tokens and prompts; +- is one standard error, of the
pairwise differences where it stands at the difference, with one degree of freedom less than there are windows;
in brackets 95 % by Student's t. Better or worse is said only where they hold no 0.

Beside a baseline three more rows a text, of the same tokens: kl is the mean divergence of the next-token distribution from
the baseline's (nats), agreement the share of tokens before which both hold the same token most likely, flips the share that
exactly one of them predicts right. Both models are in memory where they fit together; else the baseline runs first and
leaves its largest logits of each token, and some drawn from the rest, on disk ($TMPDIR): kl is then an estimate.

Scores are kept, by the content of weights, tokens and settings and by versions: the same command prints them again, a
baseline is scored once for all its checkpoints, and after Ctrl-C the same command goes on.

After a suite of a paper stands what was published of the model, with ours beside it: pass or FAIL where the same was
measured, else why not (`affinequant list published` shows all).

--drift asks whether the calibration text was the right one for other texts: how many times as far each is from it, in what
the linears of the full-precision model read (sliced Wasserstein distance, site by site), as two halves of the calibration
text are from each other. It needs no quantised model: `eval MODEL --drift-from TEXT --drift TEXTS` asks before the work.
It tells which of two calibration texts suits a text better, not which of two texts loses more.

--backend runs checkpoint and baseline elsewhere: transformers loads a folder as other programs do, vllm starts an engine, an
address asks a server that has the checkpoint; then --baseline is another server's address, a model for this machine, or none.

examples:
  affinequant eval my-llama-w4a4
  affinequant eval my-llama-w4a4 --text my-text.txt --seq-len 2048 --windows 20
  affinequant eval my-llama-w4a4 --tasks piqa,arc_easy,hellaswag,lambada_openai --limit 100
  affinequant eval my-llama-w4a4 --suite paper --json
  affinequant eval my-llama-w4a4 --drift mails.txt code.txt     how far these are from what it was calibrated on
  affinequant eval my-llama-w4a4 --max-ppl-increase 5% --max-kl 0.1     exit code 4 where it is worse than that
  affinequant eval my-llama-w4a4 --suite paper-tasks --backend vllm --log-samples answers
  affinequant eval my-llama-w4a4 --tasks piqa --backend http://127.0.0.1:8000 --baseline http://127.0.0.1:8001
"""


def add_arguments(parser: Parser) -> None:
    """CKPT, what to measure, and against what."""
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint folder, any model folder, a hub id or `demo`")
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--text",
        metavar="SOURCE",
        help="perplexity, KL and agreement on `demo`, `wikitext2`, a file or, with --bos first, `c4` or `c4-new`",
    )
    group.add_argument("--tasks", metavar="A,B", help="lm-eval tasks; nine of them need no hub")
    group.add_argument("--suite", metavar="NAME", help=SUITE_TEXT)
    group.add_argument("--drift", metavar="TEXT", nargs="*", help=DRIFT_TEXT)
    group.add_argument(
        "--drift-from", metavar="SOURCE", help="measure drift from there (default: what CKPT was calibrated on)"
    )
    group.add_argument("--no-samples", action="store_true", help="no greedy continuations beside a text")
    add_gates(parser)
    group = parser.add_argument_group("how")
    group.add_argument("--seq-len", type=whole, metavar="N", help="tokens per window of text (default: 2048)")
    group.add_argument("--windows", type=whole, metavar="N", help="windows of text (default: all that are whole)")
    group.add_argument(
        "--stride",
        type=whole,
        metavar="N",
        help="sliding windows: one every N tokens, each token scored once (default: side by side)",
    )
    group.add_argument(
        "--no-kl", action="store_true", help="do not compare next-token distributions with the baseline's"
    )
    group.add_argument("--limit", type=whole, metavar="N", help="documents per task (default: all, or the suite's)")
    group.add_argument(
        "--num-fewshot", type=whole, metavar="N", help="solved examples per prompt (default: the task's)"
    )
    group.add_argument("--chat-template", action="store_true", help="a task's prompts are a chat's turns")
    group.add_argument("--log-samples", metavar="DIR", help="write each task's prompts and both models' answers there")
    group.add_argument("--bos", metavar="auto|yes|no|first", help=BOS_TEXT)
    group.add_argument(
        "--baseline", metavar="MODEL|URL|none", help="what to compare with (default: the checkpoint's source)"
    )
    group.add_argument("--backend", metavar="auto|affinequant|transformers|vllm|URL", default="auto", help=BACKEND_TEXT)
    group.add_argument("--again", action="store_true", help="measure anew what is kept from an earlier time")
    add_report(group)
    group = parser.add_argument_group("machine")
    group.add_argument("--device", metavar="auto|cpu|cuda", default="auto", help="where to compute (default: auto)")
    group.add_argument(
        "--dtype", metavar="auto|float32|bfloat16", default="auto", help="auto: float32 on a CPU, bfloat16 on a GPU"
    )


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Score, print the table; 1 where a metric failed, 4 where a limit does not hold."""
    check_report(args.report, place_of(args.checkpoint))
    limits = limits_of(args)
    card = judged(score(args, screen, limits), limits)
    print_card(card, screen)
    if as_published(args.suite):
        card = beside_published(card, whole=args.windows is None, screen=screen)
    print_samples(card, screen)
    print_gates(card, screen)
    if args.report is not None:
        report_on(args.checkpoint, screen, out=args.report, card=card.to_json())
    screen.result(card.to_json())
    return gate_code(card, args.checkpoint, screen) or code_of(card)


def code_of(card: "Scorecard") -> int:
    """1 where a metric failed."""
    return 1 if card.failed or (card.baseline and card.baseline.failed) else 0


def score(args: argparse.Namespace, screen: Screen, limits: "Limits | None" = None) -> "Scorecard":
    """The scorecard that was asked for.

    Raises:
        AffineQuantError: something that is not there, or an option without what it applies to.
    """
    text, windows = args.text, args.windows
    tasks = tuple(name.strip() for name in (args.tasks or "").split(",") if name.strip())
    if args.tasks is not None and not tasks:
        raise AffineQuantError("no task is named", "--tasks", "give names, e.g. --tasks piqa,arc_easy")
    if not (text or tasks or args.suite or args.drift):
        text, windows = "demo", windows or DEFAULT_WINDOWS
    _check_applies(args, texts=bool(text or args.suite), tasks=bool(tasks or args.suite))
    device, dtype = choice(args.device, Device, "--device"), choice(args.dtype, Dtype, "--dtype")
    from affinequant_evals.checkpoint import eval_checkpoint

    return eval_checkpoint(
        args.checkpoint,
        text=text,
        tasks=tasks,
        suite=args.suite,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        seq_len=args.seq_len,
        windows=windows,
        stride=args.stride,
        kl=False if args.no_kl else None,
        bos=args.bos,
        chat_template=args.chat_template or None,
        drift=args.drift,
        drift_from=args.drift_from,
        backend=args.backend,
        log_samples=args.log_samples,
        baseline=args.baseline,
        device=device,
        dtype=dtype,
        samples=not args.no_samples,
        limits=limits,
        keep=True,
        again=args.again,
        verbose=screen.verbose,
        say=screen.say,
    )


def print_card(card: "Scorecard", screen: Screen) -> None:
    """The scores as a table, and how they were measured."""
    deltas = card.compare(card.baseline) if card.baseline else {}
    rows = []
    for row in card.rows:
        if row.score is None:
            rows.append([row.name, f"failed: {row.error}", "", "", "", ""])
            continue
        other = card.baseline.score(row.name) if card.baseline else None
        delta = deltas.get(row.name)
        verdict = delta.verdict(row.better) if delta and row.better else ""
        rows.append(
            [
                row.name,
                with_error(row.score.value, row.score.stderr),
                with_error(other.value, other.stderr) if other else _missing(card, row.name),
                with_error(delta.value, delta.stderr, sign=True) if delta else "",
                between(delta.interval, sign=True) if delta else between(row.score.interval),
                f"{verdict}; {row.better} is better" if verdict else f"{row.better} is better",
            ]
        )
    screen.table(["metric", "value", "baseline", "difference", "95 %", ""], rows)
    screen.print()
    baseline = card.baseline.subject if card.baseline else "none"
    seconds = card.seconds + (card.baseline.seconds if card.baseline else 0)
    machine = f"{card.env.get('device', '?')} in {card.env.get('dtype', '?')}"
    backend = str(card.env.get("backend", ""))
    machine += f" by {backend}" if backend and not backend.startswith("affinequant") else ""
    screen.facts({"checkpoint": card.subject, "baseline": baseline, "time": f"{minutes(seconds / 60)} on {machine}"})
    for line in (*(_how(row) for row in card.rows if row.score), *(f"note: {note}" for note in card.notes)):
        if line:
            screen.print(line)
    print_kept(card, screen)


def print_samples(card: "Scorecard", screen: Screen) -> None:
    """Greedy text of both, and a warning where the checkpoint's alone looks broken."""
    found = card.more.get("samples", ())
    if not found:
        return
    from affinequant_evals.sanity import broken

    screen.print("\ngreedy text, full precision | quantised:")
    for sample in found:
        screen.print(f"  {sample['prompt']} ...")
        for text in (sample["baseline"], sample["text"]):
            if text is not None:
                screen.print(f"    | {text!r}")
    for line in broken(found):
        (screen.say if screen.json else screen.print)(f"WARNING: the checkpoint no longer speaks: {line}")


def print_kept(card: "Scorecard", screen: Screen) -> None:
    """Which of the scores were not measured now, and when."""
    parts = []
    for whose, one in (("checkpoint", card), ("baseline", card.baseline)):
        times = sorted(row.kept for row in one.rows if row.kept) if one else []
        if one and times:
            share = "all" if len(times) == len(one.rows) else f"{len(times)} of {len(one.rows)}"
            parts.append(f"{share} scores of the {whose} were measured {times[0].replace('+00:00', ' UTC')}")
    if parts:
        screen.print(f"kept: {'; '.join(parts)} (`affinequant eval --again` measures anew)")


def _missing(card: "Scorecard", name: str) -> str:
    failed = [row.error for row in card.baseline.failed if row.name == name] if card.baseline else []
    return f"failed: {failed[0]}" if failed else "-"


def _how(row: "Row") -> str:
    about = row.score.about if row.score else {}
    if "windows" not in about:
        return str(about.get("said", "")) if row.name.startswith("drift@") else ""
    score = row.score
    interval = f"; 95 % {between(score.interval)}" if score and score.interval else ""
    if "reference" in about:
        return f"{row.name}: the same tokens, {_beside(about)}{interval}"
    sliding = f", one every {about['stride']}" if "stride" in about else ""
    return (
        f"{row.name}: {about['windows']} windows of {about['seq_len']} tokens of {about['text']}{sliding}, "
        f"BOS: {about['bos']}, {about['tokens_scored']:,} tokens scored; {freedom(score.dof if score else None)}{interval}"
    )


def _beside(about: Mapping[str, Any]) -> str:
    """What next-token distributions were compared with."""
    if "outside" not in about:
        return f"beside the baseline ({about['reference']})"
    return (
        f"by the baseline's {about['top_k']} largest logits of each and {about['drawn']} that were drawn from the rest, "
        f"which holds {100 * about['outside']:.2g} % of its probability; at least {about['at_least']:.4g}"
    )


def _check_applies(args: argparse.Namespace, *, texts: bool, tasks: bool) -> None:
    about_tasks = {
        "--limit": args.limit,
        "--num-fewshot": args.num_fewshot,
        "--chat-template": args.chat_template or None,
        "--log-samples": args.log_samples,
    }
    for flag, value in about_tasks.items():
        if value is not None and not tasks:
            raise AffineQuantError(f"{flag} is about tasks, and none is asked for", flag, "add --tasks or --suite")
    for flag, value in (("--seq-len", args.seq_len), ("--windows", args.windows), ("--stride", args.stride)):
        if value is not None and not texts:
            raise AffineQuantError(f"{flag} is about text, and none is asked for", flag, "add --text or --suite")
