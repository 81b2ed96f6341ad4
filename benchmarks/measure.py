"""CPU time and peak memory of variants of one job, interleaved in one process.

Machines are shared and noisy: a ratio of CPU times of neighbours in time says more than seconds on
a wall clock. Peak memory is what the job needed above the process at rest.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from rich.progress import Progress

Job = Callable[[], None]

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h


@dataclass
class Measured:
    """Samples of one variant: CPU seconds and peak megabytes, one of each a repetition."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def ratio_to(self, other: Measured) -> tuple[float, float]:
        """Median over repetitions of the ratio of CPU times; ratio of median peaks."""
        time_ratio = statistics.median(
            a / b for a, b in zip(self.seconds, other.seconds, strict=True)
        )
        memory = statistics.median(self.megabytes) / statistics.median(other.megabytes)
        return time_ratio, memory


def interleaved(
    variants: Mapping[str, Job],
    repeats: int,
    progress: Progress,
    title: str,
    warm: bool = False,
    keep_freed: bool = False,
    in_a_row: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Measured]:
    """Run every variant once to warm up (unless ``warm``), then ``repeats`` times in turn.

    Freed memory is returned to the system, so that peaks can be told apart, which costs time where
    a job takes milliseconds: ``keep_freed`` measures those as an ordinary process runs them, and
    its peaks mean nothing. A variant that ``in_a_row`` names runs that often for one sample, which
    is the time of one run.
    """
    _set_allocator(keep_freed)
    measured = {name: Measured() for name in variants}
    first = 1 if warm else 0
    task = progress.add_task(title, total=len(variants) * (repeats + 1 - first))
    for repetition in range(first, repeats + 1):
        for name, job in variants.items():
            progress.update(task, description=f"{title}: {name}")
            gc.collect()
            rest = _reset_peak()
            began = time.process_time()
            runs = in_a_row.get(name, 1)
            for _ in range(runs):
                job()
            if repetition:
                measured[name].seconds.append((time.process_time() - began) / runs)
                measured[name].megabytes.append(max(0.1, _status("VmHWM") - rest))
            progress.advance(task)
    progress.update(task, description=title)
    return measured


def _set_allocator(keep_freed: bool) -> None:
    """Large blocks are kept, as the C library does after a while, or returned when freed."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20 if keep_freed else 64 * 2**10)
    libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20 if keep_freed else 0)


def _reset_peak() -> float:
    """Start a new peak; resident megabytes now. Linux only."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status")
