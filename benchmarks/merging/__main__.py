"""What merging costs and what it keeps: ``python -m benchmarks.merging [--quick]``.

Cost: eight hospitals' adapters become one, ours against PEFT and mergekit. Quality: whole
federations on real notes, with and without noise; finished ones are kept in a file, so the full
measurement (many hours) can be interrupted and continued, and prints what there is with ``--show``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.merging import cost, quality, shares, table
from benchmarks.merging.departments import NOTES

RESULTS = Path(__file__).with_name("quality.jsonl")
FIGURE = Path(__file__).with_name("quality.png")
PAGE = Path(__file__).with_name("quality.md")
_PAGE = """# What merging keeps

Written by `python -m benchmarks.merging quality` from `quality.jsonl` beside it; how it was
measured and what it means: [docs/merging.md](../../docs/merging.md#measured).
"""


def main() -> None:
    """Measure, print the tables, draw the figure, and write figures where asked."""
    options = _options()
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # nothing is cut off in a file
    found: dict[str, float] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        if options.part in ("all", "cost"):
            found |= cost.measure(options.quick, progress)
            progress.console.print(cost.table(found))
        if options.part in ("all", "quality"):
            if NOTES.exists() or options.show:
                found |= _quality(options, progress)
            else:
                console.print("quality: skipped, the notes of the MTSamples are not there")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def _quality(options: argparse.Namespace, progress: Progress) -> dict[str, float]:
    if options.quick:
        wanted = [quality.Cell(4, "fedsvd", epsilon, 0, quality.QUICK) for epsilon in (None, 8.0)]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "quality.jsonl"
            results = quality.measure(wanted, file, options.jobs, progress)
    elif options.show:
        results = _results()
    else:
        wanted = [
            cell
            for cell in quality.cells(quality.FULL, options.hospitals, options.seeds)
            if not options.arms or cell.arm in options.arms
        ]
        quality.measure(wanted, RESULTS, options.jobs, progress)
        results = _results()
    found: dict[str, float] = {}
    page = [_PAGE]
    for hospitals in sorted({r.cell.hospitals for r in results}):
        arms = shares.rows(results, hospitals)
        title = f"{hospitals} hospitals"
        for view, rows in (
            (table.gains(title), arms),
            (table.differences(f"{title}, against the default"), arms),
            (
                table.gains(f"{title}, the last round merged by"),
                shares.rules(results, hospitals),
            ),
        ):
            if any(map(view.cell, rows)):
                progress.console.print(table.of(rows, view))
                page.append(table.markdown(rows, view))
        found |= table.figures(arms, hospitals)
    if not options.quick:
        table.draw(results, FIGURE)
        PAGE.write_text("\n".join(page), encoding="utf-8")
    return found


def _results() -> list[quality.Result]:
    """All there is at full scale: a part alone would replace the page."""
    return [r for r in quality.current(RESULTS) if r.cell.scale == quality.FULL]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merging", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("part", nargs="?", choices=["all", "cost", "quality"], default="all")
    parser.add_argument("--quick", action="store_true", help="under 10 minutes; keeps nothing")
    parser.add_argument(
        "--show", action="store_true", help="print what was measured, measure no more"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (2)")
    parser.add_argument("--hospitals", type=int, nargs="+", default=[4, 8], metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(quality.SEEDS), metavar="N")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these rows of the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
