"""Peak memory of this process and everything it started."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil

_EVERY_S = 0.5
_NEWBORN_S = 0.1  # so long a child may still show its parent's pages, until it runs its own program


class PeakMemory:
    """Context manager; ``peak_mb`` is the largest sum of resident set sizes seen.

    Pages that processes share are counted once for each, so this is an upper bound.
    """

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        root = psutil.Process()
        while True:
            total = 0
            born = time.time() - _NEWBORN_S
            for process in (root, *root.children(recursive=True)):
                try:
                    if process is root or process.create_time() < born:
                        total += process.memory_info().rss
                except psutil.Error:  # it ended meanwhile
                    continue
            self.peak_mb = max(self.peak_mb, total / 1e6)
            if self._done.wait(_EVERY_S):
                return
