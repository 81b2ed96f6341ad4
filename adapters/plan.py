"""The training plan: what a coordinator asks of a hospital for one round.

It crosses a trust boundary, so it is validated on arrival. It holds wishes, never permissions: the
site policy decides, and the hospital itself computes the noise that the plan's epsilon requires.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from adapters.adapter import AdapterSpec
from adapters.trained_part import TrainedPart, part_of_round
from conf.schema import (
    AdapterSettings,
    OptimizerSettings,
    PrivacySettings,
    Settings,
    TrainingSettings,
    Wire,
)


class TrainingPlan(Settings):
    """One round of a run of ``rounds`` rounds, each of ``local_steps`` steps."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,80}$")]
    round: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1, le=1000)]
    local_steps: Annotated[int, Field(ge=1, le=10_000)]
    # Of the frames of a core, and of the sampling where privacy is off; never of noise.
    seed: Annotated[int, Field(ge=0)]
    strategy: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
    base_model: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # fingerprint
    adapter: AdapterSettings
    privacy: PrivacySettings
    optimizer: OptimizerSettings
    upload: TrainedPart
    wire: Wire = "float32"

    @model_validator(mode="after")
    def _round_is_planned(self) -> TrainingPlan:
        if self.round > self.rounds:
            raise ValueError(f"round {self.round} of {self.rounds}")
        return self

    @model_validator(mode="after")
    def _uploads_what_is_trained(self) -> TrainingPlan:
        if self.upload != part_of_round(self.adapter.train, self.round):
            raise ValueError("upload must be what adapter.train says of this round")
        return self

    @property
    def spec(self) -> AdapterSpec:
        """Shape of the adapter that travels."""
        return AdapterSpec.of(self.adapter)

    @property
    def steps_left(self) -> int:
        """Steps of this round and of all that follow."""
        return (self.rounds - self.round + 1) * self.local_steps

    def learning_rate(self, step: int) -> float:
        """Rate of local step 0, 1, ...: linear decay over all steps of all rounds."""
        total = self.rounds * self.local_steps
        done = (self.round - 1) * self.local_steps + step
        progress = done / max(1, total - 1)
        fraction = 1 - (1 - self.optimizer.final_fraction) * progress
        return self.optimizer.learning_rate * fraction


def plan_round(settings: TrainingSettings, run: str, number: int, base_model: str) -> TrainingPlan:
    """The plan of round ``number`` (from 1) under the given settings."""
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
    )
