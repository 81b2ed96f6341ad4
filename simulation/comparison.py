"""Several runs side by side: what privacy costs, and what federation costs.

The gain of an arm at a hospital is ``bits per character of the base model - of the merged adapter``
on held-out notes. A price is stated as the share of a reference's gain that is kept,
``gain / gain of the reference``, and the reference is always named: for the price of privacy the
most similar run without privacy, for the price of federation the most similar run on pooled notes.
Similar means: fewest configuration keys that differ. Where the reference gained nothing a share has
no meaning and is not given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulation import figures, wording
from simulation.record import Run, RunRecordError, load_run
from simulation.report import REPORT_NAME, page

_TOLD = 4  # arms spelled out in the reading
_PLACES = ("runs", "resume")  # where a run was written; no part of what was compared


@dataclass(frozen=True)
class Kept:
    """How much of one reference's gain an arm keeps; None where it cannot be said."""

    reference: str
    overall: float | None
    by_hospital: dict[str, float | None]
    same_notes: bool  # whether both were measured on the same held-out notes


@dataclass(frozen=True)
class Arm:
    """One run of a comparison; gains are in bits per character."""

    label: str
    run: Run
    gain: float | None  # mean over hospitals
    by_hospital: dict[str, float]
    of_unprivate: Kept | None
    of_pooled: Kept | None

    @property
    def epsilon(self) -> float | None:
        """The largest privacy loss of any hospital; None without privacy."""
        spent = [h.epsilon for h in self.run.summary.hospitals.values() if h.epsilon is not None]
        return max(spent, default=None) if self.run.summary.privacy.enabled else None

    def mean_of(self, figure: str) -> float | None:
        """Mean over rounds of what the merges say of themselves (a field of ``RoundPart``)."""
        rounds = self.run.summary.rounds
        known = [v for r in rounds if (v := getattr(r, figure)) is not None]
        return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class Comparison:
    """The arms in the order given, and the configuration keys in which they differ."""

    arms: tuple[Arm, ...]
    differences: dict[str, tuple[Any, ...]]  # dotted key -> one value an arm, None where absent


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return {k: v for k, v in flat.items() if k not in _PLACES}


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The dotted keys whose value is not the same in all of ``configs``, with all their values."""
    flats = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    rows = {key: tuple(flat.get(key) for flat in flats) for key in keys}
    return {
        key: values
        for key, values in rows.items()
        if any(v != values[0] for v in values) or not all(key in flat for flat in flats)
    }


def gains(run: Run) -> dict[str, float]:
    """Bits per character gained by the merged adapter over the base model, by hospital."""
    return {
        name: base - merged
        for name, h in run.summary.hospitals.items()
        if (base := h.bits_per_char.of("base")) is not None
        and (merged := h.bits_per_char.of("merged")) is not None
    }


def share(gain: float, reference: float) -> float | None:
    """``gain / reference``, or None where the reference gained nothing."""
    return gain / reference if reference > 0 else None


def _kept(run: Run, label: str, reference: Run) -> Kept:
    """Compare hospital by hospital where both name them, else the means."""
    own, other = gains(run), gains(reference)
    common = [name for name in own if name in other]
    bases = [(r.summary.hospitals[n].bits_per_char.base for r in (run, reference)) for n in common]
    same = bool(common) and all(math.isclose(*pair, rel_tol=1e-4) for pair in bases)
    overall = None
    if own and other:
        names = [(own[n], other[n]) for n in common]
        mine, theirs = zip(*names, strict=True) if names else (own.values(), other.values())
        overall = share(statistics.fmean(mine), statistics.fmean(theirs))
    by_hospital = {n: share(own[n], other[n]) if n in common else None for n in own}
    return Kept(label, overall, by_hospital, same)


def _reference(run: Run, labels: Sequence[str], candidates: Mapping[int, Run]) -> Kept | None:
    """The share kept of the most similar candidate's gain; None without candidates."""
    if not candidates:
        return None
    best = min(candidates, key=lambda i: len(differences([run.config, candidates[i].config])))
    return _kept(run, labels[best], candidates[best])


def _labels(runs: Sequence[Run]) -> list[str]:
    """A short, unique name for each run: its privacy, its layout and merge where these differ."""
    layouts, merges = {r.pooled for r in runs}, {r.summary.strategy for r in runs}

    def label(run: Run) -> str:
        privacy = run.summary.privacy
        parts = [
            f"ε {wording.epsilon(privacy.epsilon_budget)} per {privacy.unit}"
            if privacy.enabled
            else "no privacy"
        ]
        if len(layouts) > 1:
            parts.append("pooled" if run.pooled else "federated")
        if len(merges) > 1:
            parts.append(run.summary.strategy)
        return ", ".join(parts)

    plain = [label(run) for run in runs]
    return [
        f"{text} ({run.folder.name})" if plain.count(text) > 1 else text
        for text, run in zip(plain, runs, strict=True)
    ]


def compare(runs: Sequence[Run]) -> Comparison:
    """Set gains against each other and find what differs in configuration.

    Raises
    ------
    RunRecordError
        With fewer than two runs.
    """
    if len(runs) < 2:
        raise RunRecordError(f"a comparison needs at least 2 runs, not {len(runs)}")
    labels = _labels(runs)
    arms = []
    for run, label in zip(runs, labels, strict=True):
        by_hospital = gains(run)
        unprivate = {
            i: other
            for i, other in enumerate(runs)
            if run.summary.privacy.enabled
            and not other.summary.privacy.enabled
            and other.pooled == run.pooled
        }
        pooled = {i: other for i, other in enumerate(runs) if other.pooled and not run.pooled}
        arms.append(
            Arm(
                label=label,
                run=run,
                gain=statistics.fmean(by_hospital.values()) if by_hospital else None,
                by_hospital=by_hospital,
                of_unprivate=_reference(run, labels, unprivate),
                of_pooled=_reference(run, labels, pooled),
            )
        )
    return Comparison(tuple(arms), differences([run.config for run in runs]))


def reading(comparison: Comparison) -> str:
    """What the comparison shows, in plain words."""
    sentences = []
    for arm in comparison.arms:
        kept = [
            f"{wording.percent(k.overall)} of the gain of “{k.reference}”"
            for k in (arm.of_unprivate, arm.of_pooled)
            if k is not None and k.overall is not None
        ]
        if kept:
            sentences.append(f"“{arm.label}” keeps {wording.listing(kept)}.")
    if len(sentences) > _TOLD:
        sentences[_TOLD:] = ["The tables below give the others."]
    if not sentences:
        sentences.append(
            "No price can be stated: that needs a run without privacy, or on pooled notes, that "
            "gains over the base model."
        )
    elsewhere = any(
        kept and not kept.same_notes
        for a in comparison.arms
        for kept in (a.of_unprivate, a.of_pooled)
    )
    if elsewhere:
        sentences.append(
            "Some runs were measured on different held-out notes; their shares compare means only "
            "and are rough."
        )
    return " ".join(sentences)


def _load(run_folders: Sequence[Path]) -> Comparison:
    return compare([load_run(folder) for folder in run_folders])


def write_comparison(run_folders: Sequence[Path], out: Path) -> Path:
    """Write one self-contained ``report.html`` over several finished runs into the folder ``out``.

    Raises
    ------
    RunRecordError
        With fewer than two runs, or when one is not a finished run.
    """
    comparison = _load(run_folders)
    names = dict.fromkeys(n for arm in comparison.arms for n in arm.by_hospital)
    picture = figures.arms(
        [arm.label for arm in comparison.arms],
        [list(arm.by_hospital.values()) for arm in comparison.arms],
    )
    html = page(
        "comparison.html.jinja",
        comparison=comparison,
        hospitals=list(names),
        reading=reading(comparison),
        pictures=[picture],
        simulated=any(a.run.summary.simulation_only("bits_per_char") for a in comparison.arms),
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / REPORT_NAME
    path.write_text(html, encoding="utf-8")
    return path


def print_comparison(run_folders: Sequence[Path], console: Console) -> None:
    """Print one row an arm: its gain, and the shares it keeps.

    Raises
    ------
    RunRecordError
        As :func:`write_comparison`.
    """
    comparison = _load(run_folders)
    table = Table(
        title="gain over the base model",
        caption="bits per character on held-out notes, mean over hospitals (higher is better)",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("run", overflow="fold")
    for heading in ("ε spent", "gain", "of no privacy", "of pooled"):
        table.add_column(heading, justify="right")
    for arm in comparison.arms:
        table.add_row(
            Text(arm.label),
            wording.epsilon(arm.epsilon) if arm.epsilon is not None else "no privacy",
            wording.fine(arm.gain),
            wording.percent(arm.of_unprivate.overall if arm.of_unprivate else None),
            wording.percent(arm.of_pooled.overall if arm.of_pooled else None),
        )
    console.print(table)
