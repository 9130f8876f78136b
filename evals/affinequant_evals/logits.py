"""Next-token logits of a window, a piece at a time: a vocabulary of any size in a budget of memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUDGET = 512 * 2**20
"""Bytes of all tables of logits that are there at once."""
TABLES = 4
"""Those tables, each of a piece's tokens times the vocabulary in float32: the logits of two models, the probabilities of
one, and one on its way (from bfloat16, or through a cap)."""
REUSED = 30 * 2**20
"""Tables below 32 MB lie where glibc has had them before; larger ones are mapped anew each time, which on a CPU costs more
than what is computed in them (a softmax over 49,152: 62 microseconds of CPU a token against 180)."""
ROWS = 128
"""With fewer tokens than this a product with the head reads its weights too often on a CPU: what is larger than `REUSED`
then costs less."""
PROBED = 8
"""Tokens on which it is seen how a model's head can be asked."""


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are made at once."""
    row = 4 * vocabulary
    most = BUDGET // (TABLES * row)
    if device.type == "cpu":
        most = min(most, max(ROWS, REUSED // row))
    return max(most, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """A model whose logits are made a piece at a time; `piecewise` is False where they come for whole windows only."""

    model: Any
    piecewise: bool

    @property
    def rows(self) -> int:
        """Tokens whose logits are made at once."""
        return rows_at_once(self.model.config.get_text_config().vocab_size, self.model.device)

    def read(self, ids: Int64[Tensor, " tokens"]) -> Callable[[slice], Float[Tensor, "rows vocabulary"]]:
        """One pass over a window; behind it the logits at those of its places that are asked for, in float32, to be
        overwritten as one likes."""
        given = ids[None].to(self.model.device)
        if not self.piecewise:
            whole = self.model(input_ids=given, use_cache=False).logits[0]
            return lambda rows: whole[rows].float()
        output = self.model.base_model(input_ids=given, use_cache=False)
        hidden = output.last_hidden_state

        def piece(rows: slice) -> Float[Tensor, "rows vocabulary"]:
            output["last_hidden_state"] = hidden[:, rows]
            with _standing_in(self.model.base_model, output):
                return self.model(input_ids=given[:, rows], use_cache=False).logits[0].float()

        return piece


@torch.inference_mode()
def open_logits(model: "PreTrainedModel", ids: Int64[Tensor, " tokens"]) -> Logits:
    """See on a few tokens whether what a model does behind its last hidden states (a head, a scale, a cap) can be asked
    for a piece of them; one that does not pass them through its base model gives whole windows."""
    few, found = ids[:PROBED], Logits(model=model, piecewise=True)
    if model.get_output_embeddings() is None or model.base_model is model:
        return Logits(model=model, piecewise=False)
    whole = Logits(model=model, piecewise=False).read(few)(slice(None))
    pieces, middle = found.read(few), len(few) // 2
    got = torch.cat([pieces(slice(middle)), pieces(slice(middle, None))])
    return Logits(model=model, piecewise=torch.allclose(whole, got, rtol=1e-3, atol=1e-3, equal_nan=True))


@contextmanager
def _standing_in(base: Any, output: Any) -> Iterator[None]:
    """Meanwhile the base model gives this output, whatever it is asked."""
    before = base.__dict__.get("forward")  # accelerate puts one there
    base.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del base.forward
        else:
            base.forward = before


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Logits of some tokens, and what follows from them: `lse` is the logarithm of the sum of their exponentials, `loss`
    that of the token which really comes next, in nats, `top` the token that they hold most likely. All but the logits
    are differences of single logits in float64, so that what two models share cancels exactly."""

    logits: Float[Tensor, "rows vocabulary"]
    targets: Int64[Tensor, " rows"]
    lse: Float64[Tensor, " rows"]
    loss: Float64[Tensor, " rows"]

    @property
    def top(self) -> Int64[Tensor, " rows"]:
        """The most likely token."""
        return self.logits.argmax(-1)


def weigh(
    logits: Float[Tensor, "rows vocabulary"], targets: Int64[Tensor, " rows"]
) -> tuple[Piece, Float[Tensor, "rows vocabulary"]]:
    """A piece, and the probabilities that the logits give.

    The logarithm of a softmax's divisor is the largest logit less the logarithm of its probability: three passes over
    the table, two of which stay in the cache.
    """
    likely = logits.softmax(-1)
    lse = logits.amax(-1).double() - likely.amax(-1).double().log()
    said = logits.gather(-1, targets[:, None])[:, 0].double()
    return Piece(logits=logits, targets=targets, lse=lse, loss=lse - said), likely
