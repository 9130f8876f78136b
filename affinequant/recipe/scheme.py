"""Which numbers a checkpoint is made of. Pure data: nothing here touches a tensor."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from affinequant.errors import AffineQuantError, unknown_name

Granularity = Literal["channel", "group", "token", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """What a number is stored as: `bits` wide, with one scale per output channel, per group of inputs (of a channel; of a
    token where it is `dynamic`), per token, or per token and head. Its arithmetic is the Grid that `numbers.GRIDS` has for
    its `kind`.

    Per head, an asymmetric grid starts at the smallest value itself; elsewhere zero is one of its points. There a query
    sees the `kept_first` tokens of the sequence, and the `kept_latest` up to and with its own, as they are.
    """

    bits: int
    symmetric: bool
    granularity: Granularity
    group_size: int | None = None
    dynamic: bool = False
    kind: str = "int"
    kept_first: int = 0
    kept_latest: int = 0

    @property
    def code_min(self) -> int:
        """Smallest code; codes are signed whether or not the grid is symmetric."""
        return -(2 ** (self.bits - 1))

    @property
    def code_max(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    def stored(self) -> dict[str, Any]:
        """Its fields as a checkpoint declares them, without those that the first version did not know where they say what it
        did: integers, no token kept. Versions before them refuse a field that they do not know."""
        usual = {"kind": "int", "kept_first": 0, "kept_latest": 0}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}

    @property
    def has_unit(self) -> bool:
        """Whether scales are counted in a unit of the whole tensor's, which activations need to know beforehand."""
        return self.kind == "nvfp4"

    def groups(self, width: int) -> int:
        """How many scales a row of `width` inputs has."""
        return width // self.group_size if self.group_size else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Weights, activations, and keys and values in the cache. None where they stay in 16 bits."""

    name: str
    weight: NumberFormat
    activation: NumberFormat | None
    kv: NumberFormat | None = None

    @staticmethod
    def parse(text: str) -> "Scheme":
        """Read `w4a4`, `w4a16-g64`, `w4a4-g64-ag64`, `w4a8-sym`, `w4a4kv4`, ...

        Weights are asymmetric per output channel and activations asymmetric per token unless the name says `sym`;
        `gN` gives weights one scale per N inputs, `agN` activations one per token and N inputs; `w8a8` is symmetric, the
        form that engines have kernels for. Weights of 2 and 3 bits go with 16-bit activations alone. `kvN` stores keys and
        values in N bits with a scale and an offset per token and head, whatever the rest is. `nvfp4` and `mxfp4` are
        4-bit floats in blocks on both sides, with `a16` of weights alone.

        Raises:
            AffineQuantError: unknown name (with the nearest known one), bits that nothing here can store, or groups that
                no product of integers has.
        """
        if floats := re.fullmatch(r"(nvfp4|mxfp4)(a16)?", text.strip().lower()):
            return _floats(*floats.groups())
        match = re.fullmatch(_NAME, text.strip().lower())
        if match is None:
            raise unknown_name("scheme", text, SCHEMES, where="--scheme", listing="schemes")
        weight_bits, act_bits = int(match[1]), int(match[2])
        allowed = {2: (16,), 3: (16,), 4: (4, 8, 16), 8: (8, 16)}
        if act_bits not in allowed.get(weight_bits, ()):
            raise unknown_name("scheme", text, SCHEMES, where="--scheme", listing="schemes")
        kv_bits = int(match[3]) if match[3] else 16
        if kv_bits not in (4, 8, 16):
            raise AffineQuantError(
                f"scheme {text!r} asks for a KV cache in {kv_bits} bits",
                "--scheme",
                f"use kv{4 if kv_bits < 6 else 8}, or leave it out: the cache then stays in 16 bits",
            )
        group, act_group = (int(size) if size else None for size in match.group(4, 5))
        _check_groups(text, group, act_group, act_bits)
        default = "sym" if (weight_bits, act_bits) == (8, 8) else "asym"
        symmetric = (match[6] or default) == "sym"
        weight = NumberFormat(
            bits=weight_bits, symmetric=symmetric, granularity="group" if group else "channel", group_size=group
        )
        activation = (
            None
            if act_bits == 16
            else NumberFormat(
                bits=act_bits,
                symmetric=symmetric,
                granularity="group" if act_group else "token",
                group_size=act_group,
                dynamic=True,
            )
        )
        kv = None if kv_bits == 16 else NumberFormat(bits=kv_bits, symmetric=False, granularity="head", dynamic=True)
        name = f"w{weight_bits}a{act_bits}" + (f"kv{kv_bits}" if kv else "")
        name += (f"-g{group}" if group else "") + (f"-ag{act_group}" if act_group else "")
        name += f"-{match[6]}" if match[6] and match[6] != default else ""
        return Scheme(name=name, weight=weight, activation=activation, kv=kv)

    @property
    def engines_round_activations(self) -> bool:
        """Whether stock engines quantise the activations themselves: 4-bit floats, and symmetric W8A8 with one scale per
        channel and token."""
        weight, activation = self.weight, self.activation
        return (activation is not None and activation.kind != "int") or (
            activation is not None
            and activation.granularity == "token"
            and (weight.bits, activation.bits) == (8, 8)
            and (weight.symmetric, activation.symmetric) == (True, True)
            and weight.granularity == "channel"
        )

    @property
    def unclipped(self) -> bool:
        """Whether no activations are rounded, or stock engines round them, which do so over the full range."""
        return self.activation is None or self.engines_round_activations

    def bits_per_weight(self, width: int, scale_bits: int = 16) -> float:
        """Stored bits per weight of a row of `width` inputs: codes, scales (of floats 8 bits each) and zero points."""
        overhead = (scale_bits if self.weight.kind == "int" else 8) + (0 if self.weight.symmetric else self.weight.bits)
        return self.weight.bits + overhead * self.weight.groups(width) / width

    def keeping(self, latest: int) -> "Scheme":
        """The same with the latest tokens of the KV cache, and its first, kept in 16 bits; with 0 none.

        Raises:
            AffineQuantError: the cache is not quantised.
        """
        if not latest:
            return self
        if self.kv is None:
            what = f"all tokens stay in 16 bits at {self.name}, whose KV cache is not quantised"
            raise AffineQuantError(what, "--keep-tokens", "leave it out, or add kv4 to the bits, as in w4a4kv4")
        return replace(self, kv=replace(self.kv, kept_first=KEPT_FIRST, kept_latest=latest))

    def bits_per_cached(self, head_width: int, tokens: int = 0) -> float:
        """Bits per number in the KV cache: codes, and a scale and an offset of 16 bits for each head's `head_width`. With
        `tokens`, so many are cached, and those that are kept in 16 bits count as well."""
        if self.kv is None:
            return 16.0
        kept = 16 * min(self.kept_rows, tokens) / tokens if tokens else 0.0
        return self.kv.bits + 32 / head_width + kept

    @property
    def kept_rows(self) -> int:
        """How many tokens a KV cache holds in 16 bits beside the packed ones."""
        kv = self.kv
        return kv.kept_first + kv.kept_latest + GOING_BACK if kv and kv.kept_latest else 0


KEPT_FIRST = 4
"""Tokens at the beginning that are kept in 16 bits with the latest. Attention rests on the first one, which is enough on
SmolLM2; StreamingLLM (arXiv 2309.17453) found four that models need which know no token of their own for it."""
GOING_BACK = 32
"""Tokens in 16 bits beyond the latest, so that a cache can take back as many, as speculative decoding does."""


def for_linears(text: str) -> Scheme:
    """The scheme that `--set` names for some linears.

    Raises:
        AffineQuantError: unknown, or with a part for the KV cache.
    """
    try:
        scheme = Scheme.parse(text)
    except AffineQuantError as problem:
        raise AffineQuantError(problem.what, "--set", problem.fix) from None
    if scheme.kv is not None:
        what = f"{text} has a part for the KV cache, which is one for all linears"
        raise AffineQuantError(what, "--set", f"leave kv{scheme.kv.bits} out, or use it in --scheme")
    return scheme


_NAME = r"w(\d+)a(\d+)(?:kv(\d+))?(?:-g(\d+))?(?:-ag(\d+))?(?:-(sym|asym))?"


def _check_groups(text: str, weight: int | None, activation: int | None, bits: int) -> None:
    if 0 in (weight, activation):
        of = "-g" if weight == 0 else "-ag"
        raise AffineQuantError("a group of 0 inputs", "--scheme", f"use {of}32, {of}64 or {of}128, or leave it out")
    if activation and bits == 16:
        what = f"scheme {text!r} groups activations that stay in 16 bits"
        raise AffineQuantError(what, "--scheme", f"leave -ag{activation} out, or use a4 or a8")
    if activation and weight not in (None, activation):
        raise AffineQuantError(
            f"scheme {text!r} has weights in groups of {weight} and activations in groups of {activation}",
            "--scheme",
            f"use one size for both (-g{activation}-ag{activation}), or leave -g{weight} out: a scale per channel goes with all",
        )


def _floats(kind: str, weights_alone: str | None) -> Scheme:
    weight = NumberFormat(bits=4, symmetric=True, granularity="group", group_size=FLOAT_BLOCKS[kind], kind=kind)
    activation = None if weights_alone else replace(weight, dynamic=True)
    return Scheme(name=kind + (weights_alone or ""), weight=weight, activation=activation)


FLOAT_BLOCKS = {"nvfp4": 16, "mxfp4": 32}
"""Values that share a scale, by the kind of 4-bit float."""


SCHEMES: dict[str, str] = {
    "w4a4": "4-bit weights per channel, 4-bit activations per token",
    "w4a4-g64-ag64": "4-bit weights and 4-bit activations, both in groups of 64 inputs",
    "w4a4kv4": "as w4a4, with keys and values in 4 bits per token and head",
    "w4a8": "4-bit weights per channel, 8-bit activations per token",
    "w4a16": "4-bit weights per channel, 16-bit activations",
    "w4a16-g64": "4-bit weights in groups of 64, 16-bit activations",
    "w4a16-g128": "4-bit weights in groups of 128, 16-bit activations",
    "w3a16-g64": "3-bit weights in groups of 64, 16-bit activations",
    "w8a8": "8-bit symmetric weights and activations",
    "nvfp4": "4-bit floats in blocks of 16, weights and activations (nvfp4a16: weights alone)",
    "mxfp4": "4-bit floats in blocks of 32, weights and activations (mxfp4a16: weights alone)",
}
"""What `affinequant list schemes` shows and what has a flag of its own; `Scheme.parse` reads every combination."""
