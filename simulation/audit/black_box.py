"""Planted notes: can somebody who holds only the released adapter tell who was trained on?

Canary notes are single-note patients whose text is random letters, the easiest thing to recognise.
A fair coin decides for each whether the hospital trains on it, beside ordinary notes; control
canaries are never trained on. The attacker scores a note by how much the adapter lowered its loss
(loss under the base model - loss under the adapter). The same is done without privacy: an attack
that finds nothing there shows nothing by failing elsewhere.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import BaseModel
from adapters.likelihood import note_losses, pad_right
from client.privacy.randomness import SecureRandomness
from conf.commands import AuditCommand
from simulation.audit.attack import Estimate, auc, auc_bound, roc, tpr_at, tpr_bound
from simulation.audit.checks import Finding
from simulation.audit.hospital import Patients, train
from simulation.audit.one_run import epsilon_steinke

FPR = 0.01
_BATCH = 16
_WORDS, _LETTERS = 5, 5

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Membership:
    """The attack on one training. ``claimed`` is the ledger's epsilon; None without privacy."""

    claimed: float | None
    delta: float
    proved: float  # lower bound on epsilon, of 95 % confidence
    auc: Estimate
    tpr: Estimate  # at a false positive rate of 1 %
    members: int
    others: int
    roc: list[tuple[float, float]]


@dataclass(frozen=True)
class _Canaries:
    texts: list[str]  # those that a coin decided about, then the controls
    included: np.ndarray  # bool, of the first


def black_box(
    settings: AuditCommand,
    folder: Path,
    base: BaseModel,
    start: tuple[Adapter, str],
    ordinary: Patients,
    on_step: OnStep,
) -> tuple[Membership, Membership]:
    """Attack a private training and one without privacy on the same notes, in this order.

    ``ordinary`` are the hospital's other patients; ``start`` as ``hospital.train``.
    """
    wanted = settings.black_box
    canaries = _draw(wanted.canaries, wanted.controls)
    planted = {
        f"canary-{i}": [text]
        for i, (text, chosen) in enumerate(zip(canaries.texts, canaries.included, strict=False))
        if chosen
    }
    patients = {**ordinary, **planted}
    before = _losses(base, None, canaries.texts, settings.privacy.max_tokens)
    found = []
    for name, private in (("with privacy", True), ("without privacy", False)):

        def report(done: int, name: str = name) -> None:
            on_step(f"training {name}", done, wanted.steps)

        report(0)
        trained = train(
            settings, folder / name.replace(" ", "-"), patients, start, wanted.steps, report,
            private=private,
        )  # fmt: skip
        on_step(f"attacking the training {name}", 0, 1)
        after = _losses(base, trained.adapter, canaries.texts, settings.privacy.max_tokens)
        found.append(_attack(before - after, canaries, trained.epsilon, settings.privacy.delta))
    return found[0], found[1]


def findings(private: Membership, without: Membership) -> list[Finding]:
    """What the attack proves against the claim of ``private``, and that it works ``without``.

    Of each measured share the lower end of its interval counts.
    """
    assert private.claimed is not None
    most_found = tpr_bound(FPR, private.claimed, private.delta)
    return [
        Finding("epsilon proved by notes", private.proved, private.claimed),
        Finding("TPR at 1 % FPR", private.tpr.low, most_found),
        Finding("AUC", private.auc.low, auc_bound(private.claimed, private.delta)),
        Finding("AUC without privacy", without.auc.low, 0.5, least=True),
    ]


def _draw(canaries: int, controls: int) -> _Canaries:
    """Texts that nobody can foresee, all different, and the coins."""
    draw = random.SystemRandom()
    texts: dict[str, None] = {}
    while len(texts) < canaries + controls:
        words = ("".join(draw.choices(string.ascii_lowercase, k=_LETTERS)) for _ in range(_WORDS))
        texts[" ".join(words)] = None
    return _Canaries(list(texts), SecureRandomness().uniform(canaries) < 0.5)


def _attack(
    scores: np.ndarray, canaries: _Canaries, claimed: float | None, delta: float
) -> Membership:
    flipped, controls = np.split(scores, [len(canaries.included)])
    members = flipped[canaries.included]
    others = np.concatenate([flipped[~canaries.included], controls])
    return Membership(
        claimed,
        delta,
        epsilon_steinke(flipped, canaries.included, delta),
        auc(members, others),
        tpr_at(FPR, members, others),
        len(members),
        len(others),
        roc(members, others),
    )


@torch.no_grad()
def _losses(
    base: BaseModel, adapter: Adapter | None, texts: Sequence[str], max_tokens: int
) -> np.ndarray:
    """Mean loss in nats per token of each text, (texts) float64, under base plus adapter."""
    rows = [base.tokenizer(t, truncation=True, max_length=max_tokens).input_ids for t in texts]

    def losses() -> np.ndarray:
        batches = (pad_right(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH))
        return np.concatenate([note_losses(base.model, *b).double().cpu().numpy() for b in batches])

    if adapter is None:
        return losses()
    with lora.applied(base.model, adapter):
        return losses()
