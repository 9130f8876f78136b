"""A model as lm-eval asks it: a BOS where one is wanted and nowhere twice, batches whose logits fit, who was asked what.

lm-eval must be installed to import this.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from lm_eval.models import huggingface

from affinequant.data.wheels import Say
from affinequant.progress import Steps
from affinequant_evals.hush import hushed
from affinequant_evals.perplexity import LanguageModel
from affinequant_evals.windows import Bos, Windows

LOGITS_BYTES = 2**30
"""Logits of one batch in float32. lm-eval holds about three such tables at once: the model's, and the logarithms."""
ROWS = {"cuda": 16}
"""Most prompts in a batch, by device; elsewhere four."""
WINDOWS = 8
"""Windows of text that an engine or a server is given at once."""

# Its decorators hide the signature from type checkers.
_stock: Any = huggingface.HFLM


class OneBos:
    """What is the same for every model of lm-eval's: the policy about BOS, and what is counted.

    Attributes:
        bos: `yes` puts one BOS before each prompt, `no` takes away the tokenizer's own, `auto` leaves it to the tokenizer.
            lm-eval conditions an empty prompt and the first token of a text that it scores as a whole on one BOS in any case.
        asked: sequences that the model was given so far.
        began: how many of them began with a BOS.
    """

    bos: Bos = "auto"
    asked = began = 0
    whole_texts = False
    say: Say
    told: Steps
    tokenizer: Any
    max_length: Any
    prefix_token_id: Any
    reserve = 0
    """Tokens that must be left of `max_length` beside those that are scored."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # lm-eval's class, which stands behind this one

    def begin(self, say: Say, bos: Bos) -> None:
        """Start counting, under a policy."""
        self.bos, self.asked, self.began, self.say = bos, 0, 0, say
        self.told = Steps(say, "prompts", 0)

    def bos_said(self) -> str:
        """Where a BOS stood in what the model was given, in words."""
        if self.began in (0, self.asked):
            return "each prompt" if self.began else "none"
        return f"{self.began} of {self.asked} prompts"

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **options: Any) -> Any:
        """Ids of a text, or of each of several. A tokenizer that adds no BOS by itself cannot be told to, so `yes` puts it
        there; where the text begins with one already, as a chat's turns may, none is added."""
        if not isinstance(string, str):
            return [self.tok_encode(each, add_special_tokens, **options) for each in string]
        own = self.tokenizer.decode(self.prefix_token_id)
        special = self.bos != "no" if add_special_tokens is None else add_special_tokens
        if self.whole_texts or (add_special_tokens is None and own and string.startswith(own)):
            special = False  # of a text as a whole, lm-eval puts its prefix before the ids
        ids = self.tokenizer.encode(string, add_special_tokens=special)
        start = self.tokenizer.bos_token_id
        wanted = self.bos == "yes" and not self.whole_texts and add_special_tokens is not False
        return [start, *ids] if wanted and ids[:1] != [start] else ids

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's; its prefix is the one BOS, whatever the tokenizer or `bos` would add to a text."""
        self.whole_texts = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # pyright: ignore
        finally:
            self.whole_texts = False

    def _loglikelihood_tokens(self, requests: Any, *given: Any, **named: Any) -> Any:
        """(name, context, continuation) each."""
        room = self.max_length - self.reserve
        requests = [(name, self._cut(start, room - len(rest)), rest) for name, start, rest in requests]
        self.told = Steps(self.say, "prompts", 0 if self.whole_texts else len(requests))
        return super()._loglikelihood_tokens(requests, *given, **named)  # pyright: ignore

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's."""
        self.told = Steps(self.say, "prompts", len(requests))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)  # pyright: ignore

    def _cut(self, ids: list[int], room: int | None) -> list[int]:
        """The end of a prompt that is too long, and still a BOS before it where `yes` promises one."""
        start = self.tokenizer.bos_token_id if self.bos == "yes" else None
        if room is None or len(ids) <= room or room < 1 or start is None or ids[:1] != [start]:
            return ids
        return [ids[0], *ids[len(ids) - room + 1 :]]

    def _count(self, firsts: Iterable[int]) -> None:
        firsts, start = list(firsts), self.tokenizer.bos_token_id
        self.asked += len(firsts)
        self.told(len(firsts))
        self.began += sum(first == start for first in firsts) if start is not None else 0


class InMemory(OneBos, _stock):
    """A transformers model in this process."""

    reserve = -1  # the last token is scored, not read

    def __init__(self, subject: LanguageModel, bos: Bos) -> None:
        model: Any = subject.model
        self.begin(subject.say, bos)
        self.rows = self.most = ROWS.get(model.device.type, 4)
        self.vocabulary = model.config.get_text_config().vocab_size
        super().__init__(
            pretrained=model,
            tokenizer=subject.tokenizer,
            batch_size=self.most,
            softmax_dtype="float32",
            add_bos_token={"yes": True, "no": False}.get(bos),
        )

    @property
    def batch_size(self) -> int:
        """Prompts of the next batch."""
        return self.rows

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of prompts that are to be continued, padded to one length."""
        if self.bos != "yes":
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **options)
        ids = [self._cut(self.tok_encode(string), left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _loglikelihood_tokens(self, requests: Any, *given: Any, **named: Any) -> Any:
        """The longest decides how many are asked at once."""
        longest = max((len(start) + len(rest) for _, start, rest in requests), default=1)
        fit = LOGITS_BYTES // (4 * self.vocabulary * min(longest, self.max_length + 1))
        self.rows = max(1, min(self.most, fit))
        try:
            return super()._loglikelihood_tokens(requests, *given, **named)
        finally:
            self.rows = self.most

    def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
        self._count(inps[:, 0].tolist())
        return super()._model_call(inps, **options)

    def _model_generate(self, context: torch.Tensor, **options: Any) -> torch.Tensor:
        first = options["attention_mask"].argmax(dim=1, keepdim=True)
        self._count(context.gather(1, first)[:, 0].tolist())
        return super()._model_generate(context, **options)


class Served(OneBos):
    """A model whose logits stay where they are: asked for the probabilities of given tokens."""

    def losses(self, windows: Windows, told: Steps) -> Float64[torch.Tensor, " windows"]:
        """Loss in nats of each window of a text, summed over its targets that count."""
        questions: list[Any] = []
        for index, ids in enumerate(windows.ids.tolist()):
            first = windows.places(index).start + 1
            questions.append((None, ids[:first], ids[first:]))
        found: list[float] = []
        for start in range(0, len(questions), WINDOWS):
            part = questions[start : start + WINDOWS]
            with hushed(False):
                found += [-total for total, _ in self._loglikelihood_tokens(part, disable_tqdm=True)]
            told(len(part))
        return torch.tensor(found, dtype=torch.float64)


def asked_through(subject: LanguageModel, bos: Bos) -> Any:
    """The subject as lm-eval asks it, with nothing counted yet."""
    model: Any = subject.model
    if not isinstance(model, OneBos):
        return InMemory(subject, bos)
    model.begin(subject.say, bos)
    return model
