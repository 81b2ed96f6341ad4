"""The site policy: one file that the hospital owns and the coordinator never sees.

A coordinator's plan may only be stricter than the policy. Nothing in a message can change it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from conf.schema import ModelSettings, NotesSettings, Positive, Settings


class PrivacyLimits(Settings):
    """What the hospital will spend, over the whole life of one data lineage."""

    required: bool = True  # False only where every patient is simulated or public
    unit: Literal["patient", "note"] = "patient"
    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=0.01)]
    max_clip_norm: Positive = 10.0
    max_notes_per_unit: Annotated[int, Field(ge=1, le=64)] = 8
    max_tokens: Annotated[int, Field(ge=8, le=8192)] = 2048  # of each note


class AdapterLimits(Settings):
    """Which adapters the hospital will train."""

    max_rank: Annotated[int, Field(ge=1)] = 64
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",  # Llama-like
        "c_attn", "c_proj", "c_fc",  # GPT-2-like
    )  # fmt: skip
    base_models: tuple[str, ...] = ()  # allowed fingerprints; () allows the configured model only


class SitePolicy(Settings):
    """Everything a hospital decides for itself."""

    site: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
    lineage: Annotated[str, Field(min_length=1)]  # names the data set the budget belongs to
    ledger: Path
    site_key: Path | None = None  # the site's secret; None: beside the ledger, as NAME.key
    anchor: Path | None = None  # on another disk: shows a ledger that was rolled back
    notes: NotesSettings
    model: ModelSettings
    privacy: PrivacyLimits
    adapter: AdapterLimits = AdapterLimits()
    share_counts: Literal["never", "public"] = "never"  # number of patients and notes
