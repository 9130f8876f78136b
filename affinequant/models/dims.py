"""Sizes of a network, read from its config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from affinequant.errors import PREFLIGHT, AffineQuantError

Width = Literal[
    "hidden",
    "mlp",
    "query",
    "value",
    "expert",
    "shared",
    "gated_query",
    "delta",
    "delta_head",
    "delta_qkv",
    "delta_qkvz",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """Sizes read from a config.json. `query` and `value` are the widths of all query heads and all KV heads."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 0
    """In a layer of experts, how many."""
    routed: int = 0
    """To how many of them each token goes."""
    expert: int = 0
    """The width of one of them; `mlp` is that of blocks without."""
    shared: int = 0
    """The width of the one that every token goes through, where there is one."""
    delta_heads: int = 0
    """In a gated-delta layer, how many heads of values; `delta_head` is the width of one."""
    delta_head: int = 0
    delta_key_heads: int = 0
    """Its heads of keys, and again of queries; `delta_key_head` is the width of one."""
    delta_key_head: int = 0
    kinds: tuple[tuple[str, ...], ...] = ()
    """By block, the kinds of layer that it is made of; empty where every block has all that its family has."""
    biases: tuple[str, ...] = ()
    """The flags of the config by which linears have biases, those that are set."""

    @property
    def query(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head_dim

    @property
    def value(self) -> int:
        """Features of all KV heads."""
        return self.kv_heads * self.head_dim

    @property
    def _dense(self) -> bool:
        return not self.experts or any("mlp" in kinds for kinds in self.kinds)

    @property
    def active(self) -> int:
        """Features between up and down that a token passes, where blocks differ the most: of the experts that it goes to."""
        return max(self.mlp if self._dense else 0, self.routed * self.expert + self.shared)

    @property
    def widest(self) -> int:
        """Inputs of the widest linear."""
        return max(self.hidden, self.query, self.delta, self.expert, self.shared, self.mlp if self._dense else 0)

    @property
    def idle(self) -> int:
        """Weights of a layer of experts that a token does not meet."""
        return 3 * self.hidden * self.expert * (self.experts - self.routed)

    @property
    def gated_query(self) -> int:
        """Features of all query heads, each with the gate of its output."""
        return 2 * self.query

    @property
    def delta(self) -> int:
        """Features of all heads of values of a gated-delta layer."""
        return self.delta_heads * self.delta_head

    @property
    def delta_qkv(self) -> int:
        """Its queries, keys and values."""
        return 2 * self.delta_key_heads * self.delta_key_head + self.delta

    @property
    def delta_qkvz(self) -> int:
        """These and the gates of what its heads give, in whichever order."""
        return self.delta_qkv + self.delta


def read_size(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A size by the key that config.json has it under.

    Raises:
        AffineQuantError: it is missing or impossible (exit 3).
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AffineQuantError(
            f"{key} = {value!r}",
            where,
            f"config.json must give {key} as a positive whole number",
            exit_code=PREFLIGHT,
        )
    return value


def read_dims(config: Mapping[str, Any], where: str) -> Dims:
    """The sizes of a decoder whose config.json calls them as Llama's does.

    Raises:
        AffineQuantError: a size that is missing or impossible (exit 3).
    """

    def size(key: str, default: int | None = None) -> int:
        return read_size(config, key, where, default)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    dims = Dims(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        mlp=size("intermediate_size"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
    if heads % dims.kv_heads:
        raise AffineQuantError(
            f"{heads} query heads cannot share {dims.kv_heads} KV heads",
            where,
            "correct config.json",
            exit_code=PREFLIGHT,
        )
    return dims
