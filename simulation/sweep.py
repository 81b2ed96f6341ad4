"""Several runs and one report on what differs: the price of privacy, and of federation.

Every combination of the given choices is run. Unless ``evaluation.pooled_reference=false``, all
notes are pooled at one site without privacy, too, and trained in each of these ways: what
centralising would have given.
"""

from __future__ import annotations

import re
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
    "privacy", "privacy.enabled", "privacy.epsilon", "privacy.delta", "hospitals",
    "hospitals.layout",
    "federation.min_hospitals", "alignment", "alignment.enabled",
)  # fmt: skip


_NOT_TRAINING = {"alignment", "evaluation", "compute", "runs"}


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
    jobs = [*jobs, *_pooled_references(jobs)]
    if len(jobs) < 2:
        raise ConfigError("--multirun: a single run has nothing to be compared with; leave it out")
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


def _pooled_references(jobs: Sequence[list[str]]) -> list[list[str]]:
    """The extra jobs, where the sweep asks for them and has none of its own.

    One for every way in which the jobs train, whatever they merge by and however private they are:
    the price of federation is not to hold that of fewer rounds.
    """
    settings = [load("simulate", job, RunSettings) for job in jobs]
    wanted = settings[0].evaluation.pooled_reference
    if not wanted or any(s.hospitals.layout == "pooled" for s in settings):
        return []
    chosen = settings[0].strategy
    strategy = create(chosen.name, chosen.parameters)
    merge: list[str] | None = [o for o in jobs[0] if _is_strategy(o)]
    if "one" not in strategy.declared.keeps or strategy.statistics:  # which only leave noised
        merge = None
    found: dict[str, list[str]] = {}  # by what it comes to
    for job, own in zip(jobs, settings, strict=True):
        kept = [o for o in job if o.partition("=")[0] not in _REPLACED and not _is_strategy(o)]
        mean = "ffa" if own.adapter.train == "core" else "product_mean"
        merged = [f"strategy={mean}"] if merge is None else merge
        extra = [*kept, *merged, "hospitals=pooled", "privacy=none", "alignment=none"]
        trains = load("simulate", extra, RunSettings).model_dump_json(exclude=_NOT_TRAINING)
        found.setdefault(trains, extra)
    return list(found.values())


def _is_strategy(override: str) -> bool:
    return override.partition("=")[0].split(".")[0] == "strategy"


def _label(job: Sequence[str]) -> str:
    parts = [o.replace("=", "-") for o in job if not o.startswith("runs=")]
    cleaned = re.sub(r"[^A-Za-z0-9_.-]", "-", "_".join(parts))  # the run's name in plans
    return cleaned[:60] or "default"
