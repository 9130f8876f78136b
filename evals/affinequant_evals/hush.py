"""Other people's logs, bars and prints kept away, while what this package says is still heard."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace

from affinequant_evals.perplexity import LanguageModel


@contextmanager
def aloud(subject: LanguageModel) -> Iterator[LanguageModel]:
    """The subject, whose `say` is heard where all others are hushed."""
    with os.fdopen(os.dup(2), "w", encoding="utf-8") as stream:

        def say(text: str) -> None:
            with redirect_stderr(stream):
                subject.say(text)
            stream.flush()

        yield replace(subject, say=say)


@contextmanager
def hushed(verbose: bool) -> Iterator[None]:
    """No logs, bars and prints of lm-eval and datasets, unless asked for; errors still rise as exceptions."""
    if verbose:
        with redirect_stdout(sys.stderr):
            yield
        return
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), _no_stderr_of_children():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_stderr_of_children() -> Iterator[None]:
    """lm-eval asks git for a commit wherever it happens to run, and git then complains on the inherited stderr."""
    sys.stderr.flush()
    kept, void = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(void)
