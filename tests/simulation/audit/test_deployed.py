"""The noise of whole rounds: measured on the code that a hospital runs, sound and sabotaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import load_base
from client import local_steps, training
from client.privacy.engine import noised_mean
from client.site_units import SiteUnits
from conf.commands import AuditCommand
from conf.policy import SitePolicy
from conf.schema import TrainedFactors
from simulation.audit.deployed import deployed_noise
from simulation.audit.hospital import spec

Start = tuple[Adapter, str]


@pytest.fixture(scope="module")
def start(tiny_audit: AuditCommand) -> Start:
    base = load_base(tiny_audit.model)
    return lora.initial(base.model, spec(tiny_audit), 1), base.fingerprint


def failed(settings: AuditCommand, folder: Path, start: Start) -> set[str]:
    found = deployed_noise(settings, folder, start)
    assert [f.check for f in found] == ["noise", "constant", "fresh noise"]
    return {f.check for f in found if not f.passed}


def test_rounds_leave_the_noise_that_was_charged(
    tiny_audit: AuditCommand, tmp_path: Path, start: Start
) -> None:
    assert failed(tiny_audit, tmp_path, start) == set()


@pytest.mark.parametrize(
    ("train", "freeze_half"),
    [("A", False), ("both", False), ("core", False), ("alternate", False), ("B", True)],
)
def test_so_do_rounds_that_train_another_part(
    train: TrainedFactors, freeze_half: bool, tiny_audit: AuditCommand, tmp_path: Path
) -> None:
    asked = {"train": train, "freeze_half": freeze_half}
    settings = tiny_audit.model_copy(
        update={"adapter": tiny_audit.adapter.model_copy(update=asked)}
    )
    base = load_base(settings.model)
    start = lora.initial(base.model, spec(settings), 1, train), base.fingerprint
    assert failed(settings, tmp_path, start) == set()


def test_less_noise_than_was_charged_is_seen(
    tiny_audit: AuditCommand, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        local_steps, "noised_mean", lambda s, std, d, n: noised_mean(s, 0.7 * std, d, n)
    )
    assert failed(tiny_audit, tmp_path, start) == {"noise"}


def test_noise_from_a_seed_is_seen(
    tiny_audit: AuditCommand, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seeded(training.SecureRandomness):
        def normal(self, n: int) -> np.ndarray:
            return np.random.default_rng(n).standard_normal(n)

    monkeypatch.setattr(training, "SecureRandomness", Seeded)
    assert "fresh noise" in failed(tiny_audit, tmp_path, start)


def test_a_scale_that_follows_the_number_of_patients_is_seen(
    tiny_audit: AuditCommand, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = training.site_units

    def counted(policy: SitePolicy, unit: str) -> SiteUnits:
        units = real(policy, unit)
        sizes.append(len(units.train))
        return units

    monkeypatch.setattr(training, "site_units", counted)
    monkeypatch.setattr(
        local_steps, "noised_mean", lambda s, std, d, n: noised_mean(s, std, sizes[-1] // 4, n)
    )
    assert "constant" in failed(tiny_audit, tmp_path, start)
    assert sizes == [40, 40, 80]
