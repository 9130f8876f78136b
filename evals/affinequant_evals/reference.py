"""What a model is compared with token by token: the baseline beside it in memory, or what the baseline left on disk."""

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant_evals.logits import Piece, open_logits, weigh
from affinequant_evals.windows import Windows

Found = dict[str, Float64[Tensor, " rows"]]
"""Of each token of a piece: `kl`, the divergence from the reference in nats; `agreement`, 1 where both hold the same token
most likely; `flips`, 1 where exactly one of them is right in that; and what else a reference knows."""
Compare = Callable[[range, Piece], Found]
"""Of these places of a window, and what the model says there."""
Record = Callable[[Piece, Tensor], None]
"""A piece and its probabilities, which may be overwritten."""
K = 128
"""Largest logits of a token that are kept."""
DRAWN = 32
"""Other tokens that are drawn for each token, by their probability. On SmolLM2 at W4A4 the 128 largest hold 93 % of it, and
with all others as one the divergence comes out 11 % too low (256: 7 %, 1024: 3 %); so drawn, it is right on average."""
_FIELDS = {"ids": "<i4", "logits": "<f4", "lse": "<f8", "loss": "<f8", "top": "<i4"}
"""Files of a kept pass and the type of their numbers: k and `DRAWN` a token of the first two. The logits are not rounded,
for a model that is compared with itself must be found the same."""
_DONE = "done"
_DISK_SHARE = 0.9
"""Of the disk that is free, at most so much is used."""
_RESOLVED = 1e-7
"""Probabilities that are found as 1 less others are not known better."""


class Reference(Protocol):
    """What a model is compared with."""

    @property
    def content(self) -> Mapping[str, Any]:
        """Hashes that tell the baseline from another; nothing where no score is kept."""
        ...

    @property
    def about(self) -> Mapping[str, Any]:
        """How, as it stands in the results."""
        ...

    def open(self, windows: Windows) -> Callable[[int], Compare]:
        """Gives for each window's number what compares with it.

        Raises:
            AffineQuantError: nothing is known of this text.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """The baseline in memory: it reads each window beside the model, and whole distributions are compared.

    Attributes:
        load: gives the model, the same each time.
        losses: its own losses on texts that are done, summed over each window's tokens, by `Windows.key`.
    """

    load: Callable[[], Any]
    content: Mapping[str, Any] = field(default_factory=dict)
    losses: dict[str, Float64[Tensor, " windows"]] = field(default_factory=dict)

    @property
    def about(self) -> Mapping[str, Any]:
        """How, as it stands in the results."""
        return {"reference": "live"}

    def open(self, windows: Windows) -> Callable[[int], Compare]:
        """Gives for each window's number what compares with it; its `reference` is the baseline's own loss."""
        logits = open_logits(self.load(), windows.ids[0])

        def window(index: int) -> Compare:
            piece = logits.read(windows.ids[index])
            return lambda places, mine: _apart(piece(slice(places.start, places.stop)), mine)

        return window


def _apart(logits: Float[Tensor, "rows vocabulary"], mine: Piece) -> Found:
    """The reference's logits are overwritten.

    Where two models give the same logits every term is 0 and not only nearly so.
    """
    theirs, likely = weigh(logits, mine.targets)
    found = _tops(theirs.top, mine) | {"reference": theirs.loss}
    apart = logits.sub_(mine.logits).mul_(likely).sum(-1).double()
    return found | {"kl": apart - theirs.lse + mine.lse}


def _tops(top: Int64[Tensor, " rows"], mine: Piece) -> Found:
    other = mine.top
    flipped = (top == mine.targets) != (other == mine.targets)
    return {"agreement": (top == other).double(), "flips": flipped.double()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The baseline's own pass over texts, in a folder: of each token its k largest logits, those of some tokens that are
    drawn from all others by their probability, the log-sum-exp of all, its loss and its most likely token.

    The k largest have their part in the divergence exactly, the others theirs as the drawn ones estimate it: without bias,
    and where two models agree with no error.
    """

    folder: Path
    k: int = K
    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> Mapping[str, Any]:
        """How, as it stands in the results."""
        return {"reference": "kept", "top_k": self.k, "drawn": DRAWN}

    def holds(self, windows: Windows) -> bool:
        """Whether the pass over this text is there as a whole."""
        return (self._place(windows) / _DONE).is_file()

    def bytes_for(self, texts: Sequence[Windows]) -> int:
        """What those of the texts take that are not there yet."""
        return sum(sum(one.counts) for one in texts if not self.holds(one)) * (8 * (self.k + DRAWN) + 20)

    @contextmanager
    def writing(self, windows: Windows) -> Iterator[Record]:
        """Takes a pass over this text, piece by piece in order; it is there once that has ended without an error."""
        place = self._place(windows)
        place.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = {name: stack.enter_context((place / name).open("wb")) for name in _FIELDS}
            yield partial(_append, files, self.k, torch.Generator().manual_seed(0))
        (place / _DONE).touch()

    def losses(self, windows: Windows) -> Float64[Tensor, " windows"] | None:
        """The baseline's losses, summed over each window's tokens; None where this text is not there."""
        if not self.holds(windows):
            return None
        whole = _read(self._place(windows), slice(sum(windows.counts)), sum(windows.counts), ("loss",))["loss"][:, 0]
        return torch.stack([part.sum() for part in whole.split(list(windows.counts))])

    def open(self, windows: Windows) -> Callable[[int], Compare]:
        """Gives for each window's number what compares with it; its `outside` is the baseline's probability of all tokens
        but the k, and `at_least` a lower bound of the divergence, in which those count as one.

        Raises:
            AffineQuantError: the pass over this text is not there as a whole.
        """
        if not self.holds(windows):
            raise AffineQuantError("the baseline did not get through this text", str(self.folder), "see its own row")
        place, ends = self._place(windows), list(itertools.accumulate(windows.counts, initial=0))

        def window(index: int) -> Compare:
            rows, first = _read(place, slice(ends[index], ends[index + 1]), ends[-1]), windows.places(index).start

            def compare(places: range, mine: Piece) -> Found:
                chosen = slice(places.start - first, places.stop - first)
                return _apart_kept({name: part[chosen].to(mine.lse.device) for name, part in rows.items()}, mine)

            return compare

        return window

    def _place(self, windows: Windows) -> Path:
        return self.folder / f"{windows.key}-{self.k}"


def _append(
    files: Mapping[str, IO[bytes]],
    k: int,
    draws: torch.Generator,
    piece: Piece,
    likely: Float[Tensor, "rows vocabulary"],
) -> None:
    largest = piece.logits.topk(min(k, likely.shape[-1])).indices
    sums = likely.scatter_(-1, largest, 0).cumsum(-1)
    # Evenly spaced behind one random start: each token as often as is likely, on average.
    places = torch.rand((len(sums), 1), generator=draws) + torch.arange(DRAWN)
    drawn = torch.searchsorted(sums, places.to(sums.device) / DRAWN * sums[:, -1:], right=True)
    ids = torch.cat([largest, drawn.clamp_(max=sums.shape[-1] - 1)], dim=-1)
    columns = {"ids": ids, "logits": piece.logits.gather(-1, ids)}
    for name, column in (columns | {"lse": piece.lse, "loss": piece.loss, "top": piece.top}).items():
        files[name].write(column.cpu().numpy().astype(_FIELDS[name]).tobytes())


def _read(place: Path, rows: slice, total: int, names: Iterable[str] = tuple(_FIELDS)) -> dict[str, Tensor]:
    """Rows of files of `total` rows, mapped and no more of them than that: memory does not grow with the text."""
    start, count, found = rows.start or 0, rows.stop - (rows.start or 0), {}
    for name in names:
        kind, size = numpy.dtype(_FIELDS[name]), (place / name).stat().st_size // total
        mapped = numpy.memmap(place / name, kind, "r", start * size, (count, size // kind.itemsize))
        found[name] = torch.from_numpy(numpy.array(mapped))
    return found


def _apart_kept(theirs: Mapping[str, Tensor], mine: Piece) -> Found:
    got = mine.logits.gather(-1, theirs["ids"].long()).double() - mine.lse[:, None]
    wanted = theirs["logits"].double() - theirs["lse"]
    apart, k = wanted - got, wanted.shape[-1] - DRAWN
    likely = wanted[:, :k].exp()
    largest = (likely * apart[:, :k]).sum(-1)
    outside, others = ((1 - part.sum(-1)).clamp(min=_RESOLVED) for part in (likely, got[:, :k].exp()))
    return _tops(theirs["top"][:, 0].long(), mine) | {
        "kl": largest + outside * apart[:, k:].mean(-1),
        "at_least": largest + outside * (outside / others).log(),
        "outside": outside,
    }


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to start what would fill the disk.

    Raises:
        AffineQuantError: `needed` bytes and some to spare are not free there (exit 3).
    """
    free = shutil.disk_usage(folder).free
    if needed > _DISK_SHARE * free:
        raise AffineQuantError(
            f"the baseline's next-token distributions take {needed / 1e9:.1f} GB on disk, {free / 1e9:.1f} GB are free",
            str(folder),
            "set TMPDIR to a folder with more room, use fewer --windows, or --no-kl",
            exit_code=PREFLIGHT,
        )
