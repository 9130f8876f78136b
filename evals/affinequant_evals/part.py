"""How far a metric is that is not done yet: noted as it goes, on disk every few seconds and when it is interrupted."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from affinequant.run.run import Run

KEEP_EVERY = 5.0
"""Seconds between two writes: what a kill can cost."""


@dataclass(slots=True)
class Part:
    """What a metric has noted. Without a run nothing is there, and nothing is kept.

    Attributes:
        run: where it is kept.
        stage: under which name.
    """

    run: "Run | None" = None
    stage: str = ""
    written: float = field(default_factory=time.monotonic, repr=False)
    waiting: dict[str, Any] | None = field(default=None, repr=False)

    def there(self) -> dict[str, Any]:
        """What was noted when it stopped: tensors and plain values; nothing where it starts from the beginning."""
        return (self.run and self.run.kept(self.stage)) or {}

    def note(self, state: Mapping[str, Any]) -> None:
        """So far it is: all that `there` shall give, in one piece. Cheap, unless the last write is long ago."""
        self.waiting = dict(state)
        if time.monotonic() - self.written >= KEEP_EVERY:
            self._write()

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Whatever stops the work inside, what was noted last is on disk."""
        try:
            yield
        except BaseException:
            self._write()
            raise

    def _write(self) -> None:
        if self.run and self.waiting is not None:
            # A full disk must not stop the measuring; torch's own writer raises RuntimeError for one.
            with contextlib.suppress(OSError, RuntimeError):
                self.run.keep(self.stage, self.waiting)
        self.waiting, self.written = None, time.monotonic()
