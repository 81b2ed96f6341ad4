"""Peak memory: what this process and its children held at most, also when it is given back."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from simulation import memory
from simulation.memory import PeakMemory

MB = 1_000_000


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, so that tests need not hold memory for long."""
    monkeypatch.setattr(memory, "_EVERY_S", 0.02)


def _wait_until(seen: Callable[[], bool]) -> None:
    """Until the watcher saw it: on a busy machine one look at all processes takes long."""
    end = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < end, "never seen"
        time.sleep(0.02)


def test_a_peak_stays_known_after_it_is_over() -> None:
    gc.collect()  # what earlier tests left is not to be given back meanwhile
    held = psutil.Process().memory_info().rss / MB
    with PeakMemory() as peak:
        block = b"x" * (400 * MB)
        _wait_until(lambda: peak.peak_mb > held + 200)
        del block
        now = psutil.Process().memory_info().rss / MB
        time.sleep(0.1)
    assert peak.peak_mb > now + 200
    assert peak.peak_mb < held + 1000


def test_children_count_and_their_end_is_no_error() -> None:
    code = "import time; block = b'x' * 150_000_000; print(1, flush=True); time.sleep(60)"
    with PeakMemory() as alone:
        time.sleep(0.1)
    with PeakMemory() as peak:
        for _ in range(2):
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            assert child.stdout
            child.stdout.readline()
            _wait_until(lambda: peak.peak_mb > alone.peak_mb + 120)
            time.sleep(0.2)  # the second one is looked at too, the first being gone
            child.kill()
            child.communicate()
        time.sleep(0.1)
    assert alone.peak_mb + 120 < peak.peak_mb < alone.peak_mb + 290  # one child at a time


def test_watching_ends_with_the_block_also_after_an_error() -> None:
    def fail() -> None:
        with PeakMemory():
            raise KeyError("inside")

    before = threading.active_count()
    with pytest.raises(KeyError):
        fail()
    assert threading.active_count() == before
