"""A picture of what one data lineage has spent: epsilon over time, against what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure

from client.privacy.chain import Entry
from client.privacy.ledger import reservations
from client.privacy.statement import closing

# Shape as well as colour tells the states apart.
_MARKS = {
    "COMMITTED": ("o", "#0b6e4f", "answered"),
    "BURNED": ("X", "#b3261e", "failed, charged"),
    "RESERVED": ("s", "#9a6a00", "open or interrupted, charged"),
}


def draw(file: Path, entries: Sequence[Entry], lineage: str, budget: float, delta: float) -> None:
    """Write the picture; the suffix of ``file`` (.svg, .png or .pdf) says in which format."""
    charges, ends = reservations(entries, lineage), closing(entries)
    when = [date2num(datetime.fromisoformat(e.body["at"])) for e in charges]
    spent = [float(e.body["epsilon_after"]) for e in charges]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(when, spent, drawstyle="steps-post", color="#555", linewidth=1.4, zorder=1)
    for state, (mark, colour, label) in _MARKS.items():
        of_state = [
            (t, e)
            for t, e, charge in zip(when, spent, charges, strict=True)
            if (ends[charge.seq].state if charge.seq in ends else charge.state) == state
        ]
        if of_state:
            times, values = zip(*of_state, strict=True)
            axes.scatter(times, values, marker=mark, color=colour, label=label, zorder=2)
    axes.axhline(budget, color="#222", linestyle="--", linewidth=1.2, label=f"allowed: {budget:g}")
    axes.set_ylim(0, budget * 1.08)
    locator = AutoDateLocator(minticks=3, maxticks=8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set_xlabel("time (UTC)")
    axes.set_ylabel(f"epsilon spent at delta {delta:g}")
    axes.set_title(f"{lineage}: {spent[-1] if spent else 0:.2f} of {budget:g}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
