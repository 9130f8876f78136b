"""Many steps of an AL-RNN under sparse teacher forcing, with their gradient, fast.

A step of so small a network costs what calls cost, and autograd makes a dozen of them. Here two of NumPy's go forwards and
four back, in buffers that are made once, and the weights' gradient is one product over all steps.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import DTypeLike
from torch import Tensor
from torch.autograd.function import once_differentiable

from affinequant_research.alrnn.model import Floats, packed, unpacked


class Rollout:
    """The buffers for windows of one shape; a call rolls one batch of windows.

    A window is x_1 .. x_{T+1}. From z_1 on each z_t is predicted and scored as it is; where t - 1 is a multiple of `every`
    its first N entries are then replaced by x_t. No gradient goes through what was replaced. Row t - 1 of a buffer is of z_t.

    Attributes:
        entries: what is read of each z, [T + 1, M + P + 1, batch]: itself, the ReLU of its last P, 1.
        slopes: the loss's gradient with respect to that, before z was forced.
        predicted: z_2 .. z_{T+1} before they were forced, the first N, [T, N, batch].
    """

    def __init__(
        self, *, units: int, bent: int, observed: int, steps: int, batch: int, every: int, dtype: DTypeLike = np.float32
    ) -> None:
        shape = (steps + 1, units + bent + 1, batch)
        self.entries, self.slopes = np.ones(shape, dtype), np.zeros(shape, dtype)
        self.predicted = np.empty((steps, observed, batch), dtype)
        self.bent, self.calls = bent, 0
        self.forced = np.arange(steps + 1) % every == 0
        self.places = slice(observed), slice(units), slice(units - bent, units), slice(units, units + bent)
        # A view that is made once is not made two hundred times an update.
        self.reads, self.backs = ([list(one[:, part]) for part in self.places] for one in (self.entries, self.slopes))

    def __call__(self, A: Tensor, W: Tensor, h: Tensor, start: Tensor, window: Tensor) -> Float[Tensor, "T N batch"]:
        """z_2 .. z_{T+1} as they were predicted, differentiable in the weights and in the start.

        Args:
            A, W, h: as an `AlmostLinear` has them.
            start: z_1, [M, batch].
            window: x_1 .. x_{T+1}, [T + 1, N, batch].

        Raises:
            RuntimeError: in the backward pass, if another window has been rolled since.
        """
        return _Rolled.apply(self, A, W, h, start, window)  # pyright: ignore[reportReturnType]

    def forward(self, weights: Floats, start: Floats, window: Floats) -> Floats:
        """Roll; `weights` are `packed`. Returns `predicted`, which the next call overwrites."""
        self.calls += 1
        shown, states, last, bent = self.reads
        forced, entries = self.forced.tolist(), list(self.entries)
        states[0][:] = start
        for now in range(1, len(entries)):
            np.maximum(last[now - 1], 0, out=bent[now - 1])
            np.dot(weights, entries[now - 1], out=states[now])
            if forced[now]:
                self.predicted[now - 1] = shown[now]
                shown[now][:] = window[now]
        free = ~self.forced[1:]
        self.predicted[free] = self.entries[1:, self.places[0]][free]
        return self.predicted

    def backward(self, weights: Floats, gradient: Floats) -> tuple[Floats, Floats]:
        """From the gradient with respect to `predicted` those with respect to the packed weights and to the start."""
        shown, states, last, bent = self.backs
        forced, slopes = self.forced.tolist(), list(self.slopes)
        on = (self.entries[:, self.places[2]] > 0).astype(gradient.dtype)
        back = np.ascontiguousarray(weights.T)
        states[-1][:] = 0
        shown[-1][:] = gradient[-1]
        for now in range(len(slopes) - 2, -1, -1):
            np.dot(back, states[now + 1], out=slopes[now])
            np.multiply(bent[now], on[now], out=bent[now])
            np.add(last[now], bent[now], out=last[now])
            if now and forced[now]:
                shown[now][:] = gradient[now - 1]
            elif now:
                np.add(shown[now], gradient[now - 1], out=shown[now])
        made, read = self.slopes[1:, self.places[1]], self.entries[:-1]
        flat = (one.transpose(1, 0, 2).reshape(one.shape[1], -1) for one in (made, read))
        return next(flat) @ next(flat).T, states[0].copy()


class _Rolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rollout: Rollout, A: Tensor, W: Tensor, h: Tensor, start: Tensor, window: Tensor) -> Tensor:
        ctx.rollout = rollout
        ctx.weights = packed(A.detach().numpy(), W.detach().numpy(), h.detach().numpy(), rollout.bent)
        with np.errstate(all="ignore"):  # what is not finite is for `fit` to find
            predicted = rollout.forward(ctx.weights, start.detach().numpy(), window.numpy())
        ctx.call = rollout.calls
        return torch.from_numpy(predicted.copy())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rollout: Rollout = ctx.rollout
        if ctx.call != rollout.calls:
            raise RuntimeError("the rollout's buffers hold another window by now")
        with np.errstate(all="ignore"):
            weights, start = rollout.backward(ctx.weights, grads[0].contiguous().numpy())
        parts = (*unpacked(weights, rollout.bent), start)
        return (None, *map(torch.from_numpy, parts), None)
