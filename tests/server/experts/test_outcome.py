"""AVG, #DG and CVdelta reproduce the published table from its published columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from server.experts.outcome import Outcome, outcome, outcome_table

# MediPhi, arXiv 2505.10717, tables 11 and 12: the twelve data sets of CLUE+, in the paper's order.
BASE = (66.6, 28.4, 36.7, 45.9, 25.9, 41.1, 41.2, 11.2, 14.8, 42.3, 35.1, 49.3)
COLUMNS = {  # scores, then AVG, #DG, CVdelta as printed
    "MediPhi (BreadCrumbs)": (
        (66.9, 28.8, 37.9, 45.7, 26.1, 41.7, 44.5, 11.3, 29.1, 44.3, 39.7, 55.5), 39.3, 11, 1.5,
    ),
    "Clinical": (
        (69.2, 29.4, 38.1, 43.5, 26.7, 40.5, 52.1, 12.0, 34.5, 43.9, 35.8, 49.6), 39.6, 10, 2.0,
    ),
    "Guideline": (
        (70.3, 29.8, 37.6, 41.1, 25.1, 41.9, 48.9, 11.9, 28.3, 44.7, 41.0, 49.8), 39.2, 10, 1.8,
    ),
    "MediPhi, then SFT": (
        (70.6, 26.9, 42.8, 44.2, 28.8, 35.0, 60.8, 18.8, 35.0, 43.4, 54.5, 54.9), 43.0, 9, 1.4,
    ),
}  # fmt: skip


def by_task(scores: tuple[float, ...]) -> dict[str, float]:
    return {f"task {i}": score for i, score in enumerate(scores)}


@pytest.mark.parametrize("model", COLUMNS)
def test_the_published_numbers_come_out(model: str) -> None:
    scores, average, improved, variation = COLUMNS[model]
    found = outcome(by_task(BASE), by_task(scores))
    assert found.variation is not None
    assert (round(found.average, 1), found.improved) == (average, improved)
    assert round(found.variation, 1) == variation


def test_the_spread_is_the_sample_s() -> None:
    base = {"a": 0.0, "b": 0.0}
    assert outcome(base, {"a": 1.0, "b": 3.0}) == Outcome(2.0, 2, pytest.approx(2**0.5 / 2))
    assert outcome(base, {"a": -3.0, "b": -1.0}).variation == pytest.approx(2**0.5 / 2)


def test_what_has_no_spread_is_left_empty() -> None:
    assert outcome({"a": 1.0}, {"a": 2.0}).variation is None
    cancelled = outcome({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": -1.0})
    assert (cancelled.variation, cancelled.improved) == (None, 1)


def test_the_table_has_a_row_for_each_model() -> None:
    base = {"a": -2.0, "b": -1.0}
    table = outcome_table("scores", {"base": base, "merged": {"a": -1.5, "b": -1.2}}, "base")
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["base", "merged"]
    assert cells[-2] == ["", "1 of 2"]


def test_the_table_shows_the_spread_of_even_gains() -> None:
    base, merged = {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.05}
    shown = Console(record=True, width=100, quiet=False, file=io.StringIO())
    shown.print(outcome_table("", {"base": base, "merged": merged}, "base"))
    assert "0.03" in shown.export_text()
