"""Sizes as people write them."""

from affinequant.errors import AffineQuantError


def parse_bytes(text: str, *, flag: str) -> int | None:
    """`22GB`, `512MB`, `1.5GiB` to bytes (GB and GiB both mean 2**30); None for an empty string."""
    if not text:
        return None
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(number[-1:])
    try:
        size = float(number[:-1] if unit else number) * (unit or 1)
    except ValueError:
        size = -1.0
    if not 0 < size < float("inf"):
        raise AffineQuantError(f"{text!r} is not a size", flag, "write it like 22GB or 512MB")
    return int(size)
