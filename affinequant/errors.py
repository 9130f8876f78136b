"""The one exception a user should ever meet, and the spelling helper that fills its `fix`."""

import difflib
import errno
from collections.abc import Iterable

USAGE, PREFLIGHT, QUALITY = 2, 3, 4


class AffineQuantError(Exception):
    """What happened, where, and what to do about it.

    `exit_code` is what the command line returns: 2 usage or recipe, 3 preflight refused, 4 quality gate failed.
    """

    def __init__(self, what: str, where: str, fix: str, *, exit_code: int = USAGE) -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  fix:   {self.fix}"


def disk_full(problem: BaseException) -> bool:
    """Whether writing failed for lack of room, or of quota; safetensors gives the system's number in its words alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(problem, OSError) and problem.errno in full) or any(
        type(problem).__name__ == "SafetensorError" and f"os error {number})" in str(problem) for number in full
    )


def unknown_name(
    kind: str, name: str, known: Iterable[str], *, where: str, listing: str | None = None
) -> AffineQuantError:
    """The error for a name that is not in a table: nearest spelling first, then how to see all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    every = f"`affinequant list {listing}` shows all" if listing else f"known: {', '.join(known)}"
    return AffineQuantError(f"unknown {kind} {name!r}", where, hint + every)
