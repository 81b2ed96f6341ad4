"""Settings of the commands other than ``simulate``; ``wardround COMMAND --help`` explains them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from conf.deployment import ClientSettings, ServerSettings
from conf.schema import (
    AdapterSettings,
    AlignmentSettings,
    ComputeSettings,
    ModelSettings,
    NotesSettings,
    OptimizerSettings,
    Positive,
    PrivacySettings,
    Settings,
    TrainingSettings,
    require_float32,
)


class ServerCommand(TrainingSettings):
    """``wardround server``: one federation with real hospitals."""

    run_dir: Path
    server: ServerSettings

    @model_validator(mode="after")
    def _run_has_a_name(self) -> ServerCommand:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", self.run_dir.name):
            raise ValueError(
                f"run_dir={self.run_dir}: its last part names the run, and must be of letters, "
                "digits, '.', '_' and '-', at most 80"
            )
        return self


class ClientCommand(Settings):
    """``wardround client``: one hospital."""

    site: Path
    client: ClientSettings


class AlignCommand(Settings):
    """``wardround align``."""

    adapter: Path
    out: Path
    seed: Annotated[int, Field(ge=0)]
    model: ModelSettings
    alignment: AlignmentSettings

    @model_validator(mode="after")
    def _alignment_fits_model(self) -> AlignCommand:
        require_float32(self.model, self.alignment)
        return self


class EvaluateCommand(Settings):
    """``wardround evaluate``."""

    adapter: Path
    part: Literal["all", "held_out"]
    most: Annotated[int, Field(ge=1)] | None
    max_tokens: Annotated[int, Field(ge=8, le=8192)]
    model: ModelSettings
    notes: NotesSettings


class LedgerPlan(Settings):
    """A plan to be priced by ``wardround ledger plan``."""

    rounds: Annotated[int, Field(ge=1, le=1000)]
    local_steps: Annotated[int, Field(ge=1, le=10_000)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    epsilon: Positive | None
    delta: Annotated[float, Field(gt=0, lt=1)]
    noise_multiplier: Positive | None
    statistics: bool


class LedgerCommand(Settings):
    """``wardround ledger``."""

    site: Path
    figure: Path | None
    out: Path | None
    file: Path | None
    public_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    plan: LedgerPlan

    @model_validator(mode="after")
    def _figure_has_a_known_format(self) -> LedgerCommand:
        if self.figure and self.figure.suffix not in (".svg", ".png", ".pdf"):
            raise ValueError(f"figure={self.figure}: must end in .svg, .png or .pdf")
        return self


class PlantedGradients(Settings):
    """The white box of an audit: canaries whose gradient is known, and sabotaged engines."""

    canaries: Annotated[int, Field(ge=50, le=20_000)]  # a fair coin decides which are included
    blocks: Annotated[int, Field(ge=1)] | None  # of the model, from its first; null keeps all
    noise_multiplier: Positive  # of the one step that is attacked


class PlantedNotes(Settings):
    """The black box of an audit: canary notes at one hospital, and who can tell they were there."""

    canaries: Annotated[int, Field(ge=10, le=10_000)]  # a fair coin decides which are trained on
    controls: Annotated[int, Field(ge=100, le=10_000)]  # notes never trained on
    patients: Annotated[int, Field(ge=1)]  # with ordinary notes, beside the canaries
    population: Annotated[int, Field(ge=20, le=100_000)]  # notes=clinosim: of the catchment
    steps: Annotated[int, Field(ge=1, le=10_000)]


class AuditCommand(Settings):
    """``wardround audit``."""

    out: Path
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None
    model: ModelSettings
    adapter: AdapterSettings
    privacy: PrivacySettings
    optimizer: OptimizerSettings
    compute: ComputeSettings
    notes: NotesSettings
    white_box: PlantedGradients
    black_box: PlantedNotes

    @model_validator(mode="after")
    def _something_is_promised(self) -> AuditCommand:
        if not self.privacy.enabled:
            raise ValueError("privacy=none: there is no promise to audit; the audit adds that arm")
        return self
