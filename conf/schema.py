"""Types and ranges of every option a person can set.

Each class mirrors one Hydra group under ``conf/``. Validation happens once, before anything runs;
after that the settings are immutable. ``conf.load`` turns a violation into one line that names the
key, the value and what is allowed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
# Blocks of the base model that get an adapter: None all; "half" every second one, with the last;
# "first:N", "last:N"; or their numbers, from 0.
Layers = str | tuple[int, ...] | None
TrainedFactors = Literal["B", "A", "alternate", "both", "core"]
Wire = Literal["float32", "float16", "int8"]


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Settings):
    """Which base model is adapted."""

    source: Literal["smollm2", "path"]
    path: str | None = None  # folder or Hugging Face id, for source=path
    # Of the frozen weights in memory; nf4: 4 bits (QLoRA, arXiv 2305.14314). LoRA is float32.
    precision: Literal["float32", "bfloat16", "nf4"] = "float32"

    @model_validator(mode="after")
    def _path_when_needed(self) -> ModelSettings:
        if self.source == "path" and not self.path:
            raise ValueError("model.path must name a model folder or Hugging Face id")
        return self


class AdapterSettings(Settings):
    """Shape of the LoRA adapter, W = W0 + (alpha / rank) B A, and which factor is trained."""

    rank: Annotated[int, Field(ge=1, le=256)]
    alpha: Positive
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    train: TrainedFactors
    rslora: bool = False  # divide alpha by sqrt(rank) instead of rank (arXiv 2312.03732)
    layers: Layers = None
    freeze_half: bool = False  # each round trains a random half of the adapted matrices (HFT)

    @field_validator("layers", mode="before")
    @classmethod
    def _is_a_rule_or_numbers(cls, layers: object) -> object:
        if isinstance(layers, str):
            fits = re.fullmatch(r"half|(first|last):[1-9][0-9]{0,3}", layers) is not None
        elif isinstance(layers, list | tuple):
            numbers = {n for n in layers if type(n) is int and n >= 0}
            fits = 0 < len(layers) == len(numbers)
        else:
            fits = layers is None
        if not fits:
            raise ValueError(
                f"adapter.layers={str(layers)[:40]}: take null, half, first:N, last:N, or "
                "different numbers such as [0, 1]"
            )
        return layers


MAX_CLIP_NORM = 16.0  # up to here the engine adds clipped gradients without rounding
MOST_STEPS = 100_000  # of one run at one hospital


class PrivacySettings(Settings):
    """The differential privacy asked for by the coordinator's plan.

    ``sampling_rate`` and ``denominator`` are public constants: neither may be derived from the
    number of patients, which is itself private.
    """

    enabled: bool
    unit: Literal["patient", "note"]
    epsilon: Positive
    delta: Annotated[float, Field(ge=1e-10, lt=0.01)]  # below, PLDs lose digits
    # Not so small that steps of the grids it defines could underflow: an error would tell of notes.
    clip_norm: Annotated[float, Field(ge=1e-4, allow_inf_nan=False)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    denominator: Annotated[int, Field(ge=1)]  # units a step is divided by
    max_notes_per_unit: Annotated[int, Field(ge=1, le=64)]
    max_tokens: Annotated[int, Field(ge=8, le=8192)]  # of each note, from its start

    @model_validator(mode="after")
    def _sums_are_exact(self) -> PrivacySettings:
        if self.enabled and self.clip_norm > MAX_CLIP_NORM:
            raise ValueError(
                f"privacy.clip_norm={self.clip_norm:g}: at most {MAX_CLIP_NORM:g} with privacy on"
            )
        return self


class ComputeSettings(Settings):
    """How a hospital computes its gradients: changes time and memory, never the gradients."""

    engine: Literal["fast", "opacus"] = "fast"
    micro_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 256  # at a time; 0: one note
    gradient_checkpointing: bool = False


class OptimizerSettings(Settings):
    """The local optimizer; the learning rate decays linearly over the whole plan."""

    name: Literal["sgd", "adamw"]
    learning_rate: Positive
    final_fraction: Annotated[float, Field(gt=0, le=1)]  # of the learning rate, at the last step


def require_countable(rounds: int, local_steps: int) -> None:
    """Raise ValueError for more steps than a hospital's accountant can weigh in seconds."""
    if rounds * local_steps > MOST_STEPS:
        steps = f"federation.rounds x federation.local_steps = {rounds * local_steps:,}"
        raise ValueError(f"{steps}: at most {MOST_STEPS:,} steps can be accounted for")


class FederationSettings(Settings):
    """Rounds, and how long the coordinator waits for whom."""

    rounds: Annotated[int, Field(ge=1, le=1000)]
    local_steps: Annotated[int, Field(ge=1, le=10_000)]
    min_hospitals: Annotated[int, Field(ge=1)]
    timeout_s: Positive  # for hospitals to connect in a round, and again for their answers
    wire: Wire = "float32"  # of the trained factors on their way; what is frozen stays exact

    @model_validator(mode="after")
    def _can_be_accounted_for(self) -> FederationSettings:
        require_countable(self.rounds, self.local_steps)
        return self


class StrategySettings(Settings):
    """How the hospitals' adapters become one; which parameters there are, the strategy knows."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]

    @property
    def parameters(self) -> dict[str, Any]:
        """All but the name; checked by ``strategies.registry.create``."""
        return dict(self.model_extra or {})


class NotesSettings(Settings):
    """Where notes are and which fields carry what."""

    source: Literal["clinosim", "fhir", "jsonl", "csv", "parquet", "text"]
    path: Path | None = None
    text_field: str = "text"
    patient_field: str | None = None
    note_field: str | None = None
    hospital_field: str | None = None
    document_types: tuple[
        str, ...
    ] = ()  # FHIR: keep only these LOINC codes or titles; () keeps all
    encoding: str = "utf-8"
    min_chars: Annotated[int, Field(ge=1)] = 20
    max_chars: Annotated[int, Field(ge=100)] = 200_000
    on_bad_record: Literal["skip", "refuse"] = "skip"
    holdout: Fraction = 0.2  # share of patients never trained on

    @model_validator(mode="after")
    def _path_when_needed(self) -> NotesSettings:
        if self.source != "clinosim" and self.path is None:
            raise ValueError("notes.path must name the file or folder of notes")
        return self

    @property
    def names_patients(self) -> bool:
        """Whether every note says whose it is; else the unit of privacy can only be the note."""
        return self.source in ("clinosim", "fhir") or self.patient_field is not None


class HospitalsSettings(Settings):
    """How the simulation divides notes among hospitals."""

    layout: Literal["separate", "by_field", "pooled"]
    count: Annotated[int, Field(ge=1, le=100)]
    population: Annotated[int, Field(ge=20, le=100_000)]  # clinosim catchment of each hospital
    max_units: Annotated[int, Field(ge=2)] | None = None  # keep at most so many patients a hospital


class StageSettings(Settings):
    """One alignment stage (SFT or DPO)."""

    steps: Annotated[int, Field(ge=0)]
    batch: Annotated[int, Field(ge=1)]
    learning_rate: Positive


class DpoSettings(StageSettings):
    """Direct preference optimisation adds the strength of its pull to the reference."""

    beta: Positive


class AlignmentSettings(Settings):
    """SFT, then DPO, on MediFlow-schema instructions."""

    enabled: bool
    data: Literal["synthetic", "mediflow"]
    path: Path | None = None  # MediFlow JSONL files; None asks the hub (data=mediflow)
    examples: Annotated[int, Field(ge=8)]
    held_out: Annotated[int, Field(ge=4)]
    max_tokens: Annotated[int, Field(ge=32, le=8192)]
    rank: Annotated[int, Field(ge=1, le=256)]
    alpha: Positive
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    sft: StageSettings
    dpo: DpoSettings


class EvaluationSettings(Settings):
    """What is measured, and on how much."""

    notes: Annotated[int, Field(ge=1)]  # held-out notes a hospital
    max_tokens: Annotated[int, Field(ge=8, le=8192)]
    alone: bool  # also train each hospital alone, as a reference
    pooled_reference: bool  # a sweep also trains on the pooled notes, without privacy


def require_float32(model: ModelSettings, alignment: AlignmentSettings) -> None:
    """Alignment learns on top of weights that the merged adapter was folded into. ValueError."""
    if alignment.enabled and model.precision != "float32":
        raise ValueError(
            f"model.precision={model.precision}: alignment needs float32; or take alignment=none"
        )


class TrainingSettings(Settings):
    """What a coordinator decides: everything that the rounds need, and nothing about notes."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    model: ModelSettings
    adapter: AdapterSettings
    privacy: PrivacySettings
    optimizer: OptimizerSettings
    federation: FederationSettings
    strategy: StrategySettings


class RunSettings(TrainingSettings):
    """Everything ``wardround simulate`` needs: one object, one run."""

    runs: Path  # folder in which run folders are made
    resume: Path | None = None
    compute: ComputeSettings
    notes: NotesSettings
    hospitals: HospitalsSettings
    alignment: AlignmentSettings
    evaluation: EvaluationSettings

    @model_validator(mode="after")
    def _alignment_fits_model(self) -> RunSettings:
        require_float32(self.model, self.alignment)
        return self

    @model_validator(mode="after")
    def _enough_hospitals(self) -> RunSettings:
        if self.federation.min_hospitals > self.sites:
            raise ValueError(
                f"federation.min_hospitals={self.federation.min_hospitals}: must be at most the "
                f"number of hospitals, {self.sites}"
            )
        return self

    @property
    def sites(self) -> int:
        """How many hospitals take part."""
        return 1 if self.hospitals.layout == "pooled" else self.hospitals.count
