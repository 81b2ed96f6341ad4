"""Notes are trained on with privacy or without it, never both, also by processes at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from client.privacy.accountant import GaussianSteps
from client.privacy.unprotected import mark_unprotected, open_protected
from client.refusal import Reason, Refusal
from client.training import train_round
from conf.policy import SitePolicy

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]
Start = tuple[Adapter, str]

OPEN = {"required": False}
OFF = {"enabled": False, "clip_norm": 5.0, "sampling_rate": 0.5}


def test_notes_are_trained_on_with_privacy_or_without_but_not_both(
    policy: MakePolicy, plan: MakePlan, starting_point: Start, tmp_path: Path
) -> None:
    """Or the statement of the ledger would leave out what left beside it."""
    start, _ = starting_point
    private_first = policy(privacy=OPEN, ledger=tmp_path / "a.sqlite")
    train_round(plan(), start, private_first)
    with pytest.raises(Refusal) as refused:
        train_round(plan(privacy=OFF), start, private_first)
    assert refused.value.reason is Reason.LINEAGE_PRIVATE
    train_round(plan(round=2), start, private_first)  # the attempt has left no mark

    open_first = policy(privacy=OPEN, ledger=tmp_path / "b.sqlite")
    with pytest.raises(Refusal):  # nothing has left, so nothing is marked
        train_round(plan(privacy=OFF, run="unknown", base_model="0" * 64), start, open_first)
    train_round(plan(), start, open_first.model_copy(update={"ledger": tmp_path / "c.sqlite"}))
    for _ in range(2):
        train_round(plan(privacy=OFF), start, open_first)
    with pytest.raises(Refusal) as refused:
        train_round(plan(), start, open_first)
    assert refused.value.reason is Reason.LINEAGE_UNPROTECTED
    assert not open_first.ledger.exists()


def test_of_many_that_begin_at_once_with_privacy_and_without_only_one_kind_goes_on(
    policy: MakePolicy, tmp_path: Path
) -> None:
    for attempt in range(8):
        own = policy(privacy=OPEN, ledger=tmp_path / str(attempt) / "ledger.sqlite")
        own.ledger.parent.mkdir()
        together = threading.Barrier(6)

        def begin(
            private: bool, own: SitePolicy = own, together: threading.Barrier = together
        ) -> bool | None:
            together.wait()
            try:
                open_protected(own).close() if private else mark_unprotected(own)
            except Refusal:
                return None
            return private

        with ThreadPoolExecutor(6) as pool:
            went_on = set(pool.map(begin, [True, False] * 3)) - {None}
        assert len(went_on) == 1
        assert own.ledger.exists() is went_on.pop()


@pytest.mark.parametrize("elsewhere", [{}, {"site_key": "keys/site.key"}, {"anchor": "far/anchor"}])
def test_a_ledger_that_vanished_forbids_training_without_privacy_too(
    policy: MakePolicy, tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    paths = {name: tmp_path / file for name, file in elsewhere.items()}
    own = policy(privacy=OPEN, **paths)
    with open_protected(own) as ledger:
        ledger.reserve((GaussianSteps(1.0, 6.0, 1),), task="one")
    own.ledger.unlink()
    with pytest.raises(Refusal) as refused:
        mark_unprotected(own)
    assert refused.value.reason is Reason.LINEAGE_PRIVATE
