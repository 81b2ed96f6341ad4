"""The report of one run: a self-contained HTML page, and a short table for the terminal.

The page loads nothing from anywhere: style and figures are inline and there is no script. Every
number in it comes from ``summary.json`` and is kept unrounded in the page's ``<data>`` elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulation import figures, wording
from simulation.drawing import Picture
from simulation.record import Run, StagePart, Summary, load_run, parse_summary

REPORT_NAME = "report.html"


def page(template: str, **context: Any) -> str:
    """Render one of ``simulation/templates``; all text is escaped, figures are trusted markup."""
    environment = Environment(
        loader=PackageLoader("simulation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["words"] = wording
    environment.filters["svg"] = lambda picture: Markup(picture.svg)
    return environment.get_template(template).render(**context)


def _kept(*pictures: Picture | None) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]


def _pictures(summary: Summary) -> dict[str, list[Picture]]:
    """The figures of each section; those whose part did not run are left out."""
    sft = summary.alignment.sft or StagePart()
    dpo = summary.alignment.dpo or StagePart()
    return {
        "quality": _kept(
            figures.stages(summary, "bits_per_char"),
            figures.stages(summary, "perplexity"),
            figures.by_round(summary, "perplexity"),
            figures.by_round(summary, "bits_per_char"),
        ),
        "privacy": _kept(figures.spent(summary)),
        "alignment": _kept(
            figures.training(
                "Supervised fine-tuning", {"loss": sft.loss}, "Training loss; lower is better."
            ),
            figures.training(
                "Direct preference optimisation",
                {"loss": dpo.loss, "margin": dpo.margin},
                "Margin: by how much more the good answer gained than the bad one.",
            ),
            figures.instructions(summary),
        ),
        "rounds": _kept(figures.traffic(summary), figures.discrepancy(summary)),
    }


def render(run: Run) -> str:
    """The report of ``run`` as one HTML document."""
    return page(
        "report.html.jinja",
        run=run,
        summary=run.summary,
        pooled=run.pooled,
        reading=wording.reading(run),
        change=wording.mean_change(run.summary),
        largest=max((h.epsilon for h in run.summary.hospitals.values() if h.epsilon), default=None),
        over=wording.over_budget(run.summary),
        pictures=_pictures(run.summary),
        stages=run.summary.stages_measured(),
        stage_names=figures.STAGE_NAMES,
    )


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a finished run's folder and return its path.

    Raises
    ------
    RunRecordError
        When ``summary.json`` or ``config.yaml`` is missing or not what a finished run writes.
    """
    path = run_folder / REPORT_NAME
    path.write_text(render(load_run(run_folder)), encoding="utf-8")
    return path


def print_summary(summary: Mapping[str, Any] | Summary, console: Console) -> None:
    """Print one row a hospital: perplexity of each stage, and privacy loss of its budget.

    Raises
    ------
    RunRecordError
        When ``summary`` lacks what the table must state.
    """
    facts = parse_summary(summary)
    stages = facts.stages_measured()
    rounds = wording.count(len(facts.rounds), "round")
    table = Table(
        title=f"{facts.model.name} · {facts.strategy} · {rounds}",
        caption="perplexity on held-out notes (lower is better)",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("hospital", overflow="fold")
    for stage in stages:
        table.add_column(figures.STAGE_NAMES[stage], justify="right")
    table.add_column("ε spent", justify="right")
    sent = {name: facts.sent_a_round(name) for name in facts.hospitals}
    if any(sent.values()):
        table.add_column("sent a round", justify="right")
    budget = wording.epsilon(facts.privacy.epsilon_budget)
    over = wording.over_budget(facts)
    for name, hospital in facts.hospitals.items():
        best = hospital.perplexity.of("merged")
        base = hospital.perplexity.of("base")
        cells = [Text(wording.number(hospital.perplexity.of(stage))) for stage in stages]
        if "merged" in stages and best is not None and base is not None:
            cells[stages.index("merged")].stylize("green" if best < base else "red")
        loss = f"{wording.epsilon(hospital.epsilon)} of {budget}"
        spent = Text(loss if facts.privacy.enabled else "no privacy")
        if name in over or not facts.privacy.enabled:
            spent.stylize("bold red")
        bytes_up = [Text(wording.size(sent[name]))] if any(sent.values()) else []
        table.add_row(Text(name), *cells, spent, *bytes_up)
    console.print(table)
    instructions = facts.alignment.instructions
    if "aligned" in instructions and "merged" in instructions:
        before, after = instructions["merged"], instructions["aligned"]
        console.print(
            f"held-out instructions: loss {wording.fine(before.loss)} → "
            f"{wording.fine(after.loss)}, good answer preferred "
            f"{wording.percent(before.preference_accuracy)} → "
            f"{wording.percent(after.preference_accuracy)}",
            highlight=False,
        )
    memory = None if facts.peak_rss_mb is None else facts.peak_rss_mb * 1e6
    console.print(
        f"time {wording.duration(facts.seconds)} · peak memory {wording.size(memory)}",
        highlight=False,
        style="dim",
    )
