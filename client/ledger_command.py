"""``wardround ledger show | verify | plan | export | check``: a site's spending, for people.

Nothing here spends. ``show`` also reads a ledger that does not verify, and says so: what was spent
must stay visible even when nothing more may be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.ledger_figure import draw
from client.privacy import audit_log, durable, statement
from client.privacy.accountant import (
    BudgetExhausted,
    GaussianSteps,
    History,
    calibrate,
    epsilon,
    epsilon_rdp,
    steps_within,
)
from client.privacy.audit_log import AuditLogError
from client.privacy.chain import Entry
from client.privacy.ledger import Ledger, LedgerError, begun, charged, reservations
from client.privacy.ledger_file import LedgerFile
from client.privacy.metadata import charges_of_a_run
from client.privacy.unprotected import unprotected_mark
from client.site import read_policy
from conf.commands import LedgerCommand, LedgerPlan
from conf.load import ConfigError
from conf.policy import SitePolicy


def run(action: str, command: LedgerCommand, console: Console) -> None:
    """Do one of ``ACTIONS``; of ``command``, each reads what it needs.

    Raises ConfigError for a mistake in the options, SiteError for one in the site policy, and
    LedgerError when the ledger or the statement does not verify.
    """
    ACTIONS[action](command, console)


def _show(command: LedgerCommand, console: Console) -> None:
    policy = _policy(command)
    limits, problem = policy.privacy, None
    try:
        with Ledger.of(policy) as ledger:
            entries = ledger.entries()
    except LedgerError as error:
        problem = str(error)
        if not policy.ledger.exists():
            raise  # to look at it must not make it
        entries = LedgerFile(policy.ledger).entries(None)  # as far as it can be read at all
    console.print(_table(entries))
    console.print(_totals(entries, policy))
    if command.figure:
        draw(command.figure, entries, policy.lineage, limits.epsilon, limits.delta)
        console.print(f"figure: [bold]{escape(str(command.figure))}[/bold]", soft_wrap=True)
    if problem:
        raise LedgerError(f"shown as it was found, but it does not verify: {problem}")
    _require_complete(policy)


def _verify(command: LedgerCommand, console: Console) -> None:
    policy = _policy(command)
    with Ledger.of(policy) as ledger:
        entries = ledger.entries()
    anchored = (
        "and anchor agree" if policy.anchor else "hold (no anchor: a rollback would not show)"
    )
    console.print(f"{len(entries)} entries: chain, MACs {anchored}", soft_wrap=True)
    heads = [head for e in entries if (head := e.body.get("audit_head"))]
    try:
        lines = audit_log.verify(policy.audit_file, heads)
    except AuditLogError as problem:
        raise LedgerError(str(problem)) from None
    console.print(f"{lines} lines of the audit log: chain holds, none known to the ledger missing")
    _require_complete(policy)


def _plan(command: LedgerCommand, console: Console) -> None:
    policy = read_policy(command.site)
    wanted, limits = command.plan, policy.privacy
    _require_allowed(wanted, policy, command.site)
    history: History = ()
    if begun(policy.ledger, policy.site_key, policy.anchor):
        with Ledger.of(policy) as ledger:
            history = ledger.history()
    each = wanted.local_steps + wanted.statistics  # as TrainingPlan.charged_steps
    steps, spent = wanted.rounds * each, epsilon(history, limits.delta)
    what = f"{wanted.rounds} x {each} steps at q={wanted.sampling_rate:g}"
    if wanted.statistics:
        what += " (statistics are one of them)"
    console.print(f"spent so far: epsilon {spent:.3f} of {limits.epsilon:g}")
    beside = charges_of_a_run(policy.share, wanted.sampling_rate, wanted.rounds)
    if beside:
        console.print("the numbers that the policy shares noised are counted in", soft_wrap=True)
    history = (*history, *beside)
    try:
        sigma = _noise(wanted, steps, history, beside, policy)
    except BudgetExhausted as problem:
        raise LedgerError(f"the plan does not fit: {problem}") from None
    if sigma < limits.min_noise_multiplier:
        sigma = limits.min_noise_multiplier
        console.print(f"noise is raised to {sigma:g}, privacy.min_noise_multiplier of the policy")
    planned = (*history, GaussianSteps(wanted.sampling_rate, sigma, steps))
    by_rdp = epsilon_rdp(planned, limits.delta)
    if wanted.noise_multiplier:  # else the noise is what the budget needs
        fit = steps_within(
            history, wanted.sampling_rate, sigma, limits.epsilon, limits.delta, steps
        )
        if fit < steps:  # by RDP only: the exact figure of a plan far beyond needs gigabytes
            raise LedgerError(
                f"the plan does not fit: {what} with noise {sigma:g} would lead to epsilon "
                f"{by_rdp:.3f} (by RDP); {fit} of its {steps} steps fit"
            )
    after = epsilon(planned, limits.delta)
    console.print(
        f"{what}, noise {sigma:g}: epsilon {after:.3f} after it "
        f"(by RDP {by_rdp:.3f}), {limits.epsilon - after:.3f} left",
        soft_wrap=True,
    )


def _require_allowed(wanted: LedgerPlan, policy: SitePolicy, site: Path) -> None:
    """Return when a round is not refused for what such a plan asks (``client.privacy.authorise``).

    Raises ConfigError.
    """
    limits = policy.privacy
    asked = {
        "epsilon": (None if wanted.noise_multiplier else wanted.epsilon, "epsilon"),
        "delta": (wanted.delta, "delta"),
        "sampling_rate": (wanted.sampling_rate, "max_sampling_rate"),
    }
    for name, (value, limit) in asked.items():
        allowed = getattr(limits, limit)
        if value is not None and value > allowed:
            raise ConfigError(
                f"plan.{name}={value:g}: privacy.{limit} of {site} is {allowed:g}, so such a plan "
                "is refused"
            )
    if wanted.statistics and policy.share.statistics == "never":
        raise ConfigError(
            f"plan.statistics=true: share.statistics of {site} is never, so such a plan is refused"
        )


def _noise(
    wanted: LedgerPlan, steps: int, history: History, beside: History, policy: SitePolicy
) -> float:
    """Noise multiplier of the plan, before the policy's floor: as asked, or as a round has it.

    ``history`` holds what was spent and, last, what the run is charged ``beside`` its steps.
    """
    limits = policy.privacy
    if wanted.noise_multiplier:
        return wanted.noise_multiplier
    sigma = calibrate(history, wanted.sampling_rate, steps, limits.epsilon, limits.delta)
    if wanted.epsilon:
        own = calibrate(beside, wanted.sampling_rate, steps, wanted.epsilon, wanted.delta)
        sigma = max(sigma, own)
    return sigma


def _export(command: LedgerCommand, console: Console) -> None:
    if command.out is None:
        raise ConfigError("out must be given: the file for the statement")
    policy = _policy(command)
    _require_complete(policy)
    with Ledger.of(policy) as ledger:
        signed = statement.make(ledger, policy.site)
    durable.replace(command.out, json.dumps(signed, indent=2).encode() + b"\n")
    command.out.chmod(0o644)  # it is for others to read
    console.print(
        f"statement: [bold]{escape(str(command.out))}[/bold]\npublic key, to hand over by another "
        f"way: {signed['public_key']}",
        soft_wrap=True,
    )


def _check(command: LedgerCommand, console: Console) -> None:
    if command.file is None:
        raise ConfigError("file must be given: the statement to check")
    try:
        text = command.file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"file={command.file}: not a readable statement") from None
    found = statement.check(text)
    if command.public_key not in (None, found.public_key):
        raise LedgerError(f"signed with another key: {found.public_key}")
    said: dict[str, Any] = found.statement
    console.print(
        f"The signature holds. {said['site']}, {said['lineage']}, on {said['made']}: epsilon "
        f"{said['epsilon']:.3f} at delta {said['delta']:g} ({said['adjacency']}), computed again "
        f"{found.epsilon:.3f}; allowed {said['epsilon_allowed']:g}.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if command.public_key is None:
        console.print(f"Is this the hospital's public key? {found.public_key}", soft_wrap=True)


def _require_complete(policy: SitePolicy) -> None:
    mark = unprotected_mark(policy)
    if mark.exists():
        raise LedgerError(
            f"{mark} says that notes were trained on without privacy: this ledger does not hold "
            "all that left, and nothing can be stated from it"
        )


def _policy(command: LedgerCommand) -> SitePolicy:
    """The site policy, once there is a ledger to look into."""
    policy = read_policy(command.site)
    if not begun(policy.ledger, policy.site_key, policy.anchor):
        raise LedgerError(f"{policy.ledger}: no ledger yet; the first private round makes it")
    return policy


def _table(entries: list[Entry]) -> Table:
    table = Table("", "when (UTC)", "lineage", "run", "round", "state", title="reservations")
    table.add_column("q, noise, steps")
    table.add_column("epsilon after", justify="right")
    ends = statement.closing(entries)
    for entry in (e for e in entries if e.state == "RESERVED"):
        body, end = entry.body, ends.get(entry.seq)
        mechanisms = (
            f"{m['sampling_rate']:g}, {m['noise_multiplier']:g}, {m['steps']}"
            for m in body["mechanisms"]
        )
        table.add_row(
            str(entry.seq),
            body["at"][:16].replace("T", " "),
            escape(body["lineage"]),
            escape(str(body.get("run", ""))),
            str(body.get("round", "")),
            (end or entry).state,
            "\n".join(mechanisms),
            f"{body['epsilon_after']:.3f}",
        )
    return table


def _totals(entries: list[Entry], policy: SitePolicy) -> Table:
    delta = policy.privacy.delta
    table = Table("lineage", "reservations", "allowed", title=f"epsilon at delta {delta:g}")
    table.add_column("spent (PLD)", justify="right")
    table.add_column("spent (RDP)", justify="right")
    lineages = {e.body["lineage"]: None for e in entries if e.state == "RESERVED"}
    for lineage in lineages:
        history = charged(entries, lineage)
        table.add_row(
            escape(lineage),
            str(len(reservations(entries, lineage))),
            f"{policy.privacy.epsilon:g}" if lineage == policy.lineage else "",
            f"{epsilon(history, delta):.3f}",
            f"{epsilon_rdp(history, delta):.3f}",
        )
    return table


ACTIONS: dict[str, Callable[[LedgerCommand, Console], None]] = {
    "show": _show, "verify": _verify, "plan": _plan, "export": _export, "check": _check,
}  # fmt: skip
