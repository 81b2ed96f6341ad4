"""``summary.json``: everything a run measured, gathered in one place.

What a hospital may not publish in a real run is named in its ``simulation_only`` list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from adapters.adapter import AdapterSpec
from adapters.base_model import BaseModel
from adapters.chosen_layers import layer_number
from client.privacy.accountant import NAME as ACCOUNTANT
from client.privacy.ledger import Ledger
from client.site_units import site_units
from conf.schema import RunSettings
from server.release_card import AlignmentFacts, HospitalFacts, PrivacyFacts, ReleaseFacts, Score
from server.run_folder import RunFolder, write_atomically
from simulation.sites import Hospitals, Site
from strategies.registry import create

_PACKAGES = (
    "wardround", "torch", "transformers", "peft", "flwr", "opacus", "dp-accounting", "trl",
    "clinosim",
)  # fmt: skip
_SIMULATION_ONLY = (
    "patients",
    "notes",
    "rejected_records",
    "perplexity",
    "bits_per_char",
    "by_round",
)


@dataclass
class Measurements:
    """What a run collects on its way to the summary."""

    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # by hospital
    alignment: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)  # seconds by stage
    notices: list[str] = field(default_factory=list)


def write_summary(
    settings: RunSettings,
    folder: RunFolder,
    base: BaseModel,
    hospitals: Hospitals,
    measured: Measurements,
    seconds: float,
    peak_mb: float,
) -> dict[str, Any]:
    """Gather, write ``summary.json`` and return it."""
    privacy = settings.privacy
    summary = {
        "run": folder.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": settings.seed,
        "model": {
            "name": base.name,
            "fingerprint": (folder.path / "base_model.txt").read_text().strip(),
            "parameters": sum(p.numel() for p in base.model.parameters()),
        },
        "strategy": settings.strategy.name,
        "privacy": {
            "enabled": privacy.enabled,
            "unit": privacy.unit,
            "epsilon_budget": privacy.epsilon if privacy.enabled else None,
            "delta": privacy.delta,
            "accountant": ACCOUNTANT if privacy.enabled else None,
            "clip_norm": privacy.clip_norm,
            "sampling_rate": privacy.sampling_rate,
        },
        "hospitals": {
            name: {**_holdings(settings, site, name), **measured.scores[name]}
            for site in hospitals.sites
            for name in site.stands_for
        },
        "rounds": [
            {k: v for k, v in r.items() if k != "facts"}
            | {"sigma": {s: f.get("noise_multiplier") for s, f in r["facts"].items()}}
            for r in folder.finished_rounds()
        ],
        "alignment": measured.alignment,
        "peak_rss_mb": round(peak_mb, 1),
        "seconds": round(seconds, 1),
        "stages": {name: round(value, 1) for name, value in measured.stages.items()},
        "versions": {package: version(package) for package in _PACKAGES},
        "notices": measured.notices,
    }
    write_atomically(folder.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def release_facts(
    settings: RunSettings, summary: dict[str, Any], base: BaseModel, shape: AdapterSpec
) -> ReleaseFacts:
    """The model card's facts from a summary; ``shape`` is that of the released adapter."""
    privacy = None
    if settings.privacy.enabled:
        privacy = PrivacyFacts(
            unit=settings.privacy.unit,
            epsilon_budget=settings.privacy.epsilon,
            accountant=ACCOUNTANT,
            clip_norm=settings.privacy.clip_norm,
            sampling_rate=settings.privacy.sampling_rate,
        )
    stages = summary["alignment"]
    alignment = None
    if stages:
        source = f"MediFlow-schema instructions ({settings.alignment.data})"
        steps = {s: stages.get(s, {}).get("steps", 0) for s in ("sft", "dpo")}
        alignment = AlignmentFacts(source, steps["sft"], steps["dpo"])
    chosen = settings.strategy
    strategy = create(chosen.name, chosen.parameters, settings.adapter.train)
    return ReleaseFacts(
        name=summary["run"],
        created=summary["created"],
        base_model=base.public_name,
        base_fingerprint=summary["model"]["fingerprint"],
        base_remark=base.remark,
        strategy=summary["strategy"],
        rounds=len(summary["rounds"]),
        rank=shape.rank,
        alpha=shape.alpha,
        targets=tuple(sorted({target.rpartition(".")[2] for target in shape.targets})),
        layers=_layers(shape.targets),
        trained=settings.adapter.train,
        hospitals=tuple(
            HospitalFacts(name, h["epsilon"], h["delta"])
            for name, h in summary["hospitals"].items()
        ),
        privacy=privacy,
        alignment=alignment,
        evaluation=tuple(_evaluation(summary)),
        pooled=settings.hospitals.layout == "pooled",
        statistics=strategy.statistics,
        simulated=settings.notes.source == "clinosim",
        versions=tuple(summary["versions"].items()),
    )


def _holdings(settings: RunSettings, site: Site, name: str) -> dict[str, Any]:
    """What a hospital holds and what it has spent, from its notes and its own ledger."""
    privacy = settings.privacy
    units = site_units(site.policy, "patient")
    own = {u: n for u, n in units.train.items() if (n[0].hospital or site.name) == name}
    epsilon = None
    if privacy.enabled:
        with Ledger.of(site.policy) as ledger:
            epsilon = ledger.spent()
    return {
        "patients": len(own) if units.has_patients else None,
        "notes": sum(map(len, own.values())),
        "rejected_records": site.rejected,
        "epsilon": epsilon,
        "delta": privacy.delta,
        "simulation_only": list(_SIMULATION_ONLY),
    }


def _layers(targets: Sequence[str]) -> tuple[int, ...]:
    """The layers that whole paths of modules lie in; () where a name stands for all layers."""
    numbers = [layer_number(target) for target in targets]
    return () if None in numbers else tuple(sorted({n for n in numbers if n is not None}))


def _evaluation(summary: dict[str, Any]) -> list[Score]:
    rows = []
    for name, hospital in summary["hospitals"].items():
        values = hospital["perplexity"]
        rows.append(
            Score(
                f"held-out notes, {name}",
                "perplexity (lower is better)",
                values.get("base"),
                values.get("merged"),
                values.get("aligned"),
            )
        )
    instructions = summary["alignment"].get("instructions", {})
    for key, measure in (
        ("perplexity", "perplexity of the answer (lower is better)"),
        ("preference_accuracy", "right answer preferred to the flawed one (higher is better)"),
    ):
        if instructions:
            stages = (instructions.get(s, {}).get(key) for s in ("base", "merged", "aligned"))
            rows.append(Score("held-out instructions", measure, *stages))
    return rows
