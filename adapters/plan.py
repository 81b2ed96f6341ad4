"""The training plan: what a coordinator asks of a hospital for one round.

It crosses a trust boundary, so it is validated on arrival. It holds wishes, never permissions: the
site policy decides, and the hospital itself computes the noise that the plan's epsilon requires.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.chosen_layers import half_of
from adapters.statistics import Statistic
from adapters.trained_part import TrainedPart, frozen_suffix, joined, part_of_round, to_travel
from conf.schema import (
    AdapterSettings,
    OptimizerSettings,
    PrivacySettings,
    Settings,
    TrainingSettings,
    Wire,
    require_countable,
)


class TrainingPlan(Settings):
    """One round of a run of ``rounds`` rounds, each of ``local_steps`` steps."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,80}$")]
    round: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1, le=1000)]
    local_steps: Annotated[int, Field(ge=1, le=10_000)]
    # Of frames of a core, of halves, and of the sampling where privacy is off; never of noise.
    seed: Annotated[int, Field(ge=0)]
    strategy: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
    base_model: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # fingerprint
    adapter: AdapterSettings
    privacy: PrivacySettings
    optimizer: OptimizerSettings
    upload: TrainedPart
    wire: Wire = "float32"
    statistics: Statistic | None = None  # that the merge needs beside the adapter

    @model_validator(mode="after")
    def _round_is_planned(self) -> TrainingPlan:
        if self.round > self.rounds:
            raise ValueError(f"round {self.round} of {self.rounds}")
        require_countable(self.rounds, self.local_steps)
        return self

    @model_validator(mode="after")
    def _uploads_what_is_trained(self) -> TrainingPlan:
        if self.upload != part_of_round(self.adapter.train, self.round):
            raise ValueError("upload must be what adapter.train says of this round")
        return self

    @model_validator(mode="after")
    def _statistics_are_noised(self) -> TrainingPlan:
        if self.statistics and not self.privacy.enabled:
            raise ValueError("statistics leave noised only, and privacy is off")
        if self.statistics and self.adapter.freeze_half:
            raise ValueError("statistics are of all layers, and adapter.freeze_half trains half")
        return self

    @property
    def spec(self) -> AdapterSpec:
        """Shape of the adapter that travels."""
        return AdapterSpec.of(self.adapter)

    @property
    def frozen_next(self) -> Literal["A", "B"]:
        """The factor that the next round leaves as it is; A where both are trained."""
        return "B" if part_of_round(self.adapter.train, self.round + 1) == "A" else "A"

    @property
    def charged_steps(self) -> int:
        """Steps that this round is charged: its own, and one more for statistics."""
        return self.local_steps + (self.statistics is not None)

    @property
    def steps_left(self) -> int:
        """Steps that this round and all that follow are charged."""
        return (self.rounds - self.round + 1) * self.charged_steps

    def trained_layers(self, layers: Iterable[str]) -> frozenset[str]:
        """Of the adapted layers those that this round trains; the others stay as received."""
        if not self.adapter.freeze_half:
            return frozenset(layers)
        return half_of(layers, self.seed, self.round)

    def travels_exactly(self, names: Iterable[str]) -> frozenset[str]:
        """Of an adapter's tensors those that this round leaves as they are."""
        known = list(names)
        moved = self.trained_layers({name.rpartition(".lora_")[0] for name in known})
        frozen = frozen_suffix(self.upload)
        return frozenset(
            name
            for name in known
            if name.rpartition(".lora_")[0] not in moved or (frozen and name.endswith(frozen))
        )

    def to_travel(self, trained: Adapter) -> dict[str, Tensor]:
        """The tensors of a trained adapter that go back to the coordinator, by name."""
        part = trained.only(self.trained_layers(trained.layers))
        return to_travel(part, self.upload, self.seed)

    def joined(self, sent: Adapter, travelled: Mapping[str, Tensor]) -> Adapter:
        """``sent`` with what came back in its place; inverse of ``to_travel``.

        Raises ValueError on unknown, missing or misshapen entries.
        """
        part = sent.only(self.trained_layers(sent.layers))
        return sent.updated(joined(part, travelled, self.upload, self.seed))

    def noise_std(self, noise_multiplier: float) -> float:
        """Of the noise in every trained entry after this round's steps of plain SGD.

        Each step subtracts rate (S + sigma C N) / D, and variances add.
        """
        rates = (self.learning_rate(step) ** 2 for step in range(self.local_steps))
        own = noise_multiplier * self.privacy.clip_norm / self.privacy.denominator
        return own * math.sqrt(sum(rates))

    def learning_rate(self, step: int) -> float:
        """Rate of local step 0, 1, ...: linear decay over all steps of all rounds."""
        total = self.rounds * self.local_steps
        done = (self.round - 1) * self.local_steps + step
        progress = done / max(1, total - 1)
        fraction = 1 - (1 - self.optimizer.final_fraction) * progress
        return self.optimizer.learning_rate * fraction


def plan_round(
    settings: TrainingSettings,
    run: str,
    number: int,
    base_model: str,
    statistics: Statistic | None = None,
) -> TrainingPlan:
    """The plan of round ``number`` (from 1); ``statistics`` are those that the strategy needs."""
    return TrainingPlan(
        run=run,
        round=number,
        rounds=settings.federation.rounds,
        local_steps=settings.federation.local_steps,
        seed=settings.seed,
        strategy=settings.strategy.name,
        base_model=base_model,
        adapter=settings.adapter,
        privacy=settings.privacy,
        optimizer=settings.optimizer,
        upload=part_of_round(settings.adapter.train, number),
        wire=settings.federation.wire,
        statistics=statistics,
    )
