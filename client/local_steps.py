"""A round's private steps on the live model, and the statistics that are measured after them.

    sample units -> a gradient of each, clipped -> sum + noise -> public divisor -> optimizer

Noise, sample and divisor of the statistics are those of one more step, as which they are charged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel

from adapters.plan import TrainingPlan
from adapters.statistics import Statistics
from client.notes.note import Note
from client.privacy.engine import clipped_sum, noised_mean
from client.privacy.metadata import Facts, SharedNumbers, StepNoise
from client.privacy.microbatch import Unit
from client.privacy.per_note import trained_parameters
from client.privacy.randomness import SecureRandomness, SeededSampling
from client.privacy.released import Charge, Released
from client.privacy.sampling import poisson_sample
from client.privacy.statistics import released_statistics, statistic_sums
from client.site_units import SiteUnits
from client.workbench import Workbench
from conf.schema import ComputeSettings, OptimizerSettings


@dataclass(frozen=True)
class LocalSteps:
    """What a round works on: the live adapter on the bench, the plan, and the site's notes."""

    bench: Workbench
    plan: TrainingPlan
    units: SiteUnits
    compute: ComputeSettings

    @property
    def model(self) -> PeftModel:
        """The model that is trained."""
        return self.bench.model

    def run(
        self,
        noise: StepNoise,
        random: SecureRandomness | SeededSampling,
        numbers: SharedNumbers,
        on_step: Callable[[int], None] | None,
    ) -> Facts:
        """Take all steps; the numbers that leave beside the adapter.

        ``random`` draws samples and noise; one that only samples (no privacy) adds no noise.
        """
        plan, privacy = self.plan, self.plan.privacy
        shared = numbers.counts(self.units.train)
        shared |= numbers.score(self.model, self.units.held_out, self._tokens)
        parameters = trained_parameters(self.model)
        optimizer = _optimizer(list(parameters.values()), plan.optimizer)
        normal = random.normal if isinstance(random, SecureRandomness) else None
        noise_std = noise.gradient * privacy.clip_norm
        for step in range(plan.local_steps):
            rows = self._sample(random)
            numbers.step(self.model, rows, noise.loss)
            total = clipped_sum(
                self.model, rows, privacy.clip_norm, self.compute.engine, self.compute.micro_tokens
            )
            released = noised_mean(total, noise_std, privacy.denominator, normal)
            for name, p in parameters.items():
                p.grad = released[name].to(p.dtype)
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if on_step:
                on_step(step + 1)
        return shared | numbers.loss(noise.loss)

    def statistics(self, charge: Charge, random: SecureRandomness) -> Released[Statistics] | None:
        """What the merge needs beside the adapter, under the trained adapter; None: nothing."""
        kind, privacy, compute = self.plan.statistics, self.plan.privacy, self.compute
        if kind is None:
            return None
        sums = statistic_sums(
            self.model,
            kind,
            self._sample(random),
            privacy.clip_norm,
            compute.engine,
            compute.micro_tokens,
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

    def _sample(self, random: SecureRandomness | SeededSampling) -> list[Unit]:
        """Token rows of a Poisson sample of the units that are trained on."""
        privacy = self.plan.privacy
        batch = poisson_sample(
            self.units.train, privacy.sampling_rate, privacy.max_notes_per_unit, random
        )
        return [[self._tokens(note) for note in notes] for notes in batch]

    def _tokens(self, note: Note) -> list[int]:
        """Tokens of a note's public window: its first ``max_tokens``."""
        longest = self.plan.privacy.max_tokens
        return self.bench.base.tokenizer(note.text, truncation=True, max_length=longest).input_ids


def _optimizer(
    parameters: list[torch.nn.Parameter], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
