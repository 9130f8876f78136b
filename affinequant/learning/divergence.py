"""How far the quantised model's next-token distribution is from the full-precision one, at vocabularies of any size."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.decoder import Decoder, slices

CHUNK = 256
"""Tokens whose logits are held at once."""


def divergence(
    decoder: Decoder,
    teacher: Float[Tensor, "batch tokens hidden"],
    head: Mapping[str, Tensor],
    student: Float[Tensor, "batch tokens hidden"],
    logits: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter] = (),
) -> Float[Tensor, ""]:
    """Mean divergence, in nats per token, of the distribution that `logits` makes of the student's hidden states from
    the one that the model's own `head` makes of the teacher's. Logits are made `CHUNK` tokens at a time and their
    gradients at once, so that they are neither kept nor made again in the backward pass.

    Args:
        parameters: what `logits` depends on besides the hidden states, to be trained.
    """
    student, teacher, learns = student.flatten(0, 1), teacher.flatten(0, 1), torch.is_grad_enabled()
    total = slope = torch.zeros((), device=student.device)
    for chosen in slices(len(student), CHUNK):
        with torch.no_grad():
            wanted = decoder.logits(teacher[chosen], head).float()
        hidden = student[chosen].detach().requires_grad_(learns)
        got = logits(hidden)
        part, descent = _diverged(got.detach().float(), wanted)
        total = total + part / len(student)
        if learns:
            descent = descent.div_(len(student)).to(got.dtype)
            gradients = torch.autograd.grad(got, (hidden, *parameters), descent)
            pairs = zip((student[chosen], *parameters), gradients, strict=True)
            slope = slope + torch.stack([(value * gradient).sum() for value, gradient in pairs]).sum()
    # Zero, with the gradient of the total.
    return total + (slope - slope.detach())


@torch.no_grad()
def _diverged(
    got: Float[Tensor, "tokens vocab"], wanted: Float[Tensor, "tokens vocab"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocab"]]:
    """The sum over tokens of how far the distribution of the logits `got` is from that of `wanted`, which is overwritten,
    and its gradient in `got`.

    Written out, for tensors this large cost by the pass over them: a third of what log-softmax, divergence and their
    backwards take. The logarithm of a softmax's divisor is the largest logit less that of its probability.
    """
    likely, other = wanted.softmax(-1), got.softmax(-1)
    divisors = [logits.amax(-1) - softmax.amax(-1).log() for logits, softmax in ((wanted, likely), (got, other))]
    apart = wanted.sub_(got).mul_(likely).sum(-1) - divisors[0] + divisors[1]
    return apart.sum(), other.sub_(likely)


def stream_divergence(
    decoder: Decoder,
    student: Float[Tensor, "samples tokens hidden"],
    teacher: Float[Tensor, "samples tokens hidden"],
    head: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None = None,
) -> float:
    """Nats per token by which predictions from the hidden states `student`, behind the last block, diverge from those from
    `teacher`; one sample at a time. `own`: the student's head, where it is another."""
    mine = head if own is None else own

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, full = (part.to(decoder.device, decoder.dtype) for part in batch)
        return divergence(decoder, full, head, x, lambda hidden: decoder.logits(hidden, mine))

    return mean_loss(loss, student, teacher)


@torch.no_grad()
def mean_loss(
    loss: Callable[[tuple[Tensor, Tensor]], Tensor],
    embedded: Float[Tensor, "samples tokens hidden"],
    full: Float[Tensor, "samples tokens hidden"],
) -> float:
    """The loss of samples one by one, on average."""
    losses = [float(loss((x[None], teacher[None]))) for x, teacher in zip(embedded, full, strict=True)]
    return sum(losses) / len(losses)
