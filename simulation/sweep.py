"""Several runs and one report on what differs: the price of privacy, and of federation.

Every combination of the given choices is run. Unless ``evaluation.pooled_reference=false``, one
more run pools all notes at one site without privacy: what centralising would have given.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from conf.load import ConfigError, load
from conf.schema import RunSettings
from server.run_folder import RunFolder
from simulation.comparison import print_comparison, write_comparison
from simulation.run import comparable, new_run_folder, simulate
from simulation.sites import require_hospital_field
from strategies.registry import create, require_strategy

_REPLACED = (  # what would bring back in part what the pooled reference goes without
    "privacy", "privacy.enabled", "hospitals", "hospitals.layout",
    "federation.min_hospitals", "alignment", "alignment.enabled",
)  # fmt: skip


def run_sweep(jobs: Sequence[list[str]], console: Console) -> RunFolder:
    """Run every job (a list of overrides) and write ``report.html`` over all of them.

    All configurations are checked before the first run starts. Raises ConfigError, and whatever
    ``simulation.run.simulate`` raises.
    """
    if any(override.startswith("resume=") for job in jobs for override in job):
        raise ConfigError("resume: a single run is gone on with, without --multirun")
    for job in jobs:
        settings = load("simulate", job, RunSettings)
        require_strategy(settings)
        require_hospital_field(settings)
    jobs = [*jobs, *_pooled_reference(jobs)]
    checked = [(job, load("simulate", job, RunSettings)) for job in jobs]
    sweep = new_run_folder(checked[0][1].runs, "sweep")
    folders = []
    for number, (job, settings) in enumerate(checked, start=1):
        console.rule(escape(f"run {number} of {len(checked)}: {' '.join(job)}"))
        folder = RunFolder(sweep.path / f"{number:02d}-{_label(job)}")
        simulate(comparable(settings), folder, console)
        folders.append(folder.path)
    write_comparison(folders, sweep.path)
    print_comparison(folders, console)
    console.print(f"report: [bold]{escape(str(sweep.path / 'report.html'))}[/bold]", soft_wrap=True)
    return sweep


def _pooled_reference(jobs: Sequence[list[str]]) -> list[list[str]]:
    """The extra job, where the sweep asks for one and has none of its own."""
    settings = [load("simulate", job, RunSettings) for job in jobs]
    wanted = settings[0].evaluation.pooled_reference
    if not wanted or any(s.hospitals.layout == "pooled" for s in settings):
        return []
    kept = [o for o in jobs[0] if o.partition("=")[0] not in _REPLACED]
    chosen = settings[0].strategy
    strategy = create(chosen.name, chosen.parameters)
    if "one" not in strategy.declared.keeps or strategy.statistics:  # which only leave noised
        mean = "ffa" if settings[0].adapter.train == "core" else "product_mean"
        kept = [o for o in kept if not o.startswith("strategy")] + [f"strategy={mean}"]
    return [[*kept, "hospitals=pooled", "privacy=none", "alignment=none"]]


def _label(job: Sequence[str]) -> str:
    parts = [o.replace("=", "-") for o in job if not o.startswith("runs=")]
    cleaned = "".join(c if c.isalnum() or c in "-_." else "-" for c in "_".join(parts))
    return cleaned[:60] or "default"
