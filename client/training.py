"""One round at a hospital, in the order that keeps its promises.

    policy -> answered before? -> model -> notes -> noise for the whole plan -> ledger (on disk)
    -> sample, clip, noise, step -> statistics if asked for -> gate -> rounded for the wire
    -> ledger closed, with the reply

Nothing touches a note's gradient before the charge is on disk, and nothing leaves but through the
gate. A task that was answered before gets the stored reply again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime

from adapters import lora
from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from client.local_steps import LocalSteps
from client.privacy.accountant import BudgetExhausted, GaussianSteps, calibrate
from client.privacy.authorise import (
    authorise,
    require_layers,
    require_model,
    require_unit,
)
from client.privacy.gate import Gate, Outgoing
from client.privacy.ledger import Ledger, LedgerError, Reservation
from client.privacy.metadata import (
    Facts,
    SharedNumbers,
    StepNoise,
    charges,
    later_charges,
    step_noise,
)
from client.privacy.randomness import SecureRandomness, SeededSampling
from client.privacy.released import Charge, Fact, Released, Source
from client.privacy.seeded_noise import SeededNoise
from client.privacy.unprotected import mark_unprotected, open_protected
from client.refusal import Reason, Refusal, failure_site
from client.site_units import site_units
from client.upload import rounded
from client.workbench import workbench
from conf.policy import SitePolicy


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
        return _train_unprotected(plan, received, policy, on_step)
    random = SecureRandomness()
    if test_seed is not None:
        random = SeededNoise(policy.lineage, test_seed, policy.site, _task(plan, received))
    try:
        with open_protected(policy) as ledger, ledger.turn():
            reply = ledger.reply(_task(plan, received), share=policy.share.model_dump())
            if reply is not None:
                return Outgoing.from_bytes(reply)
            return _train_private(plan, received, policy, ledger, random, on_step, audit_head)
    except LedgerError as problem:
        raise Refusal(Reason.INTERNAL, str(problem)) from None


def _train_unprotected(
    plan: TrainingPlan,
    received: Adapter,
    policy: SitePolicy,
    on_step: Callable[[int], None] | None,
) -> Outgoing:
    local = _prepared(plan, received, policy)
    sampling = SeededSampling(plan.seed, policy.site, plan.round)
    numbers = SharedNumbers(plan, policy)
    facts = _facts(plan, policy) | local.run(StepNoise(0.0, None), sampling, numbers, on_step)
    trained = Released(lora.read(local.model, plan.spec), Source.POLICY_PUBLIC)
    mark_unprotected(policy)  # before anything leaves
    released = Gate(plan, policy, received, charge=None).release(trained, facts)
    return rounded(released, plan, received, policy)


def _train_private(
    plan: TrainingPlan,
    received: Adapter,
    policy: SitePolicy,
    ledger: Ledger,
    random: SecureRandomness,
    on_step: Callable[[int], None] | None,
    audit_head: str | None,
) -> Outgoing:
    local = _prepared(plan, received, policy)
    local.bench.rehearse(plan, policy)
    reservation, charge = _reserve(ledger, plan, received, policy, audit_head, random.name)
    try:
        noise = step_noise(charge.noise_multiplier, policy.share)
        numbers = SharedNumbers(plan, policy, charge, random)
        facts = _facts(plan, policy) | local.run(noise, random, numbers, on_step)
        facts |= {
            "unit": Released(plan.privacy.unit, Source.PLAN),
            "noise_multiplier": Released(charge.noise_multiplier, Source.LEDGER),
            "epsilon_spent": Released(ledger.spent(), Source.LEDGER),
            "delta": Released(ledger.delta, Source.LEDGER),
        }
        trained = Released(lora.read(local.model, plan.spec), charge.mechanism("gradient"))
        measured = local.statistics(charge, random)
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


def _prepared(plan: TrainingPlan, received: Adapter, policy: SitePolicy) -> LocalSteps:
    """The received adapter on the model, and the notes, if the site can do what is asked."""
    bench = workbench(policy.model, policy.compute, plan.spec)
    longest = getattr(bench.model.config.get_text_config(), "max_position_embeddings", None)
    require_model(plan, bench.fingerprint, longest)
    require_layers(plan, policy, lora.depth(bench.base.model))
    try:
        trained_layers = plan.trained_layers(received.layers)
        lora.train_only(bench.model, plan.upload, plan.seed, trained_layers)
    except lora.UnsupportedAdapter as problem:
        raise Refusal(Reason.LIMIT_EXCEEDED, str(problem)) from None
    units = site_units(policy, plan.privacy.unit)
    require_unit(plan, units.has_patients)
    try:
        lora.write(bench.model, received)
    except ValueError as problem:
        raise Refusal(Reason.ADAPTER_INVALID, str(problem)) from None
    return LocalSteps(bench, plan, units, policy.compute)


def _facts(plan: TrainingPlan, policy: SitePolicy) -> Facts:
    return {
        "site": Released[Fact](policy.site, Source.POLICY_PUBLIC),
        "steps": Released[Fact](plan.local_steps, Source.PLAN),
    }


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
