"""A model in memory, as lm-eval asks it: a BOS where one is wanted and nowhere twice, batches whose logits fit.

lm-eval must be installed to import this.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models import huggingface

from affinequant.progress import Steps
from affinequant_evals.perplexity import Bos, LanguageModel

LOGITS_BYTES = 2**30
"""Logits of one batch in float32. lm-eval holds about three such tables at once: the model's, and the logarithms."""
ROWS = {"cuda": 16}
"""Most prompts in a batch, by device; elsewhere four."""

# Its decorators hide the signature from type checkers.
_stock: Any = huggingface.HFLM


class InMemory(_stock):
    """lm-eval's own class, but for where a BOS stands and how many prompts are asked at once.

    Args:
        bos: `yes` puts one BOS before each prompt, `no` takes away the tokenizer's own, `auto` leaves it to the tokenizer.
            lm-eval conditions an empty prompt and the first token of a text that it scores as a whole on one BOS in any case.

    Attributes:
        asked: sequences that the model was given so far.
        began: how many of them began with a BOS.
    """

    def __init__(self, subject: LanguageModel, bos: Bos) -> None:
        model: Any = subject.model
        self.say, self.told = subject.say, Steps(subject.say, "prompts", 0)
        self.bos, self.asked, self.began, self.whole_texts = bos, 0, 0, False
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

    def bos_said(self) -> str:
        """Where a BOS stood in what the model was given, in words."""
        if self.began in (0, self.asked):
            return "each prompt" if self.began else "none"
        return f"{self.began} of {self.asked} prompts"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of a text. A tokenizer that adds no BOS by itself cannot be told to, so `yes` puts it there."""
        if self.whole_texts:
            add_special_tokens = False  # lm-eval puts its prefix before them
        ids = super().tok_encode(string, add_special_tokens, **options)
        start = self.tokenizer.bos_token_id
        return ids if self.bos != "yes" or add_special_tokens is False or ids[:1] == [start] else [start, *ids]

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of prompts that are to be continued, padded to one length."""
        if self.bos != "yes":
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **options)
        ids = [self._cut(self.tok_encode(string), left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's; its prefix is the one BOS, whatever the tokenizer or `bos` would add to a text."""
        self.whole_texts = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.whole_texts = False

    def _loglikelihood_tokens(self, requests: Any, *given: Any, **named: Any) -> Any:
        """(name, context, continuation) each; the longest decides how many are asked at once."""
        room = self.max_length + 1  # the last token is scored, not read
        requests = [(name, self._cut(start, room - len(rest)), rest) for name, start, rest in requests]
        longest = min(max((len(start) + len(rest) for _, start, rest in requests), default=1), room)
        fit = LOGITS_BYTES // (4 * self.vocabulary * longest)
        self.rows = max(1, min(self.most, fit))
        self.told = Steps(self.say, "prompts", 0 if self.whole_texts else len(requests))
        try:
            return super()._loglikelihood_tokens(requests, *given, **named)
        finally:
            self.rows = self.most

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's."""
        self.told = Steps(self.say, "prompts", len(requests))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _cut(self, ids: list[int], room: int | None) -> list[int]:
        """The end of a prompt that is too long, and still a BOS before it where `yes` promises one."""
        if (
            room is None
            or len(ids) <= room
            or self.bos != "yes"
            or ids[:1] != [self.tokenizer.bos_token_id]
            or room < 1
        ):
            return ids
        return [ids[0], *ids[len(ids) - room + 1 :]]

    def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
        self._count(inps[:, 0])
        return super()._model_call(inps, **options)

    def _model_generate(self, context: torch.Tensor, **options: Any) -> torch.Tensor:
        first = options["attention_mask"].argmax(dim=1, keepdim=True)
        self._count(context.gather(1, first)[:, 0])
        return super()._model_generate(context, **options)

    def _count(self, firsts: torch.Tensor) -> None:
        self.asked += len(firsts)
        self.told(len(firsts))
        self.began += (
            int((firsts == self.tokenizer.bos_token_id).sum()) if self.tokenizer.bos_token_id is not None else 0
        )
