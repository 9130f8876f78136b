"""What rounding a block takes of learning, and what it gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.attention import OnAttention
from affinequant.numbers.weights import LearnedRange
from affinequant.transforms import OnlineTransform
from affinequant.transforms.fold import Tensors


class Learned(Protocol):
    """What a block has learned, as rounding takes it."""

    online: dict[str, OnlineTransform]
    """By site, what acts on activations at run time."""
    on_attention: OnAttention | None
    ranges: dict[str, LearnedRange]
    """By linear, the range of its weights."""
    clips: dict[str, nn.Parameter]
    """By site, the logit of its ratio of clipping."""

    def after_rope(self) -> Tensors:
        """The rotation of queries and keys after RoPE."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A rounded block. `stored` goes to disk (codes, scales, zeros, clips, the rest); `tensors` holds the values, `clips`
    and `online` are what acts on each site's activations, and `after` is what the block then gives,
    `roundings` says by site how its linears were rounded."""

    stored: Tensors
    tensors: Mapping[str, Tensor]
    clips: Mapping[str, float]
    online: Mapping[str, Tensors]
    after: Float[Tensor, "samples tokens hidden"]
    linears: Mapping[str, Mapping[str, float]]
    roundings: Mapping[str, Mapping[str, Any]]
    events: tuple[str, ...] = ()
    routed: tuple[int, ...] = ()
    """Of a block with experts, how many tokens come to each."""
    starved: tuple[str, ...] = ()
    """The linears of experts that see fewer tokens than they have inputs: rounded on their full ranges, to nearest, but for
    those that are `drawn`. GPTQ on fewer errs more than that on other tokens (width 256, inputs whose spectrum falls as 1/i:
    1.02 to 1.11 times as much on 1/16 to 1/2 of a token for each input, 0.84 times on one, 0.58 on two; where it falls less,
    two or four are needed)."""
    drawn: tuple[str, ...] = ()
    """Those of them that read what all experts read: rounded by GPTQ on moments drawn towards those of all tokens (made up
    with loud channels and 32 experts: 0.50 to 0.77 times the error of nearest on other tokens with 16-bit activations, at most
    0.92 in any expert; with 4-bit ones, whose own rounding weighs most, 0.96 to 0.995, and at most 1.016)."""
