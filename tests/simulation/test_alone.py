"""A hospital alone: the same steps and the same budget as in the federation, and nothing else."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from adapters.adapter import Adapter
from client.privacy.ledger import Ledger
from client.site import read_policy
from conf.load import load
from conf.schema import RunSettings
from server.run_folder import RunFolder
from simulation import flower
from simulation.alone import train_alone
from simulation.run import simulate
from simulation.sites import Site

SITES = ("east", "mid", "west")

# Opacus divides by log(0) on the way where every patient is in every step.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


def finished(options: tuple[str, ...], folder: Path, *more: str) -> tuple[RunSettings, RunFolder]:
    """A finished run in ``folder``."""
    settings = load("simulate", [*options, *more], RunSettings)
    run = RunFolder(folder)
    simulate(settings, run, Console(file=io.StringIO()))
    return settings, run


def alone(run: RunFolder, site: str) -> Path:
    """Where the adapter of a hospital alone is kept."""
    return run.path / "adapters" / "alone" / site


def site(run: RunFolder, name: str) -> Site:
    """A hospital of a finished run."""
    return Site(read_policy(run.path / "sites" / f"{name}.yaml"), (name,), 0)


def test_a_hospital_alone_reaches_what_a_federation_of_one_does(
    without_ray: list[str], options: tuple[str, ...], tmp_path: Path
) -> None:
    wanted = ("privacy=none", "strategy=ffa", "federation.rounds=3")
    settings, run = finished(options, tmp_path / "all", *wanted)
    for name in SITES:
        one = RunFolder(tmp_path / name).create(settings)
        (one.path / "sites").mkdir()
        shutil.copy(run.path / "sites" / f"{name}.yaml", one.path / "sites")
        flower.run_rounds(one, 1)
        assert [record["hospitals"] for record in one.finished_rounds()] == [[name]] * 3
        expected = one.global_adapter().fingerprint()
        assert Adapter.load(alone(run, name)).fingerprint() == expected
        assert run.global_adapter().fingerprint() != expected


def test_the_real_ledger_does_not_pay_for_what_never_happened(
    without_ray: list[str], options: tuple[str, ...], tmp_path: Path
) -> None:
    settings, run = finished(options, tmp_path / "run", "evaluation.alone=false")
    east = site(run, "east")
    with Ledger(east.policy.ledger, east.policy.lineage, 8, 1e-5) as ledger:
        before = ledger.entries()
        first = ledger.history(run.name, round=1)
    own = run.path / "ledger" / "alone" / "east.sqlite"
    own.parent.mkdir()
    own.write_text("left by an interrupted attempt")
    steps: list[tuple[int, int]] = []

    adapter = train_alone(settings, run, east, lambda done, total: steps.append((done, total)))

    with Ledger(east.policy.ledger, east.policy.lineage, 8, 1e-5) as ledger:
        assert ledger.entries() == before
    with Ledger(own, east.policy.lineage, 8, 1e-5) as ledger:
        assert ledger.history()[:1] == first  # as it was federated
        assert sum(charge.steps for charge in ledger.history()) == 4
        assert 7.5 < ledger.spent() <= 8
    assert steps == [(1, 2), (2, 2)]  # of the second round; the first is known
    sent = Adapter.load(run.adapter_folder(1, "east"))
    for name, tensor in adapter.tensors().items():
        assert sent.tensors()[name].equal(tensor) == ("lora_A" in name)


def test_it_is_made_once_and_then_read(
    without_ray: list[str], options: tuple[str, ...], tmp_path: Path
) -> None:
    settings, run = finished(options, tmp_path / "run", "privacy=none")
    made = Adapter.load(alone(run, "mid")).fingerprint()
    steps: list[int] = []
    again = train_alone(settings, run, site(run, "mid"), lambda done, _: steps.append(done))
    assert again.fingerprint() == made
    assert steps == []
    shutil.rmtree(alone(run, "mid"))
    anew = train_alone(settings, run, site(run, "mid"), lambda done, _: steps.append(done))
    assert anew.fingerprint() == made
    assert steps == [1, 2]


def test_a_hospital_that_missed_the_first_round_has_no_path_of_its_own(
    without_ray: list[str], options: tuple[str, ...], tmp_path: Path
) -> None:
    settings, run = finished(options, tmp_path / "run", "privacy=none", "evaluation.alone=false")
    shutil.rmtree(run.adapter_folder(1, "west"))
    with pytest.raises(FileNotFoundError):
        train_alone(settings, run, site(run, "west"), lambda *_: None)
    resumed = settings.model_copy(
        update={"evaluation": settings.evaluation.model_copy(update={"alone": True})}
    )
    summary = simulate(resumed, run, Console(file=io.StringIO()))
    have = {name for name, h in summary["hospitals"].items() if "local" in h["perplexity"]}
    assert have == {"east", "mid"}  # and the run goes on without the third
