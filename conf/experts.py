"""Settings of the commands beyond rounds: ``experts``, ``tradeoff`` and ``transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from conf.schema import Fraction, ModelSettings, Positive, Settings, StrategySettings

Proportion = Annotated[float, Field(gt=0, le=1)]


class SearchSettings(Settings):
    """How a good merge is looked for."""

    evaluations: Annotated[int, Field(ge=1, le=500)]  # 1: the merge as configured
    keep: tuple[str, ...]  # parameters that stay as configured; "weights" for equal weights


class ExpertsCommand(Settings):
    """``wardround experts``."""

    experts: Annotated[tuple[Path, ...], Field(min_length=1)]  # PEFT LoRA folders
    tasks: Annotated[tuple[Path, ...], Field(min_length=1)]  # JSONL, one file a task
    test: tuple[Path, ...]  # JSONL that the table is about; (): the tasks themselves
    out: Path
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    proportions: Annotated[tuple[Proportion, ...], Field(min_length=1)]
    rank: Annotated[int, Field(ge=1)] | None  # of the result; None: the sum of the experts' ranks
    most: Annotated[int, Field(ge=1)] | None
    max_tokens: Annotated[int, Field(ge=8, le=8192)]
    search: SearchSettings
    model: ModelSettings
    strategy: StrategySettings


class IntruderSettings(Settings):
    """What counts as an intruder dimension (arXiv 2410.21228)."""

    vectors: Annotated[int, Field(ge=1, le=1000)]  # leading left singular vectors looked at
    below: Fraction  # largest cosine to any of the base's


class TradeoffCommand(Settings):
    """``wardround tradeoff``."""

    adapter: Path
    clinical: Annotated[tuple[Path, ...], Field(min_length=1)]  # JSONL
    general: Annotated[tuple[Path, ...], Field(min_length=1)]  # JSONL
    out: Path
    points: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]
    most: Annotated[int, Field(ge=1)] | None
    max_tokens: Annotated[int, Field(ge=8, le=8192)]
    intruders: IntruderSettings
    model: ModelSettings

    @model_validator(mode="after")
    def _dense_weights(self) -> TradeoffCommand:
        if self.model.precision == "nf4":
            raise ValueError(
                "model.precision=nf4: 4-bit weights have no singular vectors here; take float32"
            )
        return self


class TransferCommand(Settings):
    """``wardround transfer``."""

    adapter: Path | None  # what moves: a PEFT LoRA folder
    tuned: Path | None  # or: a full model that was tuned from ``base``
    base: Path | Literal["smollm2"]  # the checkpoint that was tuned
    target: Path | Literal["smollm2"]  # the checkpoint that it is applied to
    out: Path
    strength: Positive

    @model_validator(mode="after")
    def _one_thing_moves(self) -> TransferCommand:
        if (self.adapter is None) == (self.tuned is None):
            raise ValueError("give adapter=FOLDER or tuned=FOLDER, one of them")
        return self
