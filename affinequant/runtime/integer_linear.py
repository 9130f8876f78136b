"""A linear on integers, as every run time of ours uses it: in transformers and in vLLM alike."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from affinequant_kernels import Weight, online_linear, prepare_weight, slice_columns
from affinequant_kernels.ops import WEIGHT_ONLY, warm
from jaxtyping import Float, Int8
from torch import Tensor, nn

from affinequant.errors import AffineQuantError
from affinequant.recipe.scheme import NumberFormat

T = TypeVar("T")


def check_engine() -> None:
    """Before anything long: raise AffineQuantError where AFFQ_ENGINE asks for what cannot be."""
    from affinequant_kernels.cpu import engines

    if engines.overridden():
        _followed(lambda: [engines.choose(m, 8, False) for m in (1, 16, 256)])


def engines_report() -> dict[str, dict[str, Any]]:
    """`affinequant_kernels.cpu.engines.report()`. Raises AffineQuantError where AFFQ_ENGINE asks for what cannot be."""
    from affinequant_kernels.cpu import engines

    return _followed(engines.report)


def _followed(act: Callable[[], T]) -> T:
    try:
        return act()
    except ValueError as problem:
        raise AffineQuantError(str(problem), "AFFQ_ENGINE", "unset it, or name another") from None


class IntegerLinear(nn.Module):
    """y = (x P) W^T + b with W kept as integers, and x P quantised, by tokens or groups of them, where the scheme says so.

    Args:
        codes: signed weight codes; value = (code - zero) * scale.
        matrices: those of P, in the order in which they act (`transforms.online.in_order`); empty for none.
        activation: the grid of a token, or of each group of its features; None leaves activations as they are.
        clip: ratio by which a token's range is narrowed.
        dtype: the type that x will have. The matrices are rounded to it once instead of at every call; later
            `.to(dtype)` rounds the given ones again.
        slices: into how many equal parts x is cut, each of them transformed and quantised by itself.

    Raises:
        ValueError: codes, scales or zeros that do not fit each other, or slices that cut a group of weights or activations.
    """

    def __init__(
        self,
        codes: Int8[Tensor, "d_out d_in"],
        scale: Float[Tensor, "d_out groups"],
        zero: Int8[Tensor, "d_out groups"] | None,
        bias: Float[Tensor, " d_out"] | None,
        *,
        bits: int,
        activation: NumberFormat | None,
        clip: float,
        matrices: Sequence[Tensor] = (),
        slices: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.bits, self.activation, self.clip = bits, activation, clip
        group, width = activation.group_size if activation else None, self.in_features // slices
        # The kernels have no narrower layout than that of 4 bits, which holds the codes of fewer.
        weight = prepare_weight(codes, scale, zero, bits=max(bits, 4), act_group=group or 0)
        self.parts = nn.ModuleList(
            _Part(
                weight if slices == 1 else slice_columns(weight, self.in_features, width * i, width * (i + 1)),
                [_slice(matrix, i, slices) for matrix in matrices],
                dtype,
            )
            for i in range(slices)
        )
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Float[Tensor, "*batch d_in"], bias: Tensor | None = None) -> Float[Tensor, "*batch d_out"]:
        """The product in the dtype of x, with `bias` in place of its own where it is given; accumulators are exact, the
        scales act in float32."""
        bias = self._buffers["bias"] if bias is None else bias
        if len(self.parts) == 1:
            return self._product(x, 0, bias, x.dtype)
        pieces = x.chunk(len(self.parts), -1)
        total = self._product(pieces[0], 0, bias, torch.float32)
        for index in range(1, len(pieces)):
            total = total + self._product(pieces[index], index, None, torch.float32)
        return total.to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and formats, for print(model)."""
        bits = self.activation.bits if self.activation else WEIGHT_ONLY
        bits = f"{bits}-ag{self.activation.group_size}" if self.activation and self.activation.group_size else bits
        slices = f", slices={len(self.parts)}" if len(self.parts) > 1 else ""
        return f"{self.in_features}, {self.out_features}, w{self.bits}a{bits}, clip={self.clip:.4g}{slices}"

    def _product(self, x: Tensor, index: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        part: _Part = self.parts[index]  # pyright: ignore[reportAssignmentType]
        settings = self._settings() | {"bias": bias, "out_dtype": dtype}
        return online_linear(x, part.rounded, part.weight(), clip=self.clip, **settings)

    def _settings(self) -> dict[str, Any]:
        return {
            "act_bits": self.activation.bits if self.activation else WEIGHT_ONLY,
            "act_symmetric": self.activation is None or self.activation.symmetric,
        }

    def warm(self, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        """On a GPU: compile what `forward` of an x of this type can meet, whatever the number of tokens."""
        bias, whole = self._buffers["bias"] if bias is None else bias, len(self.parts) == 1
        for index, part in enumerate(self.parts):
            assert isinstance(part, _Part)
            out = dtype if whole else torch.float32
            width = self.in_features // len(self.parts)
            first = bias if index == 0 else None
            warm(width, dtype, part.rounded, part.weight(), bias=first, out_dtype=out, **self._settings())


def warmed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, if it is a linear on integers ready for any number of tokens of this type (`IntegerLinear.warm`)."""
    if isinstance(module, IntegerLinear):
        module.warm(dtype)
    return module


class _Part(nn.Module):
    """The integers and matrices of one slice."""

    def __init__(self, weight: Weight, matrices: Sequence[Tensor], dtype: torch.dtype | None) -> None:
        super().__init__()
        for name, tensor in weight._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        self.names = [f"matrix_{index}" for index in range(len(matrices))]
        for name, matrix in zip(self.names, matrices, strict=True):
            self.register_buffer(name, matrix, persistent=False)
        self.dtype = dtype
        self._round()

    def weight(self) -> Weight:
        return Weight(*(getattr(self, name) for name in Weight._fields))

    def matrices(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.names]

    def extra_repr(self) -> str:
        return ", ".join(str(tuple(matrix.shape)) for matrix in self.matrices())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Part":
        # model.to(bfloat16) moves the numbers of the grid, but must not round them.
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep, recurse)
        if self.dtype is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._round()
        return self

    def _round(self) -> None:
        # Beside the given matrices, which a later type needs, and not a buffer, which `keep` would keep as it is.
        self.rounded = [matrix if self.dtype is None else matrix.to(self.dtype) for matrix in self.matrices()]


def _slice(matrix: Tensor, index: int, slices: int) -> Tensor:
    """What of a matrix acts on one slice: all of a factor that the slices share, a share of many blocks."""
    shared = matrix.dim() == 2 or len(matrix) == 1
    return matrix if shared else matrix.chunk(slices)[index].contiguous()
