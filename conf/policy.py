"""The site policy: one file that the hospital owns and the coordinator never sees.

A coordinator's plan may only be stricter than the policy. Nothing in a message can change it.
``conf/site.example.yaml`` shows and explains every key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from conf.deployment import is_address
from conf.quiet_hours import parse
from conf.schema import (
    MAX_CLIP_NORM,
    ComputeSettings,
    ModelSettings,
    NotesSettings,
    Positive,
    Settings,
    TrainedFactors,
)

Share = Literal["never", "noised", "public"]
Targets = tuple[str, ...]


def _window(text: str) -> str:
    try:
        parse(text)
    except ValueError as problem:
        raise ValueError(f"quiet_hours: {problem}") from None
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", text):
        raise ValueError(
            f"site={text!r}: must be letters, digits, '.', '_' and '-', at most 63, the first a "
            "letter or digit"
        )
    if text.casefold() == "global":
        raise ValueError(f"site={text}: the merged adapter has this name; take another")
    return text


def _address(text: str) -> str:
    if not is_address(text):
        raise ValueError(f"coordinator.address={text}: must be HOST:PORT")
    return text


class PrivacyLimits(Settings):
    """What the hospital will spend, over the whole life of one data lineage."""

    required: bool = True  # False only where every patient is simulated or public
    unit: Literal["patient", "note"] = "patient"
    epsilon: Positive
    delta: Annotated[float, Field(ge=1e-10, lt=0.01)]  # below, PLDs lose digits
    min_noise_multiplier: Annotated[float, Field(ge=0, le=100)] = 0.5  # a floor, not a wish
    max_sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_clip_norm: Annotated[float, Field(gt=0, le=MAX_CLIP_NORM)] = 10.0
    max_notes_per_unit: Annotated[int, Field(ge=1, le=64)] = 8
    max_tokens: Annotated[int, Field(ge=8, le=8192)] = 2048  # of each note


class AdapterLimits(Settings):
    """Which adapters the hospital will train."""

    max_rank: Annotated[int, Field(ge=1)] = 64
    max_layers: Annotated[int, Field(ge=1)] | None = None  # blocks with an adapter; None: all
    targets: Targets = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",  # Llama-like
        "c_attn", "c_proj", "c_fc",  # GPT-2-like
    )  # fmt: skip
    train: tuple[TrainedFactors, ...] = get_args(TrainedFactors)
    strategies: tuple[str, ...] = ("*",)  # patterns that the name of the merge must match
    base_models: tuple[str, ...] = ()  # allowed fingerprints; () allows the configured model only


class CoordinatorLimits(Settings):
    """Whom the hospital works for."""

    # HOST:PORT that the daemon may connect to; None: the one given to the command
    address: Annotated[str, AfterValidator(_address)] | None = None
    runs: Annotated[str, Field(min_length=1)] = "*"  # pattern that a run's name must match


class ShareLimits(Settings):
    """What leaves beside the adapter: ``never``, ``noised`` and charged, or ``public`` (exact)."""

    counts: Share = "never"  # of patients and notes trained on
    losses: Share = "never"  # of training
    scores: Share = "never"  # loss of the received adapter on held-out patients
    statistics: Literal["never", "noised"] = "never"  # for merges that weigh by them; never exact
    noise: Annotated[float, Field(ge=1, le=1000)] = 10.0  # standard deviation / sensitivity
    loss_bound: Positive = 8.0  # nats; a patient's larger loss counts as this


class SitePolicy(Settings):
    """Everything a hospital decides for itself."""

    site: Annotated[str, AfterValidator(_name)]
    lineage: Annotated[str, Field(min_length=1)]  # names the data set the budget belongs to
    ledger: Path
    site_key: Path | None = None  # the site's secret; None: beside the ledger, as NAME.key
    anchor: Path | None = None  # on another disk: shows a ledger that was rolled back
    audit_log: Path | None = None  # None: beside the ledger
    coordinator: CoordinatorLimits = CoordinatorLimits()
    quiet_hours: tuple[Annotated[str, AfterValidator(_window)], ...] = ()
    notes: NotesSettings
    model: ModelSettings
    compute: ComputeSettings = ComputeSettings()
    privacy: PrivacyLimits
    adapter: AdapterLimits = AdapterLimits()
    share: ShareLimits = ShareLimits()

    @model_validator(mode="after")
    def _paths_are_whole(self) -> SitePolicy:
        for key in ("ledger", "site_key", "anchor", "audit_log"):
            path = getattr(self, key)
            if path is not None and not path.is_absolute():
                raise ValueError(
                    f"{key}={path}: must be a whole path, beginning with /: what was spent must "
                    "not depend on the folder that the client is started in"
                )
        return self

    @property
    def audit_file(self) -> Path:
        """Where the audit log lies."""
        return self.audit_log or self.ledger.with_suffix(".audit.jsonl")
