"""One private run through Ray, by the command, and everything its run folder promises."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import wardround
from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import load_base
from client.notes.split import split_units
from client.privacy.accountant import epsilon
from client.privacy.ledger import Ledger
from client.site import read_policy
from client.site_units import site_units
from conf.load import load
from conf.schema import ModelSettings, RunSettings
from server.run_folder import RunFolder
from strategies.merging import merge
from strategies.registry import create

SITES = ["east", "mid", "west"]
STAGES = ["base", "local", "merged", "aligned"]


@dataclass(frozen=True)
class Finished:
    """A finished run: where it is, what was asked for, what the terminal showed."""

    folder: RunFolder
    options: list[str]
    said: str

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``, read anew."""
        content: dict[str, Any] = json.loads((self.folder.path / "summary.json").read_text())
        return content


@pytest.fixture(scope="module")
def run(
    options: tuple[str, ...], mediflow_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Two private rounds of two steps at three hospitals, then two steps of SFT and of DPO."""
    runs = tmp_path_factory.mktemp("private")
    wanted = [
        *(o for o in options if o != "alignment=none"),
        "alignment=mediflow", f"alignment.path={mediflow_folder}", "alignment.examples=12",
        "alignment.held_out=4", "alignment.max_tokens=96", "alignment.rank=2",
        "alignment.sft.steps=2", "alignment.sft.batch=2",
        "alignment.dpo.steps=2", "alignment.dpo.batch=2",
        "privacy.epsilon=6", f"runs={runs}",
    ]  # fmt: skip
    before = dict(os.environ)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            code = wardround.main(["simulate", *wanted])
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert code == 0, said.getvalue()
    (folder,) = runs.iterdir()
    return Finished(RunFolder(folder), wanted, said.getvalue())


def test_the_run_folder_holds_what_it_promises(run: Finished) -> None:
    names = {path.name for path in run.folder.path.iterdir()}
    assert names >= {
        "config.yaml", "summary.json", "report.html", "ledger", "adapters", "release",
        "rounds.jsonl", "sites", "notes", "flower.log",
    }  # fmt: skip
    assert not list(run.folder.path.rglob("*.part"))


def test_the_configuration_is_saved_as_it_was_composed(run: Finished) -> None:
    assert run.folder.settings() == load("simulate", run.options, RunSettings)
    assert yaml.safe_load((run.folder.path / "config.yaml").read_text())["privacy"]["epsilon"] == 6


def test_the_summary_says_what_every_hospital_holds_and_has_spent(run: Finished) -> None:
    assert list(run.summary["hospitals"]) == SITES
    for name, hospital in run.summary["hospitals"].items():
        policy = read_policy(run.folder.path / "sites" / f"{name}.yaml")
        units = site_units(policy, "patient").train
        assert hospital["patients"] == len(units) > 0
        assert hospital["notes"] == sum(map(len, units.values())) == 2 * len(units)
        assert hospital["rejected_records"] == 0
        assert hospital["delta"] == 1e-5
        assert 0 < hospital["epsilon"] <= 6
        assert run.summary["privacy"]["epsilon_budget"] == 6


def test_what_a_real_hospital_would_keep_is_marked(run: Finished) -> None:
    for hospital in run.summary["hospitals"].values():
        marked = set(hospital["simulation_only"])
        assert marked <= set(hospital)
        assert set(hospital) - marked == {"epsilon", "delta", "simulation_only"}


def test_every_stage_is_scored_at_every_hospital(run: Finished) -> None:
    for hospital in run.summary["hospitals"].values():
        for measure in ("perplexity", "bits_per_char"):
            assert list(hospital[measure]) == STAGES
            assert all(0 < value < 10_000 for value in hospital[measure].values())
            assert len(set(hospital[measure].values())) == 4  # four different models
        assert [point["round"] for point in hospital["by_round"]] == [1, 2]
        last = hospital["by_round"][-1]
        assert last["perplexity"] == pytest.approx(hospital["perplexity"]["merged"], abs=1e-5)


def test_the_rounds_are_recorded_with_traffic_and_noise(run: Finished) -> None:
    assert [record["round"] for record in run.summary["rounds"]] == [1, 2]
    for record in run.summary["rounds"]:
        assert record["hospitals"] == SITES
        assert record["left_out"] == {}
        assert 0 < record["bytes_up"] < record["bytes_down"]  # B comes back, A and B went out
        assert record["seconds"] > 0
        assert record["discrepancy"] == 0  # all share A
        assert set(record["sigma"]) == set(SITES)
        assert all(sigma > 0.3 for sigma in record["sigma"].values())
        assert "facts" not in record


def test_alignment_seconds_memory_and_versions_are_recorded(run: Finished) -> None:
    alignment = run.summary["alignment"]
    for stage in ("sft", "dpo"):
        assert alignment[stage]["steps"] == len(alignment[stage]["loss"]) == 2
    assert len(alignment["dpo"]["margin"]) == 2
    assert list(alignment["instructions"]) == ["base", "merged", "aligned"]
    assert all(score["examples"] == 4 for score in alignment["instructions"].values())
    assert list(run.summary["stages"]) == [
        "hospitals", "instructions", "rounds", "alignment", "evaluation",
    ]  # fmt: skip
    assert sum(run.summary["stages"].values()) <= run.summary["seconds"] + 0.5
    assert run.summary["peak_rss_mb"] > 200
    assert run.summary["versions"].keys() >= {"wardround", "torch", "flwr", "opacus", "trl", "peft"}
    assert run.summary["notices"] == []


def test_the_ledgers_verify_and_hold_every_step_of_the_run(run: Finished) -> None:
    for name in SITES:
        policy = read_policy(run.folder.path / "sites" / f"{name}.yaml")
        limits = policy.privacy
        assert limits.epsilon == 6
        with Ledger(policy.ledger, policy.lineage, limits.epsilon, limits.delta) as ledger:
            entries = ledger.entries()
            assert [e.state for e in entries] == ["RESERVED", "COMMITTED"] * 2
            assert [e.body["round"] for e in entries[::2]] == [1, 2]
            assert {e.body["run"] for e in entries[::2]} == {run.folder.name}
            assert {e.body["unit"] for e in entries[::2]} == {"patient"}
            assert sum(steps.steps for steps in ledger.history()) == 4
            spent = epsilon(ledger.history(), 1e-5)
        assert run.summary["hospitals"][name]["epsilon"] == spent


def test_what_was_committed_is_what_the_hospital_sent(run: Finished) -> None:
    for name in SITES:
        policy = read_policy(run.folder.path / "sites" / f"{name}.yaml")
        with Ledger(policy.ledger, policy.lineage, 6, 1e-5) as ledger:
            released = [e.body["result"] for e in ledger.entries() if e.state == "COMMITTED"]
        sent = [Adapter.load(run.folder.adapter_folder(n, name)).fingerprint() for n in (1, 2)]
        assert released == sent


def test_the_adapters_lie_by_round_and_the_merge_can_be_done_again(run: Finished) -> None:
    folders = {p.parent.name: sorted(c.name for c in p.parent.iterdir()) for p in _adapters(run)}
    assert folders["round-000"] == ["global"]
    assert folders["round-001"] == folders["round-002"] == ["east", "global", "mid", "west"]
    assert folders["alone"] == SITES
    for number in (1, 2):
        sent = [Adapter.load(run.folder.adapter_folder(number, name)) for name in SITES]
        merged = merge(create("fedsvd"), sent, [1 / 3] * 3).adapter
        on_disk = Adapter.load(run.folder.adapter_folder(number))
        assert merged.fingerprint() == on_disk.fingerprint()
    assert run.folder.global_adapter().fingerprint() == on_disk.fingerprint()


def _adapters(run: Finished) -> list[Path]:
    files = (run.folder.path / "adapters").rglob("adapter_model.safetensors")
    return [file.parent for file in files]


def test_peft_loads_the_release_and_computes_what_was_measured(
    run: Finished, tiny_model: Path
) -> None:
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    ids = torch.tensor([base.tokenizer("The patient has had a fever.").input_ids])
    aligned = Adapter.load(run.folder.path / "adapters" / "aligned")
    with torch.no_grad():
        before = base.model(ids).logits
        with lora.applied(base.model, aligned):
            measured = base.model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        released = PeftModel.from_pretrained(plain, run.folder.path / "release").eval()
        torch.testing.assert_close(released(ids).logits, measured, atol=1e-5, rtol=0)
    assert not torch.allclose(before, measured, atol=1e-5)


def test_the_card_states_the_privacy_of_every_hospital(run: Finished) -> None:
    card = (run.folder.path / "release" / "README.md").read_text()
    for word in (*SITES, "fedsvd", "patient", "1e-05", "dp-accounting", run.folder.name):
        assert word in card
    assert run.summary["privacy"]["accountant"] in card


def test_no_path_of_this_machine_leaves_with_the_release_or_the_summary(
    run: Finished, tiny_model: Path, notes_file: Path
) -> None:
    published = [p for p in (run.folder.path / "release").rglob("*") if p.is_file()]
    assert len(published) >= 3
    places = [run.folder.path.parent, tiny_model.parent, notes_file.parent, Path.cwd(), Path.home()]
    for file in (*published, run.folder.path / "summary.json"):
        content = file.read_bytes()
        for place in places:
            assert os.fsencode(place) not in content, f"{place} in {file.name}"


def test_no_note_text_is_anywhere_but_with_the_notes(run: Finished) -> None:
    pieces = (b"The patient has had", b"Review in")
    holding = set()
    for file in run.folder.path.rglob("*"):
        if file.is_file() and any(piece in file.read_bytes() for piece in pieces):
            holding.add(file.relative_to(run.folder.path).parts[0])
    assert holding == {"notes"}
    assert "patient has had" not in run.said


def test_the_report_is_one_page_that_loads_nothing(run: Finished) -> None:
    page = (run.folder.path / "report.html").read_text()
    for name in SITES:
        assert f'data-hospital="{name}"' in page
    assert page.count("<svg") >= 5
    assert "<script" not in page
    assert "<link" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert not re.findall(r"url\((?!['\"]?(?:#|data:))", page)
    assert "@import" not in page


def test_the_terminal_shows_where_the_run_is_and_how_it_went(run: Finished) -> None:
    flat = run.said.replace("\n", "")
    assert f"run folder: {run.folder.path}" in flat
    assert f"report: {run.folder.path / 'report.html'}" in flat
    for word in (*SITES, "base", "merged", "ε spent", "of 6"):
        assert word in run.said
    for noise in ("Traceback", "Warning", "INFO", "it/s"):
        assert noise not in run.said


def test_all_that_ray_started_is_gone(run: Finished) -> None:
    family = psutil.Process().children(recursive=True)
    commands = [" ".join(p.cmdline()) for p in family if p.status() != psutil.STATUS_ZOMBIE]
    assert not [command for command in commands if "ray" in command]


def test_the_held_out_patients_stand_in_no_ones_training(run: Finished) -> None:
    for name in SITES:
        policy = read_policy(run.folder.path / "sites" / f"{name}.yaml")
        lines = (run.folder.path / "notes" / f"{name}.jsonl").read_text().splitlines()
        patients = {json.loads(line)["patient"] for line in lines}
        _, held_out = split_units(dict.fromkeys(patients, ()), policy.notes.holdout)
        trained_on = site_units(policy, "patient").train
        assert set(trained_on) == patients - set(held_out)
        assert held_out


def test_a_finished_run_resumes_without_doing_anything_again(
    run: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / run.folder.name
    shutil.copytree(run.folder.path, copy)
    files = [file for file in copy.rglob("*") if file.is_file()]
    kept = [f for f in files if "adapters" in f.parts or f.name in ("rounds.jsonl", "flower.log")]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in kept}
    assert len(before) > 20

    assert wardround.main(["simulate", f"resume={copy}"]) == 0
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in kept} == before
    again = json.loads((copy / "summary.json").read_text())
    for key in ("run", "hospitals", "rounds", "alignment", "privacy", "model", "notices"):
        assert again[key] == run.summary[key]
    assert "ε spent" in capsys.readouterr().err
