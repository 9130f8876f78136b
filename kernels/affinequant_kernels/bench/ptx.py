"""What a kernel's PTX does to the memory of each of its arguments.

Threads of a program, and programs of a launch, run in any order. Where a kernel only reads an argument or only writes it,
the order does not matter. Where it does both, some barrier has to order them, and nothing in triton's language shows
whether one does: a load and a store of the same addresses may be given to different threads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

_ADDRESS = r"%rd\d+"
_PARAM = re.compile(rf"ld\.param\.[bu]64\s+({_ADDRESS}), \[\w+_param_(\d+)\]")
_MEMORY = re.compile(r"\b(ld|st|atom|red|cp\.async)\.((?:\w+[.:]*)*)\s+(.*);")
_MOVE = re.compile(rf"^\s*(?:@!?%p\d+ )?[a-z][\w.]*\s+({_ADDRESS}),\s*(.*);")
_WIDTH = re.compile(r"(?:v(\d)\.)?[busf](\d+)$")


@dataclass(frozen=True, slots=True)
class Access:
    """One instruction on global memory."""

    arguments: frozenset[int]  # whose memory it may be, counted from 0
    reads: bool
    writes: bool  # an atomic does both
    width: int  # bytes per thread


def accesses(ptx: str) -> list[Access]:
    """Every access to global memory, in the order of the text. Raises ValueError for one of unknown origin."""
    origins: dict[str, set[int]] = defaultdict(set)
    moves: list[tuple[str, list[str]]] = []
    found: list[tuple[str, str, int]] = []
    for line in ptx.splitlines():
        memory = _MEMORY.search(line)
        if param := _PARAM.search(line):
            origins[param[1]].add(int(param[2]))
        elif memory and "global" in memory[2]:
            # cp.async names its place in shared memory first, and a number of bytes after both.
            at = re.findall(rf"\[\s*({_ADDRESS})", memory[3])[-1]
            size = _WIDTH.search(memory[2])
            count = re.search(r"0x([0-9a-f]+)", memory[3]) if memory[1] == "cp.async" else None
            width = int(count[1], 16) if count else int(size[1] or 1) * int(size[2]) // 8 if size else 0
            found.append((memory[1], at, width))
        elif not memory and (move := _MOVE.match(line)):
            moves.append((move[1], re.findall(_ADDRESS, move[2])))
    _spread(origins, moves)
    if lost := sorted({at for _, at, _ in found if not origins[at]}):
        raise ValueError(f"no argument is known to give the addresses {', '.join(lost)}")
    return [
        Access(frozenset(origins[at]), kind != "st", kind not in ("ld", "cp.async"), width) for kind, at, width in found
    ]


def _spread(origins: dict[str, set[int]], moves: list[tuple[str, list[str]]]) -> None:
    """An address comes from what any of its terms comes from; loops are followed until nothing is new."""
    changed = True
    while changed:
        changed = False
        for target, sources in moves:
            before = len(origins[target])
            origins[target].update(*(origins[source] for source in sources))
            changed |= len(origins[target]) > before


def read_and_written(ptx: str) -> list[int]:
    """Numbers of the arguments whose memory one launch both reads and writes."""
    found = accesses(ptx)
    read = {argument for access in found if access.reads for argument in access.arguments}
    return sorted(read & {argument for access in found if access.writes for argument in access.arguments})
