"""Experts that files hold stacked, all of a layer in two tensors, by the names that each would have for itself.

So transformers 5 saves them when it is not asked for the published form, and so Qwen3.5's mixtures are published: gate above up
in `experts.gate_up_proj` [experts, 2 x width, hidden], and `experts.down_proj` [experts, hidden, width]. What is written has
them apart, as engines want quantised experts.
"""

from collections.abc import Mapping
from dataclasses import replace

from affinequant.models.family import Family
from affinequant.models.source_files import BYTES, Entry


def unstacked(entries: Mapping[str, Entry], family: Family) -> dict[str, Entry]:
    """The table of tensors with each expert's own, which are parts of the stacked ones; all others as they are."""
    names = next((layer.experts for layer in family.layers.values() if layer.experts), None)
    found = dict[str, Entry]()
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        inside = names and name.startswith(f"{family.blocks}.") and module.endswith(f".{names.module}.experts")
        parts = {"gate_up_proj": names.linears[:2], "down_proj": names.linears[2:]}.get(leaf) if names else None
        if not inside or not parts or len(entry.shape) != 3 or entry.shape[1] % len(parts):
            found[name] = entry
            continue
        count, whole, columns = entry.shape
        rows = whole // len(parts)
        for number in range(count):
            for place, linear in enumerate(parts):
                first = place * rows
                found[f"{module}.{number}.{linear}.weight"] = replace(
                    entry,
                    shape=(rows, columns),
                    start=entry.start + (number * whole + first) * columns * BYTES.get(entry.dtype, 1),
                    piece=(number, first, first + rows),
                )
    return found
