"""One hospital for an audit, in a temporary folder: notes, policy and a real ledger.

Training goes through ``client.training.train_round``, as at a real hospital; nothing here repeats
a part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.plan import TrainingPlan
from adapters.trained_part import part_of_round
from client.training import Outgoing, train_round
from conf.commands import AuditCommand
from conf.schema import OptimizerSettings, PrivacySettings
from simulation.sites import site_policy
from transport.wire import change

_NOBODY = 1e-12  # share held out: who is planted must be trained on
_OFF = {"enabled": False, "clip_norm": 1e6}  # neither noise nor clipping

Patients = Mapping[str, Sequence[str]]  # texts of each patient's notes


@dataclass(frozen=True)
class Trained:
    """What left the hospital. ``epsilon`` is what its ledger says was spent; None: no privacy.

    ``moved`` is by how much every trained number differs from what was received, float64, flat.
    """

    adapter: Adapter
    outgoing: Outgoing
    moved: Tensor
    epsilon: float | None


def train(
    settings: AuditCommand,
    folder: Path,
    patients: Patients,
    start: tuple[Adapter, str],
    steps: int,
    on_step: Callable[[int], None] | None = None,
    *,
    private: bool = True,
    privacy: PrivacySettings | None = None,
    optimizer: OptimizerSettings | None = None,
) -> Trained:
    """Train ``start`` (adapter, fingerprint of its base model) on ``patients`` for one round.

    ``folder`` must be new. ``privacy`` and ``optimizer`` replace those of the settings. Raises
    Refusal as ``train_round`` does.
    """
    wanted = privacy or settings.privacy
    notes = settings.notes.model_copy(update={"holdout": _NOBODY, "min_chars": 1})
    own = settings.model_copy(
        update={
            "notes": notes,
            "privacy": wanted if private else wanted.model_copy(update=_OFF),
            "optimizer": optimizer or settings.optimizer,
        }
    )
    folder.mkdir(parents=True)
    file = folder / "notes.jsonl"
    lines = [
        {"note_id": f"{patient}-{i}", "patient": patient, "hospital": "audited", "text": text}
        for patient, texts in patients.items()
        for i, text in enumerate(texts)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    policy = site_policy(own, folder, "audited", file, True)
    adapter, fingerprint = start
    plan = _plan(own, steps, fingerprint)
    outgoing = train_round(plan, adapter, policy, on_step)
    trained = plan.joined(adapter, outgoing.tensors)
    spent = float(outgoing.facts["epsilon_spent"]) if private else None
    moved = [part.flatten() for part in change(outgoing.tensors, adapter, plan).values()]
    return Trained(trained, outgoing, torch.cat(moved), spent)


def spec(settings: AuditCommand) -> AdapterSpec:
    """Shape of the audited adapter."""
    return AdapterSpec.of(settings.adapter)


def _plan(settings: AuditCommand, steps: int, fingerprint: str) -> TrainingPlan:
    return TrainingPlan(
        run="audit",
        round=1,
        rounds=1,
        local_steps=steps,
        seed=settings.seed or 0,
        strategy="ffa",
        base_model=fingerprint,
        adapter=settings.adapter,
        privacy=settings.privacy,
        optimizer=settings.optimizer,
        upload=part_of_round(settings.adapter.train, 1),
    )
