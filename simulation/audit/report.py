"""The report of one audit: a self-contained HTML page, and a table for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.run_folder import write_atomically
from simulation import wording
from simulation.audit import figures
from simulation.audit.attack import auc_bound, tpr_bound
from simulation.audit.black_box import FPR, Membership
from simulation.audit.checks import Finding
from simulation.audit.run import Audit
from simulation.report import page

MEANING = {
    "canaries": "ε proved by canaries",
    "sensitivity": "one unit moves the sum, in C",
    "isolation": "effect of batch mates",
    "fresh noise": "noise of two rounds, correlation",
    "constant": "scale at N, N + 4 and 2N units, change",
    "noise": "noise against σC, relative error",
}


def shown(finding: Finding) -> str:
    """A measurement as people read it: a share as a percentage where it is an error."""
    if finding.check in ("constant", "noise"):
        return wording.percent(finding.measured, 2)
    return f"{finding.measured:.3g}"


def allowed(finding: Finding) -> str:
    """The limit, in the form of ``shown``."""
    if finding.check in ("constant", "noise"):
        return wording.percent(finding.limit, 2)
    return f"{finding.limit:.5g}"


def share(one: Membership, which: str) -> str:
    """AUC or TPR with its interval."""
    e = one.auc if which == "auc" else one.tpr
    return f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})"


def render(audit: Audit) -> str:
    """The report as one HTML document."""
    private = audit.private
    assert private.claimed is not None
    return page(
        "audit.html.jinja",
        audit=audit,
        game=audit.honest.game,
        meaning=MEANING,
        shown=shown,
        allowed=allowed,
        share=share,
        tpr_bound=tpr_bound(FPR, private.claimed, private.delta),
        auc_bound=auc_bound(private.claimed, private.delta),
        pictures=[
            figures.proved(audit.verdicts),
            figures.attack(audit.private, audit.without),
        ],
    )


def write_report(audit: Audit, folder: Path) -> Path:
    """Write ``audit.html`` into ``folder`` and return its path."""
    path = folder / "audit.html"
    write_atomically(path, render(audit))
    return path


def print_audit(audit: Audit, console: Console) -> None:
    """Print the checks, what they caught, and the attack on planted notes."""
    checks = Table(title="The installed engine", box=box.SIMPLE_HEAD)
    for column in ("check", "", "measured", "allowed"):
        checks.add_column(column, justify="right" if column in ("measured", "allowed") else "left")
    for finding in audit.honest.findings:
        style = "" if finding.passed else "bold red"
        meaning = MEANING[finding.check]
        checks.add_row(finding.check, meaning, shown(finding), allowed(finding), style=style)
    console.print(checks)
    sabotaged = Table(title="Engines that are wrong on purpose", box=box.SIMPLE_HEAD)
    sabotaged.add_column("engine")
    sabotaged.add_column("ε proved", justify="right")
    sabotaged.add_column("caught by")
    for verdict in audit.verdicts[1:]:
        caught = wording.listing(verdict.failed or ("[bold red]nothing[/bold red]",))
        sabotaged.add_row(escape(verdict.engine), f"{verdict.game.proved:.2f}", caught)
    console.print(sabotaged)

    game, private, without = audit.honest.game, audit.private, audit.without
    console.print(
        f"canaries: ε ≥ {game.proved:.2f} proved, {game.claimed:.2f} claimed "
        f"({len(game.scores)} canaries, one step)",
        highlight=False,
    )
    assert private.claimed is not None
    bound = tpr_bound(FPR, private.claimed, private.delta)
    attack = Table(
        title="Planted notes: who was trained on?",
        caption=f"at ε = {private.claimed:.2f} at most {wording.percent(bound, 1)} of the members "
        "can be found at 1 % false positives",
        box=box.SIMPLE_HEAD,
    )
    for column in ("training", "ε claimed", "ε proved", "AUC", "TPR at 1 % FPR"):
        attack.add_column(column, justify="left" if column == "training" else "right")
    for name, one in (("with privacy", private), ("without privacy", without)):
        claimed = "none" if one.claimed is None else f"{one.claimed:.2f}"
        attack.add_row(name, claimed, f"{one.proved:.2f}", share(one, "auc"), share(one, "tpr"))
    console.print(attack)
    for problem in audit.problems:
        console.print(f"[bold red]failed[/bold red] {escape(problem)}", soft_wrap=True)
    if not audit.problems:
        console.print("[green]passed[/green]: no promise was found broken", highlight=False)
    console.print(f"time {wording.duration(audit.seconds)}", style="dim", highlight=False)
