"""What ledger and gate take of a round: their own CPU time over that of a whole round.

The round is a real one (``client.training.train_round``, embedded model, real notes, ledger and
anchor on disk) of about the size of the default simulation's. Solving for the noise is not part of
it: it happens once a plan, and is told apart.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import load_base
from adapters.plan import TrainingPlan, plan_round
from client import training
from client.privacy.gate import Gate
from client.privacy.ledger import Ledger
from conf.load import load
from conf.policy import PrivacyLimits, SitePolicy
from conf.schema import ModelSettings, NotesSettings, RunSettings

_NOTES = 100  # of which a quarter is in a step


def shares_of_a_round(notes: Path) -> dict[str, float]:
    """Share of a round's CPU time for ``ledger_gate``, and for ``calibration`` beside it."""
    with tempfile.TemporaryDirectory() as folder:
        policy = _policy(notes, Path(folder))
        plan, start = _task()
        spent: Counter[str] = Counter()
        watched = [
            ("calibration", training, "calibrate"),
            ("ledger_gate", Gate, "release"),
            *(("ledger_gate", Ledger, name) for name in ("reserve", "commit", "reply", "spent")),
        ]
        with ExitStack() as stack:
            for kind, owner, name in watched:
                function = getattr(owner, name)
                stack.enter_context(patch.object(owner, name, _timed(function, kind, spent)))
            began = time.process_time()
            training.train_round(plan, start, policy)
            whole = time.process_time() - began
    return {kind: seconds / whole for kind, seconds in spent.items()}


def _timed(function: Callable[..., Any], kind: str, spent: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with _clock(kind, spent):
            return function(*arguments, **named)

    return call


@contextmanager
def _clock(kind: str, spent: Counter[str]) -> Iterator[None]:
    began = time.process_time()
    yield
    spent[kind] += time.process_time() - began  # type: ignore[assignment]


def _task() -> tuple[TrainingPlan, Adapter]:
    settings = load("simulate", ["privacy.unit=note"], RunSettings)
    base = load_base(settings.model)
    shape = settings.adapter
    start = lora.initial(base.model, AdapterSpec.of(shape), 0)
    return plan_round(settings, "benchmark", 1, base.fingerprint), start


def _policy(notes: Path, folder: Path) -> SitePolicy:
    lines = notes.read_text(encoding="utf-8").splitlines(keepends=True)
    lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
    (folder / "notes.jsonl").write_text("".join(lines[:_NOTES]), encoding="utf-8")
    return SitePolicy(
        site="benchmark",
        lineage="benchmark",
        ledger=folder / "ledger.sqlite",
        anchor=folder / "anchor.json",
        notes=NotesSettings(source="jsonl", path=folder / "notes.jsonl"),
        model=ModelSettings(source="smollm2"),
        privacy=PrivacyLimits(unit="note", epsilon=8.0, delta=1e-5),
    )
