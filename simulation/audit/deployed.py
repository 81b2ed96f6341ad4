"""The noise that really leaves: measured on whole rounds of ``client.training.train_round``.

With a sampling rate near zero a step is noise and little else, so one plain SGD step shows

    (trained - received) * D / learning rate  =  noise of standard deviation sigma C

with the sigma that the ledger was charged for. Rounds at hospitals of N and 2N patients must agree
with it and with each other, and must not repeat each other's noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adapters.adapter import Adapter
from conf.commands import AuditCommand
from conf.schema import OptimizerSettings
from simulation.audit.checks import Finding
from simulation.audit.hospital import train

_PATIENTS = 40
_RATE = 1e-3
_SGD = OptimizerSettings(name="sgd", learning_rate=1.0, final_fraction=1.0)


def deployed_noise(
    settings: AuditCommand,
    folder: Path,
    start: tuple[Adapter, str],
    on_round: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Train three rounds of one step and measure what they add. ``start`` as ``hospital.train``."""
    privacy = settings.privacy.model_copy(update={"sampling_rate": _RATE})
    sizes = (_PATIENTS, _PATIENTS, 2 * _PATIENTS)
    noises, errors = [], []
    for i, size in enumerate(sizes):
        patients = {f"p{n}": [f"Patient {n} was seen today and is well."] for n in range(size)}
        own = folder / f"noise-{i}"
        trained = train(settings, own, patients, start, 1, privacy=privacy, optimizer=_SGD)
        noise = trained.moved.numpy() * privacy.denominator
        std = float(trained.outgoing.facts["noise_multiplier"]) * privacy.clip_norm
        errors.append(float(np.sqrt(np.mean(noise**2))) / std - 1)
        noises.append(noise / np.linalg.norm(noise))
        if on_round:
            on_round(i + 1, len(sizes))
    n = len(noises[0])
    chance = max(0.01, 7 / math.sqrt(2 * n))  # no less than what so few numbers can tell
    alike = max(abs(float(noises[i] @ noises[j])) for i, j in ((0, 1), (0, 2), (1, 2)))
    return [
        Finding("noise", max(map(abs, errors)), chance),
        Finding("constant", abs((1 + errors[2]) / (1 + errors[0]) - 1), chance * math.sqrt(2)),
        Finding("fresh noise", alike, 6 / math.sqrt(n)),
    ]
