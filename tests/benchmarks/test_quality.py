"""The matrix of federations: what each cell is, and a file that interruptions cannot spoil."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.progress import Progress

from benchmarks.merging import quality
from benchmarks.merging.quality import FULL, Cell, Result

EVERY = list(quality.cells(FULL, (4, 8), (0, 1, 2)))


@pytest.mark.parametrize("arm", sorted({cell.arm for cell in EVERY}))
def test_every_arm_has_settings_of_the_scale_and_epsilon_of_its_cell(arm: str) -> None:
    for cell in {c.epsilon: c for c in EVERY if c.arm == arm}.values():
        made = quality.settings(cell, cell.hospitals)
        assert made.privacy.enabled == (cell.epsilon is not None)
        assert cell.epsilon is None or made.privacy.epsilon == cell.epsilon
        assert made.federation.rounds == FULL.rounds
        assert made.federation.local_steps == (4 if "local steps" in arm else FULL.local_steps)
        if ", rate " in arm:
            assert made.optimizer.learning_rate == float(arm.rpartition(" ")[2])


def test_a_pooled_site_divides_by_as_many_notes_more_as_there_are_hospitals() -> None:
    def denominator(arm: str) -> int | None:
        return quality.settings(Cell(8, arm, 1.0, 0, FULL), 8).privacy.denominator

    assert denominator("pooled") == denominator("pooled, rate 14") == 8 * 43
    assert denominator("alone") == denominator("alone, rate 5") == 43


def test_a_line_that_was_cut_short_costs_no_other_line(tmp_path: Path) -> None:
    file = tmp_path / "quality.jsonl"
    whole = [
        Result(Cell(4, "fedsvd", None, seed, FULL), {"a": [1.0]}, {"a": [0.5]}, {"a": [9]}, {})
        for seed in (0, 1)
    ]
    lines = [json.dumps(asdict(one)) for one in whole]
    file.write_text(lines[0] + "\n" + lines[1][:40])
    quality._append(file, lines[1])
    assert quality.read(file) == whole
    quality._append(file, lines[0])
    assert quality.read(file) == [*whole, whole[0]]


def test_what_was_measured_under_other_settings_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default that changes leaves no figure of the old one in its place."""
    file, cell = tmp_path / "quality.jsonl", Cell(4, "dare", 8.0, 0, FULL)
    same = quality.fingerprint(cell)
    assert quality.fingerprint(replace(cell, seed=2)) == same
    assert quality.fingerprint(replace(cell, epsilon=3.0)) != same
    measured = Result(cell, {"a": [1.0]}, {"a": [0.5]}, {"a": [9]}, {}, same)
    quality._append(file, json.dumps(asdict(measured)))
    with Progress(disable=True) as progress:
        assert quality.measure([cell], file, 1, progress) == [measured]
        arms = {**quality.IN_ROUNDS, "dare": ("strategy=dare", "strategy.agreeing=mean")}
        monkeypatch.setattr(quality, "IN_ROUNDS", arms)
        quality._fingerprint.cache_clear()
        assert quality.current(file) == []
        asked: list[Cell] = []

        class Pool(ThreadPoolExecutor):
            def __init__(self, jobs: int, **_: object) -> None:
                super().__init__(jobs)

        def measured_again(cell: Cell) -> Result:
            asked.append(cell)
            return replace(measured, settings="other")

        monkeypatch.setattr(quality, "ProcessPoolExecutor", Pool)
        monkeypatch.setattr(quality, "_measured", measured_again)
        assert quality.measure([cell], file, 1, progress)[0].settings == "other"
    assert asked == [cell]
    quality._fingerprint.cache_clear()
