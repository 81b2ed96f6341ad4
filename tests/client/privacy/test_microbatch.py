"""Micro-batches: nothing is lost, and a note's shape depends on that note alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from client.privacy.microbatch import MicroBatch, bucket, cut

Units = list[list[list[int]]]

notes = st.lists(st.integers(1, 9), min_size=1, max_size=60)
batches = st.lists(st.lists(notes, min_size=1, max_size=3), max_size=8)


def shape_of(units: Units, wanted: tuple[int, list[int]], micro: int) -> set[tuple[int, int]]:
    """Shapes in which a given note of a given unit is computed."""
    return {
        (batch.ids.shape[0], batch.ids.shape[1])
        for batch in cut(units, micro)
        for owner, row in zip(batch.owners, rows(batch), strict=True)
        if (owner, row) == wanted
    }


def rows(batch: MicroBatch) -> list[list[int]]:
    return [batch.ids[i, : batch.lengths[i]].tolist() for i in range(len(batch.owners))]


@given(batches, st.integers(0, 300))
def test_every_note_is_there_once_with_its_owner(units: Units, micro: int) -> None:
    made = cut(units, micro)
    found = sorted(pair for b in made for pair in zip(b.owners, rows(b), strict=True))
    assert found == sorted((o, list(note)) for o, unit in enumerate(units) for note in unit)


@given(batches, notes, st.integers(0, 300))
def test_a_notes_shape_does_not_depend_on_the_others(
    units: Units, note: list[int], micro: int
) -> None:
    alone = shape_of([[note]], (0, note), micro)
    assert len(alone) == 1
    assert shape_of([*units, [note]], (len(units), note), micro) == alone


@given(batches, st.integers(0, 300))
def test_micro_batches_keep_to_the_budget_longest_first(units: Units, micro: int) -> None:
    made = list(cut(units, micro))
    for batch in made:
        rows_, tokens = batch.ids.shape
        assert rows_ == 1 or rows_ * tokens <= micro
        assert 1 <= len(batch.owners) <= rows_
        assert not batch.lengths[len(batch.owners) :].any()
    assert [b.ids.shape[1] for b in made] == sorted((b.ids.shape[1] for b in made), reverse=True)


def test_where_threads_share_the_work_every_note_goes_alone() -> None:
    units = [[[1, 2, 3]]] * 5
    assert [b.ids.shape[0] for b in cut(units, 64)] == [4, 4]
    torch.set_num_threads(2)
    try:
        assert [b.ids.shape[0] for b in cut(units, 64)] == [1] * 5
    finally:
        torch.set_num_threads(1)


@given(st.integers(1, 20_000))
def test_the_ladder_wastes_little(length: int) -> None:
    step = bucket(length)
    assert step >= max(length, 16)
    assert step - length <= max(15, length / 8)
    assert bucket(step) == step
    assert step % 16 == 0
