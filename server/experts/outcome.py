"""How much a model improves over its base, in the three numbers of MediPhi (arXiv 2505.10717).

AVG      mean score over data sets
#DG      number of data sets with a gain
CVdelta  std_d(delta_d) / |mean_d delta_d|, delta_d the gain on data set d, sample std (ddof 1):
         how unevenly the gain is spread; smaller is more uniform
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """``average`` (AVG), ``improved`` (#DG) and ``variation`` (CVdelta; None where undefined)."""

    average: float
    improved: int
    variation: float | None


def outcome(base: Mapping[str, float], scores: Mapping[str, float]) -> Outcome:
    """Of a model's scores by task, against those of its base; higher scores are better.

    CVdelta is undefined for one task, and where gains and losses cancel.
    """
    gains = [scores[name] - base[name] for name in base]
    mean = statistics.fmean(gains)
    defined = len(gains) > 1 and mean != 0
    return Outcome(
        statistics.fmean(scores[name] for name in base),
        sum(gain > 0 for gain in gains),
        statistics.stdev(gains) / abs(mean) if defined else None,
    )


def outcome_table(title: str, rows: Mapping[str, Mapping[str, float]], base: str) -> Table:
    """One row for each model's scores by task, with its three numbers; ``base`` names the base."""
    tasks = list(rows[base])
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in (*tasks, "AVG", "#DG", "CVΔ"):
        table.add_column(name, justify="right")
    for model, scores in rows.items():
        found = outcome(rows[base], scores)
        spread = "" if found.variation is None else f"{found.variation:.2f}"
        numbers = ("", "") if model == base else (f"{found.improved} of {len(tasks)}", spread)
        cells = [f"{scores[task]:.3f}" for task in tasks]
        table.add_row(model, *cells, f"{found.average:.3f}", *numbers)
    return table
