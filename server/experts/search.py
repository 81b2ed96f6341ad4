"""The search for the best merge: evaluate, record, go on; the same again after an interruption.

Every evaluation is on disk when it ends. A search that is started again replays them: the optimizer
is seeded and is told the same scores, so it asks for the same candidates and ends where it would
have ended. Equal candidates are evaluated once, and only new ones count against the budget. The
first candidate is the merge as configured, so the result is never worse than that on the objective.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray

from conf.load import ConfigError
from server.experts.journal import Journal
from server.experts.space import Candidate, Space
from strategies.base import MergeError

_SPREAD = 0.3  # of the first generation, of the width of every range
_STALE = 10  # generations in a row without a new candidate, after which there is nothing to find
_REDRAWS = 1000  # of one point, until the strategy takes it

Evaluate = Callable[[Candidate], Mapping[str, float]]
Scores = dict[str, float]


@dataclass(frozen=True)
class Found:
    """The best candidate, its score by task, and how many evaluations there were in all."""

    candidate: Candidate
    scores: Scores
    evaluations: int

    @property
    def objective(self) -> float:
        """Mean score over tasks."""
        return statistics.fmean(self.scores.values())


class _Spent(Exception):
    """The budget of evaluations is used up."""


def search(
    space: Space,
    evaluate: Evaluate,
    budget: int,
    seed: int,
    journal: Journal,
    on_evaluation: Callable[[int, int, float], None] = lambda done, total, best: None,
) -> Found:
    """The candidate of the highest mean score that ``budget`` >= 1 evaluations find.

    ``evaluate`` gives the scores by task; a candidate for which it raises MergeError is recorded
    as refused and is worse than all. ``on_evaluation`` is called with evaluations done, budget and
    best objective. Raises ConfigError when no candidate could be merged.
    """
    known = {record["key"]: record["scores"] for record in journal.of("evaluation")}
    tried: dict[str, tuple[Candidate, Scores | None]] = {}
    best = -math.inf

    def loss(candidate: Candidate) -> float:
        nonlocal best
        if candidate.key not in tried:
            if len(tried) == budget:
                raise _Spent
            if candidate.key not in known:
                known[candidate.key] = _evaluated(candidate, evaluate, journal)
            scores = known[candidate.key]
            tried[candidate.key] = candidate, scores
            best = max(best, statistics.fmean(scores.values()) if scores else -math.inf)
            on_evaluation(len(tried), budget, best)
        found = tried[candidate.key][1]
        return -statistics.fmean(found.values()) if found else math.inf

    with contextlib.suppress(_Spent):
        _run(space, loss, seed, tried)
    merged = [(candidate, scores) for candidate, scores in tried.values() if scores]
    if not merged:
        last = journal.of("evaluation")[-1]["refused"]
        raise ConfigError(f"strategy={space.strategy.name}: no candidate could be merged; {last}")
    candidate, scores = max(merged, key=lambda one: statistics.fmean(one[1].values()))
    return Found(candidate, scores, len(tried))


def _run(
    space: Space,
    loss: Callable[[Candidate], float],
    seed: int,
    tried: Mapping[str, object],
) -> None:
    """Ask and tell until the budget is spent or nothing new comes up."""
    loss(space.configured)
    if not space.dimensions:
        return
    optimizer, stale = _optimizer(space.start, seed), 0
    while stale < _STALE:
        before = len(tried)
        drawn = [_valid(space, optimizer) for _ in range(optimizer.population_size)]
        losses = [loss(candidate) for _, candidate in drawn]
        points = [point for point, _ in drawn]
        optimizer.tell(list(zip(points, losses, strict=True)))
        stale = stale + 1 if len(tried) == before else 0


def _optimizer(start: NDArray[np.float64], seed: int) -> CMA:
    """CMA-ES (Hansen, arXiv 1604.00772) in the unit cube, which has two dimensions at least."""
    mean = np.append(start, 0.5) if len(start) == 1 else start.astype(np.float64)
    return CMA(mean, _SPREAD, np.tile([0.0, 1.0], (len(mean), 1)), seed=seed)


def _valid(space: Space, optimizer: CMA) -> tuple[NDArray[np.float64], Candidate]:
    """A point whose parameters fit each other, as ranges alone do not ensure."""
    for _ in range(_REDRAWS):
        point = optimizer.ask()
        candidate = space.candidate(point[: len(space.start)])
        if candidate is not None:
            return point, candidate
    raise ConfigError(f"strategy={space.strategy.name}: its ranges hold hardly a valid choice")


def _evaluated(candidate: Candidate, evaluate: Evaluate, journal: Journal) -> Scores | None:
    try:
        scores, refused = dict(evaluate(candidate)), ""
    except MergeError as problem:
        scores, refused = None, str(problem)
    if scores is not None and not all(math.isfinite(score) for score in scores.values()):
        scores, refused = None, "a score is not finite"
    journal.append(
        {
            "kind": "evaluation", "number": len(journal.of("evaluation")) + 1,
            "key": candidate.key, "weights": candidate.weights,
            "parameters": candidate.parameters, "scores": scores, "refused": refused,
        }
    )  # fmt: skip
    return scores
