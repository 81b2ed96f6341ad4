"""Cutting a logical batch into micro-batches of fixed shapes.

A note is padded to the next length of a public ladder (its bucket), and every micro-batch of a
bucket has the same number of rows, filled with empty ones where notes run out. So the shape in
which a note is computed depends on that note alone. With one shape, and one thread, kernels compute
a row from that row, in one order of operations: a note's gradient is then the same bit for bit
whatever else is in the batch. With shapes that follow the batch it is not, and a hostile adapter
(factors that cancel but for rounding) can amplify the difference beyond the clipping bound.

Several threads share out the elements of a whole micro-batch, and the ends of their shares are
computed by other instructions than the rest: a note's bits then depend on its row too. So where
there are several, every note goes through the model alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tokens = Sequence[int]
Unit = Sequence[Tokens]  # a patient: token rows of the notes chosen for this step

_STEP = 16  # tokens between the lengths of the ladder, up to eight of them
_GROWTH = 8  # beyond, a length is at most 1/8 above the one before


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one bucket.

    ``ids`` (rows, tokens), ``lengths`` (rows) with 0 for an empty row; ``owners`` the unit of each
    row in order, without the empty rows at the end.
    """

    ids: Tensor
    lengths: Tensor
    owners: tuple[int, ...]


def bucket(length: int) -> int:
    """The ladder's first length that is at least ``length``: public, and at most 1/8 too long."""
    step = _STEP
    while step * _GROWTH * 2 < length:
        step *= 2
    return max(1, -(-length // step)) * step


def cut(
    units: Sequence[Unit], micro_tokens: int, max_rows: int | None = None
) -> Iterator[MicroBatch]:
    """All notes of ``units`` in micro-batches of about ``micro_tokens`` tokens, longest first.

    A bucket longer than ``micro_tokens`` gets one row a micro-batch; 0 asks for that everywhere,
    and so do several threads. No micro-batch has more than ``max_rows`` rows (a public constant;
    None: no limit).
    """
    if torch.get_num_threads() > 1:
        micro_tokens = 0
    by_bucket: dict[int, list[tuple[int, Tokens]]] = defaultdict(list)
    for owner, unit in enumerate(units):
        for note in unit:
            by_bucket[bucket(len(note))].append((owner, note))
    for tokens in sorted(by_bucket, reverse=True):
        rows = max(1, min(micro_tokens // tokens, max_rows or micro_tokens))
        notes = by_bucket[tokens]
        for start in range(0, len(notes), rows):
            yield _fixed_shape(notes[start : start + rows], rows, tokens)


def _fixed_shape(notes: Sequence[tuple[int, Tokens]], rows: int, tokens: int) -> MicroBatch:
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    lengths = torch.zeros(rows, dtype=torch.long)
    for row, (_, note) in enumerate(notes):
        ids[row, : len(note)] = torch.tensor(note, dtype=torch.long)
        lengths[row] = len(note)
    return MicroBatch(ids, lengths, tuple(owner for owner, _ in notes))
