"""A federation in memory: the product's private step and its merge, without network and ledger.

Those change no number, and without them a hospital's round can be kept on disk and used again by
every strategy that sends it the same adapter, and its first clipped sum under every budget. The
noise multiplier is solved for once, for all steps. Noise and samples follow from seed, hospital and
round, so that private variants see the same draws (those without privacy draw other samples): the
notes are public, and nothing that is trained here is ever released.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import load_base
from adapters.likelihood import pad_right, token_losses
from adapters.plan import TrainingPlan, plan_round
from adapters.statistics import MeasuredAdapter, load_measured
from benchmarks.merging.departments import Department, Scored
from client.privacy.accountant import calibrate
from client.privacy.engine import Gradient, clipped_sum, noised_mean
from client.privacy.microbatch import Unit
from client.privacy.per_note import trained_parameters
from client.privacy.randomness import SeededSampling
from client.privacy.sampling import poisson_sample
from client.privacy.seeded_noise import SeededNoise
from client.privacy.statistics import released_statistics, statistic_sums
from conf.schema import ModelSettings, TrainingSettings
from strategies.base import Draw, Noise
from strategies.merging import merge
from strategies.registry import create

_RUN = "benchmark"
_MICRO_TOKENS = 768
_SCORED_AT_A_TIME = 16


@dataclass(frozen=True)
class Outcome:
    """What the hospitals sent in the last round, what was known of it, and what it merged to."""

    sent: list[Adapter]
    draw: Draw
    merged: Adapter


class Federation:
    """The base model, loaded once, and hospitals' finished rounds, kept in ``folder``."""

    def __init__(self, model: ModelSettings, folder: Path) -> None:
        base = load_base(model)
        self.tokenizer, self._model = base.tokenizer, base.model
        self._fingerprint = base.fingerprint
        self._folder = folder
        self._attached: tuple[AdapterSpec, PeftModel] | None = None
        self._base_bits: dict[str, list[float]] = {}

    def run(
        self,
        settings: TrainingSettings,
        hospitals: Sequence[Department],
        budgets: Sequence[float | None] = (),
    ) -> Outcome:
        """All rounds of a federation; ``budgets`` are hospitals' own epsilons, in their order."""
        chosen = settings.strategy
        strategy = create(chosen.name, chosen.parameters, settings.adapter.train)
        merged, sent, draw = self.initial(settings), [], Draw()
        weights = [1 / len(hospitals)] * len(hospitals)
        own = [_with_budget(settings, e) for e in budgets or [None] * len(hospitals)]
        for number in range(1, settings.federation.rounds + 1):
            plans = [
                plan_round(s, _RUN, number, self._fingerprint, strategy.statistics) for s in own
            ]
            sent = [self._round(p, merged, h) for p, h in zip(plans, hospitals, strict=True)]
            stds = tuple(plan.noise_std(noise_multiplier(plan)) for plan in plans)
            draw = Draw(_RUN, number, Noise(merged, stds))
            frozen = plans[0].frozen_next
            merged = merge(strategy, sent, weights, draw, origin=merged, orthonormal=frozen).adapter
        return Outcome(sent, draw, merged)

    def initial(self, settings: TrainingSettings) -> Adapter:
        """The public starting point, whose product is zero: the base model."""
        spec = AdapterSpec.of(settings.adapter)
        self._detach()
        return lora.initial(self._model, spec, settings.seed, settings.adapter.train)

    def base_bits(self, settings: TrainingSettings, hospital: Department) -> list[float]:
        """Bits of each held-out note under the base model; computed once."""
        if hospital.name not in self._base_bits:
            self._base_bits[hospital.name] = self.bits(self.initial(settings), hospital.held_out)
        return self._base_bits[hospital.name]

    def bits(self, adapter: Adapter, notes: Sequence[Scored]) -> list[float]:
        """Bits of each note under the base model with the adapter."""
        model = self._with(adapter.spec)
        lora.train_only(model, "both")
        lora.write(model, adapter)
        order = sorted(range(len(notes)), key=lambda i: len(notes[i].ids))
        found = [0.0] * len(notes)
        for first in range(0, len(order), _SCORED_AT_A_TIME):
            chosen = order[first : first + _SCORED_AT_A_TIME]
            with torch.no_grad():
                losses, _ = token_losses(model, *pad_right([notes[i].ids for i in chosen]))
            for i, nats in zip(chosen, losses.double().sum(1).tolist(), strict=True):
                found[i] = round(nats / math.log(2), 2)  # hundreds of bits a note
        return found

    def _round(self, plan: TrainingPlan, received: Adapter, hospital: Department) -> Adapter:
        """A hospital's adapter after one round, from disk if it was computed before."""
        same = plan.model_dump_json(exclude={"strategy"}, exclude_defaults=True)
        units = hashlib.sha256(repr(sorted(hospital.units)).encode()).hexdigest()
        key = f"{same}\n{received.fingerprint()}\n{hospital.name}\n{units}"
        saved = self._folder / hashlib.sha256(key.encode()).hexdigest()[:32]
        if not (saved / "adapter_model.safetensors").exists():
            self._train(plan, received, hospital).save(saved)
        return load_measured(saved)

    def _train(self, plan: TrainingPlan, received: Adapter, hospital: Department) -> Adapter:
        privacy = plan.privacy
        model = self._with(received.spec)
        lora.train_only(model, plan.upload, plan.seed)
        lora.write(model, received)
        sigma = noise_multiplier(plan)
        key = plan.seed, hospital.name, plan.round
        noise = SeededNoise("test:benchmark", *key) if sigma else None
        sampling = noise or SeededSampling(*key)
        for step in range(plan.local_steps):
            rows = poisson_sample(hospital.units, privacy.sampling_rate, 1, sampling)
            if plan.round == 1 and step == 0:
                total = self._first_sum(model, plan, received, rows)
            else:
                total = clipped_sum(model, rows, privacy.clip_norm, "fast", _MICRO_TOKENS)
            released = noised_mean(
                total,
                sigma * privacy.clip_norm,
                privacy.denominator,
                noise.normal if noise else None,
            )
            for name, p in trained_parameters(model).items():
                p.data -= plan.learning_rate(step) * released[name].to(p.dtype)
        trained = lora.read(model, received.spec)
        if plan.statistics is None:
            return trained
        assert noise is not None, "a plan with statistics is private"
        rows = poisson_sample(hospital.units, privacy.sampling_rate, 1, noise)
        sums = statistic_sums(
            model, plan.statistics, rows, privacy.clip_norm, "fast", _MICRO_TOKENS
        )
        statistics = released_statistics(
            plan.statistics, sums, sigma, privacy.clip_norm, privacy.denominator, noise.normal
        )
        return MeasuredAdapter(trained.spec, trained.layers, statistics)

    def _first_sum(
        self, model: PeftModel, plan: TrainingPlan, received: Adapter, rows: Sequence[Unit]
    ) -> Gradient:
        """The first step's sum, from disk if it was computed before: no noise is in it yet."""
        clip_norm = plan.privacy.clip_norm
        trained = self._fingerprint, received.spec, received.fingerprint(), plan.upload, plan.seed
        key = hashlib.sha256(repr((trained, clip_norm, rows)).encode()).hexdigest()[:32]
        saved = self._folder / "first_sums" / f"{key}.safetensors"
        if not saved.exists():
            saved.parent.mkdir(parents=True, exist_ok=True)
            part = saved.with_suffix(f".{os.getpid()}.part")  # another process may make it too
            save_file(clipped_sum(model, rows, clip_norm, "fast", _MICRO_TOKENS), part)
            part.replace(saved)
        return load_file(saved)

    def _with(self, spec: AdapterSpec) -> PeftModel:
        if self._attached is None or self._attached[0] != spec:
            self._detach()
            self._attached = spec, lora.attach(self._model, spec)
        return self._attached[1]

    def _detach(self) -> None:
        if self._attached is not None:
            lora.detach(self._attached[1])
            self._attached = None


def _with_budget(settings: TrainingSettings, epsilon: float | None) -> TrainingSettings:
    if epsilon is None:
        return settings
    privacy = settings.privacy.model_copy(update={"epsilon": epsilon})
    return settings.model_copy(update={"privacy": privacy})


def noise_multiplier(plan: TrainingPlan) -> float:
    """Of every step of the run that ``plan`` is a round of; 0 without privacy."""
    privacy = plan.privacy
    if not privacy.enabled:
        return 0.0
    steps = plan.rounds * plan.charged_steps
    return calibrate((), privacy.sampling_rate, steps, privacy.epsilon, privacy.delta)
