"""A finished run as the reports read it: ``summary.json`` and ``config.yaml``, checked and typed.

A record that lacks what a report must state (a budget where privacy was on, the scores of the base
model) is refused with one line; a part that did not run (alignment, each hospital alone) is absent.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Stage = Literal["base", "local", "merged", "aligned"]
Measure = Literal["perplexity", "bits_per_char"]
STAGES: tuple[Stage, ...] = ("base", "local", "merged", "aligned")


class RunRecordError(ValueError):
    """A run folder that no report can be written from; the message is one line."""


class Part(BaseModel):
    """Base of all parts of a summary: immutable; keys that no report shows are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ModelPart(Part):
    """The base model."""

    name: str
    fingerprint: str
    parameters: int | None = None


class PrivacyPart(Part):
    """The privacy the run was asked for; when it is off, only ``enabled`` must be there."""

    enabled: bool
    unit: Literal["patient", "note"] = "patient"
    epsilon_budget: float | None = None
    delta: float | None = None
    accountant: str | None = None
    clip_norm: float | None = None
    sampling_rate: float | None = None

    @model_validator(mode="after")
    def _statement_is_complete(self) -> PrivacyPart:
        missing = [k for k in ("epsilon_budget", "delta", "accountant") if getattr(self, k) is None]
        if self.enabled and missing:
            raise ValueError(f"privacy is enabled but {', '.join(missing)} is missing")
        return self


class Scores(Part):
    """One measure on held-out notes for each stage; None where the stage did not run."""

    base: float
    local: float | None = None
    merged: float | None = None
    aligned: float | None = None

    def of(self, stage: Stage) -> float | None:
        """The score of ``stage``, or None where it was not measured or is not finite."""
        value = cast(float | None, getattr(self, stage))
        return value if value is not None and math.isfinite(value) else None


class RoundScore(Part):
    """Held-out scores of the global adapter after one round."""

    round: int
    perplexity: float
    bits_per_char: float


class HospitalPart(Part):
    """One hospital: what it holds, what it spent, how well it is served."""

    patients: int | None = None
    notes: int | None = None
    rejected_records: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    perplexity: Scores
    bits_per_char: Scores
    by_round: tuple[RoundScore, ...] = ()
    simulation_only: tuple[str, ...] = ()

    def scores(self, measure: Measure) -> Scores:
        """The scores of one measure."""
        return self.perplexity if measure == "perplexity" else self.bits_per_char

    def trajectory(self, measure: Measure) -> list[tuple[int, float]]:
        """(round, score) from the base model, which is round 0, to the last round; finite only."""
        points = {0: self.scores(measure).base}
        points |= {r.round: float(getattr(r, measure)) for r in self.by_round}
        return [(n, value) for n, value in sorted(points.items()) if math.isfinite(value)]


class RoundPart(Part):
    """One round of the federation; ``bytes_*`` and ``seconds`` count all its hospitals.

    What the merge says of itself is explained in ``strategies.merging.Merge``.
    """

    round: int
    seconds: float
    bytes_up: int
    bytes_down: int
    uploads: dict[str, int] = Field(default_factory=dict)  # bytes by hospital that was merged
    download: int | None = None  # bytes to each
    rank: int | None = None
    kept_energy: float | None = None
    discrepancy: float | None = None
    mean_cosine: float | None = None
    norm_ratio: float | None = None
    hospitals: tuple[str, ...] = ()
    left_out: dict[str, str] = Field(default_factory=dict)
    sigma: dict[str, float | None] = Field(default_factory=dict)


class StagePart(Part):
    """One alignment stage; the sequences hold one value for each logged step."""

    steps: int = 0
    seconds: float | None = None
    examples: int | None = None
    loss: tuple[float, ...] = ()
    margin: tuple[float, ...] = ()
    accuracy: tuple[float, ...] = ()


class InstructionPart(Part):
    """Scores on held-out instructions."""

    loss: float | None = None
    perplexity: float | None = None
    preference_accuracy: float | None = None
    examples: int | None = None


class AlignmentPart(Part):
    """What SFT and DPO did; empty when alignment was off."""

    sft: StagePart | None = None
    dpo: StagePart | None = None
    instructions: dict[Stage, InstructionPart] = Field(default_factory=dict)


class Summary(Part):
    """``summary.json``: everything a run measured."""

    run: str
    created: datetime
    seed: int | None = None
    model: ModelPart
    strategy: str
    privacy: PrivacyPart
    hospitals: dict[str, HospitalPart] = Field(min_length=1)
    rounds: tuple[RoundPart, ...] = ()
    alignment: AlignmentPart = AlignmentPart()
    peak_rss_mb: float | None = None
    seconds: float | None = None
    stages: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def sent_a_round(self, hospital: str) -> float | None:
        """Mean bytes that a hospital sent in the rounds it was merged in; None where unknown."""
        own = [r.uploads[hospital] for r in self.rounds if hospital in r.uploads]
        return sum(own) / len(own) if own else None

    def received_a_round(self, hospital: str) -> float | None:
        """Mean bytes that it was sent in those rounds."""
        own = [r.download for r in self.rounds if hospital in r.uploads and r.download is not None]
        return sum(own) / len(own) if own else None

    def merged_rounds(self, hospital: str) -> int:
        """In how many rounds with known traffic a hospital was merged."""
        return sum(hospital in r.uploads for r in self.rounds)

    def stages_measured(self) -> list[Stage]:
        """The stages that at least one hospital was evaluated on, in order."""
        return [
            stage
            for stage in STAGES
            if any(h.perplexity.of(stage) is not None for h in self.hospitals.values())
        ]

    def simulation_only(self, field: str) -> bool:
        """Whether a real hospital would keep ``field`` to itself."""
        return any(field in h.simulation_only for h in self.hospitals.values())


@dataclass(frozen=True)
class Run:
    """A run folder's two records: what was measured, and the configuration that produced it."""

    folder: Path
    summary: Summary
    config: dict[str, Any]
    config_text: str

    @property
    def pooled(self) -> bool:
        """Whether the notes of all hospitals were brought together."""
        hospitals = self.config.get("hospitals")
        return isinstance(hospitals, dict) and hospitals.get("layout") == "pooled"


def parse_summary(content: Any, where: str = "summary") -> Summary:
    """Check a decoded ``summary.json``.

    Raises
    ------
    RunRecordError
        Naming the first key that is missing or has an impossible value.
    """
    try:
        return content if isinstance(content, Summary) else Summary.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RunRecordError(
            f"{where}: {key}: {first['msg']}; was it written by this version?"
        ) from None


def load_run(folder: Path) -> Run:
    """Read ``summary.json`` and ``config.yaml`` of a run folder.

    Raises
    ------
    RunRecordError
        When a file is missing, cannot be read, or is not what a finished run writes.
    """
    summary_file, config_file = folder / "summary.json", folder / "config.yaml"
    for file in (summary_file, config_file):
        if not file.is_file():
            raise RunRecordError(f"{file} is missing: a report needs the folder of a finished run")
    try:
        content = json.loads(summary_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunRecordError(f"{summary_file} is not JSON ({error})") from None
    config_text = config_file.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        raise RunRecordError(f"{config_file} is not YAML") from None
    if not isinstance(config, dict):
        raise RunRecordError(f"{config_file} holds no configuration")
    return Run(folder, parse_summary(content, str(summary_file)), config, config_text)
