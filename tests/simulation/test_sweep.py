"""Sweeps: every combination is run, checked before the first, and set beside a pooled reference."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from conf.load import ConfigError, load, sweep
from conf.schema import RunSettings
from simulation.sweep import _label, _pooled_references, run_sweep
from strategies.registry import require_strategy

WITH_REFERENCE = "evaluation.pooled_reference=true"


def reference(*overrides: str) -> RunSettings | None:
    """The settings of the extra job that a sweep of these overrides gets."""
    extra = _pooled_references(sweep(overrides))
    assert len(extra) <= 1
    return load("simulate", extra[0], RunSettings) if extra else None


def test_a_sweep_runs_all_and_writes_one_report(
    without_ray: list[str], options: tuple[str, ...], tmp_path: Path
) -> None:
    quick = [o for o in options if "pooled_reference" not in o]
    wanted = [*quick, WITH_REFERENCE, "evaluation.alone=false", f"runs={tmp_path}"]
    jobs = sweep([*wanted, "privacy=none", "strategy=ffa,fedavg"])
    out = io.StringIO()
    folder = run_sweep(jobs, Console(file=out, width=300)).path
    assert folder.parent == tmp_path
    assert folder.name.endswith("-sweep")
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    assert [run.name[:3] for run in runs] == ["01-", "02-", "03-"]
    assert without_ray == [run.name for run in runs]
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    assert [c["strategy"]["name"] for c in configs] == ["ffa", "fedavg", "ffa"]
    assert [c["hospitals"]["layout"] for c in configs] == ["by_field", "by_field", "pooled"]
    assert all((run / "report.html").exists() for run in runs)
    page = (folder / "report.html").read_text()
    for arm in (
        "no privacy, federated, ffa",
        "no privacy, federated, fedavg",
        "no privacy, pooled",
    ):
        assert arm in page
    assert "strategy.name" in page  # what differs
    assert "run 2 of 3" in out.getvalue()
    assert f"report: {folder / 'report.html'}" in out.getvalue()


def test_all_configurations_are_checked_before_the_first_run(
    without_ray: list[str], options: tuple[str, ...], tmp_path: Path
) -> None:
    jobs = sweep([*options, f"runs={tmp_path / 'runs'}", "privacy=none", "adapter.rank=2,0"])
    with pytest.raises(ConfigError, match=r"^adapter.rank=0: "):
        run_sweep(jobs, Console(file=io.StringIO()))
    assert not (tmp_path / "runs").exists()
    assert without_ray == []


def test_one_run_can_be_gone_on_with_not_several(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^resume: "):
        run_sweep([[f"resume={tmp_path}"]], Console(file=io.StringIO()))
    assert not list(tmp_path.iterdir())


def test_strategies_are_checked_before_the_first_run_too(
    without_ray: list[str], options: tuple[str, ...], tmp_path: Path
) -> None:
    jobs = sweep([*options, f"runs={tmp_path / 'runs'}", "strategy=ties", "strategy.density=0.5,3"])
    with pytest.raises(ConfigError, match=r"^strategy.density=3: "):
        run_sweep(jobs, Console(file=io.StringIO()))
    assert not (tmp_path / "runs").exists()
    assert without_ray == []


def test_the_reference_merges_its_one_site_by_a_strategy_that_can() -> None:
    settings = reference("strategy=krum", "strategy.liars=1")
    assert settings
    assert settings.strategy.name == "product_mean"
    assert settings.strategy.parameters == {}
    kept = reference("strategy=ffa")
    assert kept
    assert kept.strategy.name == "ffa"


@pytest.mark.parametrize(("train", "mean"), [("B", "product_mean"), ("core", "ffa")])
def test_the_reference_needs_no_statistics_which_leave_noised_only(train: str, mean: str) -> None:
    settings = reference("strategy=regmean", "strategy.ridge=2", f"adapter.train={train}")
    assert settings
    assert settings.strategy.name == mean
    require_strategy(settings)


def test_the_reference_pools_without_privacy_and_without_alignment() -> None:
    settings = reference("privacy=none,patient_eps8", "seed=5", "hospitals.population=99")
    assert settings
    assert settings.hospitals.layout == "pooled"
    assert settings.privacy.enabled is False
    assert settings.alignment.enabled is False
    assert settings.seed == 5  # all else is as in the first job
    assert settings.hospitals.population == 99


@pytest.mark.parametrize(
    "override",
    [
        "federation.min_hospitals=3",
        "hospitals.layout=by_field",
        "hospitals=by_field",
        "privacy.enabled=true",
        "alignment.enabled=true",
        "alignment=mediflow",
    ],
)
def test_no_option_of_the_sweep_keeps_the_reference_from_being_one(override: str) -> None:
    settings = reference(override, "privacy=patient_eps1,patient_eps8")
    assert settings
    assert settings.hospitals.layout == "pooled"
    assert settings.privacy.enabled is False
    assert settings.alignment.enabled is False


def test_the_reference_clips_as_the_runs_do_so_that_it_differs_by_the_noise_alone() -> None:
    settings = reference("privacy.clip_norm=0.5", "privacy=patient_eps1,patient_eps8")
    assert settings
    assert settings.privacy.clip_norm == 0.5


def test_every_way_of_training_has_its_own_reference_and_no_two_have_the_same() -> None:
    jobs = sweep(
        ["federation.rounds=1,8", "privacy.epsilon=1,3", "privacy=none,patient_eps8",
         "strategy=ffa,fedavg", "alignment.examples=96,192", "compute.micro_tokens=0,256"]
    )  # fmt: skip
    found = [load("simulate", job, RunSettings) for job in _pooled_references(jobs)]
    assert [(s.federation.rounds, s.strategy.name) for s in found] == [(1, "ffa"), (8, "ffa")]


def test_a_single_run_is_no_sweep(
    without_ray: list[str], options: tuple[str, ...], tmp_path: Path
) -> None:
    jobs = sweep([*options, f"runs={tmp_path / 'runs'}", "hospitals=pooled"])
    with pytest.raises(ConfigError, match="a single run has nothing to be compared with"):
        run_sweep(jobs, Console(file=io.StringIO()))
    assert without_ray == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("evaluation.pooled_reference=false", "privacy=none,patient_eps8"),
        ("evaluation=brief", "privacy=none,patient_eps8"),
        ("hospitals=separate,pooled",),
    ],
)
def test_no_reference_is_added_where_none_is_wanted_or_there_is_one(
    overrides: tuple[str, ...],
) -> None:
    assert reference(*overrides) is None


def test_a_run_is_labelled_by_its_options_as_a_folder_can_be() -> None:
    assert _label(["privacy=none", "seed=3"]) == "privacy-none_seed-3"
    assert _label([]) == "default"
    assert _label(["runs=/tmp/there"]) == "default"
    odd = _label(["notes.path=/a b/c,d.jsonl", "model.path=" + "x" * 200])
    assert odd.startswith("notes.path--a-b-c-d.jsonl_model.path-x")
    assert len(odd) == 60
    assert _label(["notes.path=/home/josé/é.jsonl"]) == "notes.path--home-jos---.jsonl"
