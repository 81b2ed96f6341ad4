"""One round at a hospital, in the order that keeps its promises.

    policy -> answered before? -> model -> notes -> noise for the whole plan -> ledger (on disk)
    -> sample, clip, noise, step -> gate -> ledger closed, with the reply

Nothing touches a note's gradient before the charge is on disk, and nothing leaves but through the
gate. A task that was answered before gets the stored reply again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import BaseModel, ModelError, load_base
from adapters.plan import TrainingPlan
from client.notes.load import NotesError, load_notes
from client.notes.note import Note
from client.notes.split import split_units
from client.privacy.accountant import BudgetExhausted, GaussianSteps, calibrate
from client.privacy.authorise import authorise, require_model, require_unit
from client.privacy.engine import clipped_sum, noised_mean, trained_parameters
from client.privacy.gate import Fact, outgoing_facts, outgoing_tensors
from client.privacy.ledger import Ledger, LedgerError, Reservation
from client.privacy.randomness import SecureRandomness, SeededSampling
from client.privacy.sampling import poisson_sample
from client.refusal import Reason, Refusal, failure_site
from conf.policy import SitePolicy
from conf.schema import ModelSettings, OptimizerSettings

log = logging.getLogger(__name__)

Units = dict[str, tuple[Note, ...]]


@dataclass(frozen=True)
class Outgoing:
    """What passed the gate: factors to upload and facts beside them."""

    tensors: dict[str, Tensor]
    facts: dict[str, Fact]

    def to_bytes(self) -> bytes:
        """Safetensors, with the facts as metadata."""
        return safetensors.torch.save(self.tensors, {"facts": json.dumps(self.facts)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Outgoing:
        """Inverse of ``to_bytes``."""
        length = int.from_bytes(content[:8], "little")  # of the header, which is JSON
        facts = json.loads(content[8 : 8 + length])["__metadata__"]["facts"]
        tensors = sorted(safetensors.torch.load(content).items())  # which come in any order
        return cls(dict(tensors), json.loads(facts))


def train_round(
    plan: TrainingPlan,
    received: Adapter,
    policy: SitePolicy,
    on_step: Callable[[int], None] | None = None,
) -> Outgoing:
    """Train the received adapter on this site's notes for one round.

    Raises Refusal, with a reason that may be published, whenever the round cannot or must not be
    done. ``on_step`` is called with the number of finished steps.
    """
    authorise(plan, policy)
    if not plan.privacy.enabled:
        return _train(plan, received, policy, None, on_step)
    try:
        with Ledger.of(policy) as ledger, ledger.turn():
            reply = ledger.reply(_task(plan, received))
            if reply is not None:
                return Outgoing.from_bytes(reply)
            return _train(plan, received, policy, ledger, on_step)
    except LedgerError as problem:
        raise Refusal(Reason.INTERNAL, str(problem)) from None


def _train(
    plan: TrainingPlan,
    received: Adapter,
    policy: SitePolicy,
    ledger: Ledger | None,
    on_step: Callable[[int], None] | None,
) -> Outgoing:
    """The round itself; ``ledger`` None trains without privacy."""
    bench = _workbench(policy.model, plan.spec, plan.adapter.train)
    model = bench.model
    longest = getattr(model.config, "max_position_embeddings", None)
    require_model(plan, bench.fingerprint, longest)
    units, has_patients = training_units(policy, plan.privacy.unit)
    require_unit(plan, has_patients)
    try:
        lora.write(model, received)
    except ValueError as problem:
        raise Refusal(Reason.ADAPTER_INVALID, str(problem)) from None
    tokens = _Tokens(bench.base.tokenizer, plan.privacy.max_tokens)

    facts: dict[str, Fact] = {"site": policy.site, "steps": plan.local_steps}
    facts |= {"patients": len(units), "notes": sum(map(len, units.values()))}
    if ledger is None:
        _steps(
            model,
            plan,
            units,
            tokens,
            0.0,
            SeededSampling(plan.seed, policy.site, plan.round),
            on_step,
        )
        return _through_gate(model, received, plan, policy, facts)

    reservation = _reserve(ledger, plan, received)
    try:
        sigma = reservation.mechanisms[0].noise_multiplier
        _steps(model, plan, units, tokens, sigma, SecureRandomness(), on_step)
        facts |= {"noise_multiplier": sigma, "unit": plan.privacy.unit}
        facts |= {"epsilon_spent": ledger.spent(), "delta": ledger.delta}
        reply = _through_gate(model, received, plan, policy, facts).to_bytes()
    except Refusal as refusal:
        ledger.burn(reservation, refusal.reason.name)
        raise
    except Exception as problem:
        ledger.burn(reservation, Reason.TRAINING_FAILED.name)
        raise Refusal(Reason.TRAINING_FAILED, failure_site(problem)) from None
    ledger.commit(reservation, reply, result=lora.read(model, plan.spec).fingerprint())
    return Outgoing.from_bytes(reply)


def training_units(policy: SitePolicy, unit: str) -> tuple[Units, bool]:
    """Units this site trains on, without its held-out ones, and whether notes have patient ids.

    The split is by patient whatever the privacy unit ("patient" or "note"), so that no patient is
    on both sides. Raises Refusal when the notes cannot be read.
    """
    try:
        notes = load_notes(policy.notes)
    except NotesError as problem:
        raise Refusal(Reason.NOTES_UNUSABLE, str(problem)) from None
    train, _ = split_units(notes.units(), policy.notes.holdout)
    if unit == "note":
        train = {f"{u}\n{note.note_id}": (note,) for u, own in train.items() for note in own}
    return train, notes.has_patients


def _steps(
    model: PeftModel,
    plan: TrainingPlan,
    units: Units,
    tokens: _Tokens,
    sigma: float,
    random: SecureRandomness | SeededSampling,
    on_step: Callable[[int], None] | None,
) -> None:
    """Run the local steps of one round on the live model."""
    privacy = plan.privacy
    parameters = trained_parameters(model)
    optimizer = _optimizer(list(parameters.values()), plan.optimizer)
    normal = random.normal if isinstance(random, SecureRandomness) else None
    for step in range(plan.local_steps):
        batch = poisson_sample(units, privacy.sampling_rate, privacy.max_notes_per_unit, random)
        rows = [[tokens(note) for note in notes] for notes in batch]
        total = clipped_sum(model, rows, privacy.clip_norm)
        released = noised_mean(total, sigma * privacy.clip_norm, privacy.denominator, normal)
        for name, p in parameters.items():
            p.grad = released[name].to(p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step:
            on_step(step + 1)


def _reserve(ledger: Ledger, plan: TrainingPlan, received: Adapter) -> Reservation:
    """Noise for all steps still planned, then the charge for this round's steps, on disk."""
    privacy = plan.privacy
    try:
        sigma = max(
            calibrate(history, privacy.sampling_rate, plan.steps_left, budget, delta)
            for history, budget, delta in (
                (ledger.history(plan.run), privacy.epsilon, privacy.delta),
                (ledger.history(), ledger.budget, ledger.delta),
            )
        )
        return ledger.reserve(
            (GaussianSteps(privacy.sampling_rate, sigma, plan.local_steps),),
            task=_task(plan, received),
            run=plan.run,
            round=plan.round,
            steps_planned=plan.steps_left,
            plan=hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
            base_model=plan.base_model,
            unit=privacy.unit,
            clip_norm=privacy.clip_norm,
            denominator=privacy.denominator,
            max_notes_per_unit=privacy.max_notes_per_unit,
            randomness="ChaCha20, keyed by the operating system",
        )
    except BudgetExhausted as problem:
        raise Refusal(Reason.BUDGET_EXHAUSTED, str(problem)) from None


def _task(plan: TrainingPlan, received: Adapter) -> str:
    """SHA-256 of all that a message asks for: what a coordinator sends again is the same task."""
    return hashlib.sha256(
        f"{plan.model_dump_json()}\n{received.fingerprint()}".encode()
    ).hexdigest()


def _through_gate(
    model: PeftModel,
    received: Adapter,
    plan: TrainingPlan,
    policy: SitePolicy,
    facts: dict[str, Fact],
) -> Outgoing:
    trained = lora.read(model, plan.spec)
    tensors = outgoing_tensors(trained, received, plan)
    return Outgoing(tensors, outgoing_facts(facts, policy))


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


@lru_cache(maxsize=1)
def _workbench(settings: ModelSettings, spec: AdapterSpec, train: str) -> _Workbench:
    """Base model with the adapter attached; kept between the messages of one process."""
    try:
        base = load_base(settings)
        fingerprint = base.fingerprint
        return _Workbench(base, fingerprint, lora.attach(base.model, spec, train))
    except ModelError as problem:
        raise Refusal(Reason.MODEL_MISMATCH, str(problem)) from None
    except lora.UnsupportedAdapter as problem:
        raise Refusal(Reason.LIMIT_EXCEEDED, str(problem)) from None
