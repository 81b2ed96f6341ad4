"""Planted gradients: exactly what was planted, in the real model, and nothing beside it."""

from __future__ import annotations

import pytest
import torch

from client.privacy.engine import clipped_sum
from client.privacy.per_note import trained_parameters
from simulation.audit.checks import Bench
from simulation.audit.planted import Plant
from tests.simulation.audit.conftest import make_bench


def size(gradient: dict[str, torch.Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in gradient.values())) ** 0.5


@pytest.mark.parametrize("loudness", [1, -1, 5])
def test_a_planted_note_has_one_row_of_one_layer_and_the_norm_asked_for(
    bench: Bench, loudness: int
) -> None:
    plant = Plant(bench.model, 3.0)
    row = plant.rows // 2
    with plant.open():
        gradient = clipped_sum(bench.model, [plant.unit(row, loudness)], 1e9)
    rows = [r for g in gradient.values() for r in g if r.any()]
    assert len(rows) == 1
    assert size(gradient) == pytest.approx(3.0 * abs(loudness), rel=1e-4)
    assert plant.scores(gradient, [row])[0] == pytest.approx(3.0 * loudness, rel=1e-4)


@pytest.mark.parametrize("train", ["A", "core"])
def test_what_flows_back_reaches_one_row_of_another_matrix(train: str) -> None:
    bench = make_bench(20, train)
    plant = Plant(bench.model, 3.0)
    trained = trained_parameters(bench.model)
    assert plant.rows == sum(len(p) for p in trained.values())
    for row in (0, plant.rows // 2, plant.rows - 1):
        with plant.open():
            gradient = clipped_sum(bench.model, [plant.unit(row, 2)], 1e9)
        assert gradient.keys() == trained.keys()
        assert size(gradient) == pytest.approx(6.0, rel=1e-4)
        scores = plant.scores(gradient, range(plant.rows))
        assert scores[row] == pytest.approx(6.0, rel=1e-4)
        assert max(abs(s) for i, s in enumerate(scores) if i != row) < 1e-4


def test_planted_gradients_are_orthogonal_and_every_row_is_reached(bench: Bench) -> None:
    plant = Plant(bench.model, 3.0)
    picked = [*range(0, plant.rows, 37), plant.rows - 1]
    with plant.open():
        total = clipped_sum(bench.model, [plant.unit(row) for row in picked], 1.0)
    scores = plant.scores(total, range(plant.rows))
    assert scores[picked] == pytest.approx([1.0] * len(picked), abs=1e-5)
    others = [s for row, s in enumerate(scores) if row not in picked]
    assert max(map(abs, others)) < 1e-5
    assert plant.rows == sum(len(p) for p in trained_parameters(bench.model).values())


def test_other_notes_are_left_alone_and_nothing_stays_behind(bench: Bench) -> None:
    note = [bench.notes[-1]]
    before = clipped_sum(bench.model, [note], 1.0)
    plant = Plant(bench.model, 3.0)
    with plant.open():
        inside = clipped_sum(bench.model, [note], 1.0)
        beside = clipped_sum(bench.model, [note, plant.unit(3)], 1.0)
        alone = clipped_sum(bench.model, [plant.unit(3)], 1.0)
    closed = clipped_sum(bench.model, [plant.unit(3)], 1.0)
    for name, g in before.items():
        assert torch.equal(g, inside[name])
        assert torch.allclose(beside[name], g + alone[name], atol=1e-6)
    assert plant.scores(closed, [3])[0] != pytest.approx(1.0, abs=0.1)
