"""Numbers and sentences for people who read a report; every sentence is computed from the run.

A privacy loss is always rounded up, so that no page states less than was spent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from server.release_card import round_up
from simulation.record import Run, Summary

NONE = "–"


def number(value: float | None) -> str:
    """About three significant digits: 8.41, 21.3, 1,204."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not finite"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def fine(value: float | None) -> str:
    """Three decimals, for bits per character and losses."""
    return NONE if value is None else f"{value:.3f}" if math.isfinite(value) else "not finite"


def epsilon(value: float | None) -> str:
    """Two decimals, rounded up, without trailing zeros: 7.941 becomes 7.95, 8 stays 8."""
    return NONE if value is None else round_up(value)


def small(value: float | None) -> str:
    """A small number such as a delta or a relative error: 1e-5, 2.4e-3, 0."""
    if value is None or value == 0:
        return NONE if value is None else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float | None) -> str:
    """A time: 42 s, 6 min 5 s, 2 h 3 min."""
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def listing(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def count(amount: int, noun: str) -> str:
    """``1 round``, ``3 rounds``."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def _equals(symbol: str, shown: str) -> str:
    """``ε = 8``, never broken over two lines."""
    return f"{symbol} = {shown}".replace(" ", "\N{NO-BREAK SPACE}")


def _quality(summary: Summary) -> list[str]:
    """Merged against base, and against each hospital alone, on held-out notes."""
    changes = {
        name: (h.perplexity.base, merged)
        for name, h in summary.hospitals.items()
        if (merged := h.perplexity.of("merged")) is not None and math.isfinite(h.perplexity.base)
    }
    if not changes:
        return ["No finite perplexity of the merged adapter was measured on held-out notes."]
    better = {n: pair for n, pair in changes.items() if pair[1] < pair[0]}
    worse = [n for n in changes if n not in better]
    total = len(summary.hospitals)
    if len(better) == total:
        where = "At the hospital" if total == 1 else f"At every one of the {total} hospitals"
    else:
        where = f"At {len(better)} of {total} hospitals"
    told = [f"{number(a)} → {number(b)} at {n}" for n, (a, b) in changes.items()]
    falls = sorted(((a - b) / a, n) for n, (a, b) in changes.items())
    detail = (
        listing(told)
        if len(told) <= 4
        else f"from {percent(falls[0][0])} lower at {falls[0][1]} "
        f"to {percent(falls[-1][0])} lower at {falls[-1][1]}"
    )
    sentences = [
        f"{where} the merged adapter predicts held-out notes better than the base model "
        f"(perplexity {detail}; lower is better)."
    ]
    if worse:
        shown = listing(worse[:4] + ([f"{len(worse) - 4} more"] if len(worse) > 4 else []))
        sentences.append(f"It does not at {shown}.")
    alone = [
        (h.perplexity.of("local"), h.perplexity.of("merged")) for h in summary.hospitals.values()
    ]
    pairs = [(a, m) for a, m in alone if a is not None and m is not None]
    if pairs:
        won = sum(m < a for a, m in pairs)
        sentences.append(f"It beats what a hospital reaches alone at {won} of {len(pairs)}.")
    return sentences


def _privacy(summary: Summary) -> list[str]:
    privacy = summary.privacy
    if not privacy.enabled:
        return [
            "This run had no privacy: no noise was added, so nothing is promised to any patient."
        ]
    spent = {n: h.epsilon for n, h in summary.hospitals.items() if h.epsilon is not None}
    if not spent:
        return ["No hospital recorded a privacy loss."]
    most = max(spent, key=lambda name: spent[name])
    budget = privacy.epsilon_budget or 0.0
    over = over_budget(summary)
    verdict = (
        f"the budget was exceeded at {listing(over)}" if over else "no hospital exceeded its budget"
    )
    loss, chance = _equals("ε", epsilon(spent[most])), _equals("δ", small(privacy.delta))
    return [
        f"The largest privacy loss of any one {privacy.unit} is {loss} of a budget of "
        f"{epsilon(budget)} ({chance}), at {most}; {verdict}."
    ]


def _alignment(summary: Summary) -> list[str]:
    before = summary.alignment.instructions.get("merged")
    after = summary.alignment.instructions.get("aligned")
    if before is None or after is None:
        return []
    sentences = []
    if before.loss is not None and after.loss is not None:
        sentences.append(
            "Alignment moved the loss of held-out answers from "
            f"{before.loss:.2f} to {after.loss:.2f} (lower is better)."
        )
    if before.preference_accuracy is not None and after.preference_accuracy is not None:
        old, new = percent(before.preference_accuracy), percent(after.preference_accuracy)
        change = f"stayed at {new}" if old == new else f"went from {old} to {new}"
        sentences.append(
            f"The share of held-out instructions on which the good answer is preferred {change}."
        )
    changes = [
        (a - m) / m
        for h in summary.hospitals.values()
        if (m := h.perplexity.of("merged")) and (a := h.perplexity.of("aligned")) is not None
    ]
    if changes:
        mean = sum(changes) / len(changes)
        size, where = percent(abs(mean), 1), "perplexity on held-out notes"
        if size == percent(0.0, 1):
            sentences.append(f"On average it left {where} as it was.")
        else:
            sentences.append(
                f"It {'raised' if mean > 0 else 'lowered'} {where} by {size} on average."
            )
    return sentences


def mean_change(summary: Summary) -> str:
    """Mean relative change of perplexity from base to merged: ``−38 %``."""
    pairs = [
        (h.perplexity.of("base"), h.perplexity.of("merged")) for h in summary.hospitals.values()
    ]
    changes = [(m - b) / b for b, m in pairs if b and m is not None]
    if not changes:
        return NONE
    mean = sum(changes) / len(changes)
    return f"{'−' if mean < 0 else '+'}{percent(abs(mean))}"


def over_budget(summary: Summary) -> list[str]:
    """Hospitals that spent more than the budget; rounding of the accountant is allowed for."""
    budget = summary.privacy.epsilon_budget
    if not summary.privacy.enabled or budget is None:
        return []
    return [n for n, h in summary.hospitals.items() if (h.epsilon or 0.0) > budget * (1 + 1e-9)]


def reading(run: Run) -> str:
    """The outcome of a run in one paragraph of plain words."""
    summary = run.summary
    sentences = _quality(summary) + _privacy(summary) + _alignment(summary)
    missed = sum(len(r.left_out) for r in summary.rounds)
    if missed:
        was = "was" if missed == 1 else "were"
        sentences.append(f"{count(missed, 'answer')} {was} left out; the rounds table says why.")
    if run.pooled:
        sentences.append(
            "All notes were brought together for this run: it is a reference, not a federation."
        )
    return " ".join(sentences)
