"""One round at a hospital, in the order that keeps its promises.

    policy -> answered before? -> model -> notes -> noise for the whole plan -> ledger (on disk)
    -> sample, clip, noise, step -> statistics if asked for -> gate -> rounded for the wire
    -> ledger closed, with the reply

Nothing touches a note's gradient before the charge is on disk, and nothing leaves but through the
gate. A task that was answered before gets the stored reply again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import BaseModel, ModelError, load_base
from adapters.plan import TrainingPlan
from adapters.statistics import Statistic, Statistics
from client.notes.load import NotesError, load_notes
from client.notes.note import Note
from client.notes.split import split_units
from client.privacy.accountant import BudgetExhausted, GaussianSteps, calibrate
from client.privacy.authorise import (
    authorise,
    require_layers,
    require_model,
    require_unit,
)
from client.privacy.engine import clipped_sum, noised_mean, rehearse
from client.privacy.gate import Gate, Outgoing
from client.privacy.ledger import Ledger, LedgerError, Reservation
from client.privacy.metadata import (
    SharedNumbers,
    StepNoise,
    charges,
    later_charges,
    step_noise,
    unit_losses,
)
from client.privacy.per_note import trained_parameters
from client.privacy.randomness import SecureRandomness, SeededSampling
from client.privacy.released import Charge, Fact, Released, Source
from client.privacy.sampling import poisson_sample
from client.privacy.seeded_noise import SeededNoise
from client.privacy.statistics import released_statistics, statistic_sums
from client.privacy.unprotected import mark_unprotected, open_protected
from client.refusal import Reason, Refusal, failure_site
from client.upload import rounded
from conf.policy import SitePolicy
from conf.schema import ComputeSettings, ModelSettings, OptimizerSettings

log = logging.getLogger(__name__)

Units = dict[str, tuple[Note, ...]]


def train_round(
    plan: TrainingPlan,
    received: Adapter,
    policy: SitePolicy,
    on_step: Callable[[int], None] | None = None,
    audit_head: str | None = None,
    test_seed: int | None = None,
) -> Outgoing:
    """Train the received adapter on this site's notes for one round.

    Raises Refusal, with a reason that may be published, whenever the round cannot or must not be
    done. ``on_step`` is called with the number of finished steps; ``audit_head`` is the hash of
    the audit log's line about the task, which the ledger keeps. ``test_seed`` makes the noise
    repeatable; ValueError unless the policy's lineage says that it is a test.
    """
    authorise(plan, policy, datetime.now().astimezone())
    if not plan.privacy.enabled:
        return _train(plan, received, policy, None, None, on_step, audit_head)
    random = SecureRandomness()
    if test_seed is not None:
        random = SeededNoise(policy.lineage, test_seed, policy.site, _task(plan, received))
    try:
        with open_protected(policy) as ledger, ledger.turn():
            reply = ledger.reply(_task(plan, received))
            if reply is not None:
                return Outgoing.from_bytes(reply)
            return _train(plan, received, policy, ledger, random, on_step, audit_head)
    except LedgerError as problem:
        raise Refusal(Reason.INTERNAL, str(problem)) from None


def _train(
    plan: TrainingPlan,
    received: Adapter,
    policy: SitePolicy,
    ledger: Ledger | None,
    random: SecureRandomness | None,
    on_step: Callable[[int], None] | None,
    audit_head: str | None,
) -> Outgoing:
    """The round itself; without ``ledger`` and ``random`` it trains without privacy."""
    bench = _workbench(policy.model, policy.compute, plan.spec)
    model = bench.model
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    require_model(plan, bench.fingerprint, longest)
    require_layers(plan, policy, lora.depth(bench.base.model))
    try:
        trained_layers = plan.trained_layers(received.layers)
        lora.train_only(model, plan.upload, plan.seed, trained_layers)
    except lora.UnsupportedAdapter as problem:
        raise Refusal(Reason.LIMIT_EXCEEDED, str(problem)) from None
    units = site_units(policy, plan.privacy.unit)
    require_unit(plan, units.has_patients)
    try:
        lora.write(model, received)
    except ValueError as problem:
        raise Refusal(Reason.ADAPTER_INVALID, str(problem)) from None
    tokens = _Tokens(bench.base.tokenizer, plan.privacy.max_tokens)
    facts = {
        "site": Released[Fact](policy.site, Source.POLICY_PUBLIC),
        "steps": Released[Fact](plan.local_steps, Source.PLAN),
    }
    if ledger is None or random is None:
        numbers = SharedNumbers(plan, policy)
        sampling = SeededSampling(plan.seed, policy.site, plan.round)
        noise = StepNoise(0.0, None)
        facts |= _steps(
            model, plan, units, tokens, policy.compute, noise, sampling, numbers, on_step
        )
        trained = Released(lora.read(model, plan.spec), Source.POLICY_PUBLIC)
        mark_unprotected(policy)  # before anything leaves
        released = Gate(plan, policy, received, charge=None).release(trained, facts)
        return rounded(released, plan, received, policy)

    bench.rehearse(plan, policy)
    reservation, charge = _reserve(ledger, plan, received, policy, audit_head, random.name)
    try:
        noise = step_noise(charge.noise_multiplier, policy.share)
        numbers = SharedNumbers(plan, policy, charge, random)
        facts |= _steps(model, plan, units, tokens, policy.compute, noise, random, numbers, on_step)
        facts |= {
            "unit": Released(plan.privacy.unit, Source.PLAN),
            "noise_multiplier": Released(charge.noise_multiplier, Source.LEDGER),
            "epsilon_spent": Released(ledger.spent(), Source.LEDGER),
            "delta": Released(ledger.delta, Source.LEDGER),
        }
        trained = Released(lora.read(model, plan.spec), charge.mechanism("gradient"))
        measured = _statistics(model, plan, units, tokens, policy.compute, charge, random)
        released = Gate(plan, policy, received, charge).release(trained, facts, measured)
        reply = rounded(released, plan, received, policy).to_bytes()
    except Refusal as refusal:
        ledger.burn(reservation, refusal.reason.name)
        raise
    except Exception as problem:
        ledger.burn(reservation, Reason.TRAINING_FAILED.name)
        raise Refusal(Reason.TRAINING_FAILED, failure_site(problem)) from None
    ledger.commit(reservation, reply, result=trained.value.fingerprint())
    return Outgoing.from_bytes(reply)


@dataclass(frozen=True)
class SiteUnits:
    """A site's units on both sides of the split, and whether its notes have patient ids."""

    train: Units
    held_out: Units
    has_patients: bool


def site_units(policy: SitePolicy, unit: str) -> SiteUnits:
    """Units this site trains on, and its held-out ones.

    The split is by patient whatever the privacy unit ("patient" or "note"), so that no patient is
    on both sides. Raises Refusal when the notes cannot be read.
    """
    try:
        notes = load_notes(policy.notes)
    except NotesError as problem:
        raise Refusal(Reason.NOTES_UNUSABLE, str(problem)) from None
    sides = split_units(notes.units(), policy.notes.holdout)
    if unit == "note":
        sides = _by_note(sides[0]), _by_note(sides[1])
    return SiteUnits(*sides, notes.has_patients)


def training_units(policy: SitePolicy, unit: str) -> tuple[Units, bool]:
    """Units this site trains on, and whether notes have patient ids; see ``site_units``."""
    units = site_units(policy, unit)
    return units.train, units.has_patients


def _by_note(units: Units) -> Units:
    return {f"{u}\n{note.note_id}": (note,) for u, own in units.items() for note in own}


def _steps(
    model: PeftModel,
    plan: TrainingPlan,
    units: SiteUnits,
    tokens: _Tokens,
    compute: ComputeSettings,
    noise: StepNoise,
    random: SecureRandomness | SeededSampling,
    numbers: SharedNumbers,
    on_step: Callable[[int], None] | None,
) -> dict[str, Released[Fact]]:
    """Run the local steps of one round on the live model; the numbers that leave beside it."""
    privacy = plan.privacy
    shared = numbers.counts(units.train) | numbers.score(model, units.held_out, tokens)
    parameters = trained_parameters(model)
    optimizer = _optimizer(list(parameters.values()), plan.optimizer)
    normal = random.normal if isinstance(random, SecureRandomness) else None
    for step in range(plan.local_steps):
        batch = poisson_sample(
            units.train, privacy.sampling_rate, privacy.max_notes_per_unit, random
        )
        rows = [[tokens(note) for note in notes] for notes in batch]
        numbers.step(model, rows, noise.loss)
        total = clipped_sum(model, rows, privacy.clip_norm, compute.engine, compute.micro_tokens)
        released = noised_mean(
            total, noise.gradient * privacy.clip_norm, privacy.denominator, normal
        )
        for name, p in parameters.items():
            p.grad = released[name].to(p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step:
            on_step(step + 1)
    return shared | numbers.loss(noise.loss)


def _statistics(
    model: PeftModel,
    plan: TrainingPlan,
    units: SiteUnits,
    tokens: _Tokens,
    compute: ComputeSettings,
    charge: Charge,
    random: SecureRandomness,
) -> Released[Statistics] | None:
    """What the merge needs beside the adapter, measured under the trained adapter; None: nothing.

    Sample, noise and divisor are those of one more step, as which it is charged.
    """
    kind, privacy = plan.statistics, plan.privacy
    if kind is None:
        return None
    batch = poisson_sample(units.train, privacy.sampling_rate, privacy.max_notes_per_unit, random)
    rows = [[tokens(note) for note in notes] for notes in batch]
    sums = statistic_sums(
        model, kind, rows, privacy.clip_norm, compute.engine, compute.micro_tokens
    )
    noised = released_statistics(
        kind,
        sums,
        charge.noise_multiplier,
        privacy.clip_norm,
        privacy.denominator,
        random.normal,
    )
    return Released(noised, charge.mechanism("statistics"))


def _reserve(
    ledger: Ledger,
    plan: TrainingPlan,
    received: Adapter,
    policy: SitePolicy,
    audit_head: str | None,
    randomness: str,
) -> tuple[Reservation, Charge]:
    """Noise for all that is still planned, then the charge for this round, on disk.

    Room for the numbers that leave noised is kept before the noise of the steps is solved for.
    """
    privacy = plan.privacy
    names, beside = charges(plan, policy.share)
    later = later_charges(plan, policy.share)
    try:
        sigma = max(
            calibrate(
                (*history, *beside, *later), privacy.sampling_rate, plan.steps_left, budget, delta
            )
            for history, budget, delta in (
                (ledger.history(plan.run), privacy.epsilon, privacy.delta),
                (ledger.history(), ledger.budget, ledger.delta),
            )
        )
        sigma = max(sigma, policy.privacy.min_noise_multiplier)
        reservation = ledger.reserve(
            (GaussianSteps(privacy.sampling_rate, sigma, plan.charged_steps), *beside),
            task=_task(plan, received),
            site=policy.site,
            run=plan.run,
            round=plan.round,
            steps_planned=plan.steps_left,
            plan=hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
            base_model=plan.base_model,
            unit=privacy.unit,
            clip_norm=privacy.clip_norm,
            denominator=privacy.denominator,
            max_notes_per_unit=privacy.max_notes_per_unit,
            randomness=randomness,
            released=sorted(names),
            share=policy.share.model_dump(),
            audit_head=audit_head,
        )
    except BudgetExhausted as problem:
        raise Refusal(Reason.BUDGET_EXHAUSTED, str(problem)) from None
    return reservation, Charge(reservation.seq, sigma, names)


def _task(plan: TrainingPlan, received: Adapter) -> str:
    """SHA-256 of all that a message asks for: what a coordinator sends again is the same task."""
    return hashlib.sha256(
        f"{plan.model_dump_json()}\n{received.fingerprint()}".encode()
    ).hexdigest()


def _optimizer(
    parameters: list[torch.nn.Parameter], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)


class _Tokens:
    """Tokens of a note's public window: its first ``max_tokens`` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens

    def __call__(self, note: Note) -> list[int]:
        return self._tokenizer(note.text, truncation=True, max_length=self._max_tokens).input_ids


@dataclass(frozen=True)
class _Workbench:
    base: BaseModel
    fingerprint: str
    model: PeftModel
    rehearsed: set[tuple[frozenset[str], int, Statistic | None, int]]

    def rehearse(self, plan: TrainingPlan, policy: SitePolicy) -> None:
        """Find out once whether there is memory for such a plan. Raises Refusal.

        How much it takes depends on which layers are trained, not only on how many.
        """
        longest, kind = plan.privacy.max_tokens, plan.statistics
        shares_losses = {policy.share.losses, policy.share.scores} != {"never"}
        scored = plan.privacy.max_notes_per_unit if shares_losses else 0  # notes of a unit
        what = frozenset(trained_parameters(self.model)), longest, kind, scored
        if what in self.rehearsed:
            return
        how = policy.compute.engine, policy.compute.micro_tokens
        try:
            rehearse(self.model, longest, *how)
            if kind:
                statistic_sums(self.model, kind, [[[0] * longest], [[0]]], 1.0, *how)
            if scored:
                unit_losses(self.model, [[[0] * longest] * scored])
        except (MemoryError, RuntimeError):  # which PyTorch raises too
            raise Refusal(Reason.LIMIT_EXCEEDED, "the plan cannot be computed here") from None
        self.rehearsed.add(what)


@lru_cache(maxsize=1)
def _workbench(settings: ModelSettings, compute: ComputeSettings, spec: AdapterSpec) -> _Workbench:
    """Base model with the adapter attached; kept between the messages of one process."""
    try:
        base = load_base(settings)
        if compute.gradient_checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        fingerprint = base.fingerprint
        return _Workbench(base, fingerprint, lora.attach(base.model, spec), set())
    except ModelError as problem:
        raise Refusal(Reason.MODEL_MISMATCH, str(problem)) from None
    except lora.UnsupportedAdapter as problem:
        raise Refusal(Reason.LIMIT_EXCEEDED, str(problem)) from None
