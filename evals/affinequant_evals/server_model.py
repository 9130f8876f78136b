"""A server that speaks OpenAI's protocol, as lm-eval asks it: of completions, with probabilities, or of a chat, without."""

import os
from typing import Any
from urllib.parse import urlsplit

import requests
from lm_eval.models import openai_completions

from affinequant.data.wheels import Say
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant_evals.lm_eval_model import Served

AT_ONCE = 8
"""Requests that wait for an answer at any time."""
PATIENCE = 20
"""Seconds in which a server must answer the first questions."""

_completions: Any = openai_completions.LocalCompletionsAPI
_chat: Any = openai_completions.LocalChatCompletion


class Server(Served, _completions):
    """lm-eval's own class: prompts go as ids of the checkpoint's tokenizer, so that both models see the same tokens."""

    def __init__(self, url: str, model: str, tokenizer: Any, *, length: int, say: Say) -> None:
        self.begin(say, "auto")
        super().__init__(base_url=url, model=model, tokenizer_backend="none", max_length=length, num_concurrent=AT_ONCE)
        self.tokenizer, self.tokenizer_backend, self.tokenized_requests = tokenizer, "huggingface", True
        self.add_bos_token = None  # as the policy has it

    def create_message(self, messages: Any, generate: bool = False) -> Any:
        """What is sent of prompts."""
        self._count(ids[0] for ids in messages)
        return super().create_message(messages, generate)


class Chat(Served, _chat):
    """lm-eval's own class: turns go as they are, the server's template makes prompts of them."""

    def __init__(self, url: str, model: str, *, length: int, say: Say) -> None:
        self.begin(say, "auto")
        super().__init__(base_url=url, model=model, max_length=length, num_concurrent=AT_ONCE)

    def tok_encode(self, string: Any, *given: Any, **options: Any) -> Any:
        """The text: nothing is cut or counted here."""
        return string

    def bos_said(self) -> str:
        """Nobody here knows."""
        return "as the server's template has it"


def find_model(url: str, wanted: str) -> str:
    """What the server calls its model: `wanted` if it has that, or the only one it has.

    Raises:
        AffineQuantError: no answer, another model, or several (exit 3).
    """
    place = urlsplit(url)
    path = place.path.removesuffix("/completions").removesuffix("/chat")
    listed = _ask("get", place._replace(path=f"{path}/models").geturl()).get("data") or []
    names = [str(entry.get("id")) for entry in listed]
    if wanted in names or (not wanted and len(names) == 1):
        return wanted or names[0]
    what = f"the server has {', '.join(names) or 'no model'}" + (f", not {wanted}" if wanted else "")
    raise _refused(what, url, "name one: http://HOST:PORT?model=NAME")


def check_probabilities(url: str, model: str, ids: list[int]) -> None:
    """Have a server score a short prompt, as every task and text will want it.

    Raises:
        AffineQuantError: it does not answer with the logarithm of each prompt token's probability (exit 3).
    """
    wanted = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    try:
        given = _ask("post", url, json=wanted)["choices"][0]["logprobs"]["token_logprobs"]
        whole = len(given) == len(ids) + 1 and all(isinstance(one, float | int) for one in given[1:])
    except (LookupError, TypeError):
        whole = False
    if not whole:
        what = "the server gives no probabilities of a prompt's tokens (`echo` with `logprobs`, and a prompt of ids)"
        raise _refused(what, url, "serve it with vLLM, or score the folder with --backend vllm")


def _ask(how: str, url: str, **what: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}  # as lm-eval has it
    try:
        answer = requests.request(how, url, headers=headers, timeout=PATIENCE, **what)
        answer.raise_for_status()
        value = answer.json()
    except (requests.RequestException, ValueError) as problem:
        raise _refused(f"no answer: {problem}", url, "start the server, or mend the address") from problem
    return value if isinstance(value, dict) else {}


def _refused(what: str, url: str, fix: str) -> AffineQuantError:
    place = urlsplit(url)
    shown = place._replace(netloc=place.netloc.rpartition("@")[2]).geturl()  # not the password
    return AffineQuantError(what, f"--backend {shown}", fix, exit_code=PREFLIGHT)
