"""Numbers that leave beside the adapter: never, exact because the policy publishes them, or noised.

A noised number is a sum over units to which one unit adds at most s, divided by a public constant:

    patients, notes   count + z s N ;  s = 1, and for notes the policy's cap k on a unit's notes
    score             (sum over a Poisson sample of held-out units of min(loss, L) + z L N) / d
    loss              (sum over the step's sample of min(unit's loss, L) + z' L N) / D, averaged

D is the plan's denominator, d = D h / (1 - h) with the policy's held-out share h; real numbers of
units are never divided by. N is standard normal from the generator of the training noise, float64,
and the result is rounded to a public grid. z is the policy's ``share.noise``.

Composition. Counts and score draw their own randomness: each is a further mechanism, charged in the
same reservation as the steps. Counts leave in a run's first round only, for they hardly change. The
loss is of the SAME Poisson sample as the gradient. Charged as a mechanism of its own it would be
amplified as if it had drawn its own sample, and the sum would be too small. Both together are one
Gaussian mechanism on the vector (S / sigma C, sum of losses / z' L), in which one unit moves the
mean by at most sqrt(1/sigma^2 + 1/z'^2); it is charged as one, of noise multiplier tau with

    1/tau^2 = 1/sigma^2 + 1/z'^2 .

tau is what calibration gives, z' = max(z, 4 tau), and the gradient gets the sigma that is left, at
most 3.3 % above tau. What is public is outside the guarantee, by the hospital's choice.

Nothing is refused because of a loss: one that is not a number counts as 0, an infinite one as L.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adapters.likelihood import note_losses, pad_right
from adapters.plan import TrainingPlan
from client.notes.note import Note
from client.privacy.accountant import GaussianSteps, History
from client.privacy.randomness import SecureRandomness
from client.privacy.released import COUNT_GRID, LOSS_GRID, Charge, Fact, Released, Source
from client.privacy.sampling import poisson_sample
from conf.policy import Share, ShareLimits, SitePolicy

_SUM_GRID = 2.0**-20  # nats
_LEAST_RATIO = 4.0  # of the loss's noise multiplier to the charged one

Units = Mapping[str, Sequence[Note]]
Facts = dict[str, Released[Fact]]


@dataclass(frozen=True)
class StepNoise:
    """Noise multipliers of a step: of the summed gradient, and of the summed loss if noised."""

    gradient: float
    loss: float | None


def step_noise(charged: float, share: ShareLimits) -> StepNoise:
    """How the charged noise multiplier of a step is divided between gradient and loss."""
    if share.losses != "noised":
        return StepNoise(charged, None)
    loss = max(share.noise, _LEAST_RATIO * charged)
    return StepNoise((charged**-2 - loss**-2) ** -0.5, loss)


def charges(plan: TrainingPlan, share: ShareLimits) -> tuple[frozenset[str], History]:
    """Mechanisms of this round, by name, and what is charged for them beside its steps.

    Statistics are one more step (``TrainingPlan.charged_steps``), so nothing beside them.
    """
    names, events = {"gradient"}, []
    if plan.statistics:
        names.add("statistics")
    if share.losses == "noised":
        names.add("loss")
    if share.counts == "noised" and plan.round == 1:
        names |= {"patients", "notes"}
        events.append(GaussianSteps(1.0, share.noise, 2))
    if share.scores == "noised":
        names.add("score")
        events.append(GaussianSteps(plan.privacy.sampling_rate, share.noise, 1))
    return frozenset(names), tuple(events)


def later_charges(plan: TrainingPlan, share: ShareLimits) -> History:
    """What the rounds after this one will be charged beside their steps."""
    rounds = plan.rounds - plan.round
    if share.scores != "noised" or rounds == 0:
        return ()
    return (GaussianSteps(plan.privacy.sampling_rate, share.noise, rounds),)


def charges_of_a_run(share: ShareLimits, sampling_rate: float, rounds: int) -> History:
    """What a whole run of ``rounds`` is charged beside its steps: of all rounds together."""
    events = []
    if share.counts == "noised":
        events.append(GaussianSteps(1.0, share.noise, 2))
    if share.scores == "noised":
        events.append(GaussianSteps(sampling_rate, share.noise, rounds))
    return tuple(events)


def noised(
    value: float, sensitivity: float, multiplier: float, grid: float, random: SecureRandomness
) -> float:
    """``value`` + multiplier sensitivity N(0, 1), rounded to a multiple of ``grid``."""
    noise = multiplier * sensitivity * float(random.normal(1)[0])
    return round((value + noise) / grid) * grid


def bounded(losses: Iterable[float], bound: float) -> list[float]:
    """Each loss clipped to [0, bound] and cut to multiples of 2^-20; NaN counts as 0.

    Float64 adds such numbers without rounding, so a unit adds at most ``bound`` in any order.
    """
    clipped = (0.0 if math.isnan(loss) else min(max(loss, 0.0), bound) for loss in losses)
    return [math.floor(loss / _SUM_GRID) * _SUM_GRID for loss in clipped]


def unit_losses(model: nn.Module, units: Iterable[Sequence[Sequence[int]]]) -> list[float]:
    """Mean note loss of each unit, in nats a token.

    Units go through the model one at a time, so that each loss depends on its own unit alone.
    """
    losses = []
    with torch.no_grad():
        for rows in units:
            ids, lengths = pad_right(rows)
            losses.append(float(note_losses(model, ids, lengths).double().mean()))
    return losses


class SharedNumbers:
    """The numbers of one round. ``charge`` is None in a run without privacy: nothing is noised."""

    def __init__(
        self,
        plan: TrainingPlan,
        policy: SitePolicy,
        charge: Charge | None = None,
        random: SecureRandomness | None = None,
    ) -> None:
        self._plan, self._policy, self._share = plan, policy, policy.share
        self._charge, self._random = charge, random
        self._losses: list[float] = []  # of each step (noised), or of each unit (public)

    def counts(self, units: Units) -> Facts:
        """Numbers of patients and of notes that are trained on."""
        patients = len({note.unit for notes in units.values() for note in notes})
        mode = self._mode(self._share.counts)
        if mode == "public":
            notes = sum(map(len, units.values()))
            return {"patients": _public(patients), "notes": _public(notes)}
        if mode == "never" or self._plan.round > 1:
            return {}
        cap = self._policy.privacy.max_notes_per_unit
        capped = sum(min(len(notes), cap) for notes in units.values())
        most = 1 if self._plan.privacy.unit == "note" else cap
        return self._noised("patients", patients, 1, 1, COUNT_GRID) | self._noised(
            "notes", capped, most, 1, COUNT_GRID
        )

    def score(
        self, model: nn.Module, held_out: Units, tokens: Callable[[Note], Sequence[int]]
    ) -> Facts:
        """Mean loss of the live model on held-out units; call it before the first step."""
        mode, privacy = self._mode(self._share.scores), self._plan.privacy
        if mode == "never":
            return {}
        most, bound = privacy.max_notes_per_unit, self._share.loss_bound
        if mode == "public":
            chosen = [list(notes[:most]) for notes in held_out.values()]
        else:
            chosen = poisson_sample(held_out, privacy.sampling_rate, most, self._randomness())
        losses = bounded(
            unit_losses(model, ([tokens(n) for n in notes] for notes in chosen)), bound
        )
        if mode == "public":
            return {"score": _public(sum(losses) / max(1, len(losses)))}
        share = self._policy.notes.holdout
        expected = privacy.denominator * share / (1 - share)
        return self._noised("score", sum(losses), bound, expected, LOSS_GRID)

    def step(
        self, model: nn.Module, rows: Sequence[Sequence[Sequence[int]]], noise: float | None
    ) -> None:
        """Note the loss of a step's units (token rows); call it before the step moves the model."""
        mode = self._mode(self._share.losses)
        if mode == "never":
            return
        losses = bounded(unit_losses(model, rows), self._share.loss_bound)
        if mode == "public":
            self._losses += losses
            return
        assert noise is not None, "a noised loss has its share of the step's noise"
        bound = self._share.loss_bound
        total = noised(sum(losses), bound, noise, LOSS_GRID, self._randomness())
        self._losses.append(total / self._plan.privacy.denominator)

    def loss(self, noise: float | None) -> Facts:
        """Mean training loss of the round, after its last step."""
        mode = self._mode(self._share.losses)
        if mode == "never":
            return {}
        mean = sum(self._losses) / max(1, len(self._losses))
        if mode == "public":
            return {"loss": _public(mean)}
        assert noise is not None, "a noised loss has its share of the step's noise"
        std = noise * self._share.loss_bound / self._plan.privacy.denominator
        return self._fact("loss", _on(LOSS_GRID, mean), std / len(self._losses) ** 0.5)

    def _mode(self, wanted: Share) -> Share:
        return "never" if wanted == "noised" and self._charge is None else wanted

    def _randomness(self) -> SecureRandomness:
        assert self._random is not None, "noise needs a source"
        return self._random

    def _noised(
        self, name: str, total: float, sensitivity: float, divisor: float, grid: float
    ) -> Facts:
        multiplier = self._share.noise
        value = noised(total, sensitivity, multiplier, grid, self._randomness()) / divisor
        return self._fact(name, _on(grid, value), multiplier * sensitivity / divisor)

    def _fact(self, name: str, value: float, std: float) -> Facts:
        """The noised number, and the standard deviation of its noise, which is public."""
        assert self._charge is not None, "what is noised was paid for"
        origin = self._charge.mechanism(name)
        return {
            f"noised_{name}": Released(value, origin),
            f"noised_{name}_std": Released(float(std), Source.LEDGER),
        }


def _public(value: float) -> Released[Fact]:
    return Released(value, Source.POLICY_PUBLIC)


def _on(grid: float, value: float) -> float:
    return round(value / grid) * grid
