"""Other ways to run: without privacy, pooled, without patient ids, with a seed given twice."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapters.adapter import Adapter
from adapters.base_model import load_base
from client.notes.load import load_notes
from client.privacy.ledger import Ledger
from client.site import read_policy
from conf.load import load
from conf.policy import ShareLimits, SitePolicy
from conf.schema import RunSettings
from server.rounds import RoundFailed
from server.run_folder import RunFolder
from simulation.evaluate import score
from simulation.run import simulate
from simulation.sites import site_policy

Run = Callable[..., tuple[RunFolder, dict[str, Any], str]]
SITES = ["east", "mid", "west"]

# Opacus divides by log(0) on the way where every patient is in every step.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


@pytest.fixture
def go(without_ray: list[str], options: tuple[str, ...], tmp_path: Path) -> Run:
    """Do a run under more options; gives its folder, its summary and what was said."""

    def run(name: str, *more: str) -> tuple[RunFolder, dict[str, Any], str]:
        settings = load("simulate", [*options, f"runs={tmp_path}", *more], RunSettings)
        folder, out = RunFolder(tmp_path / name), io.StringIO()
        summary = simulate(settings, folder, Console(file=out, width=400))
        return folder, summary, out.getvalue()

    return run


def test_without_privacy_a_seed_decides_the_result_bit_for_bit(go: Run) -> None:
    wanted = ("privacy=none", "privacy.sampling_rate=0.5", "evaluation.alone=false")
    one, two, other = (
        go(name, *wanted, f"seed={seed}")[0] for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert one.global_adapter().fingerprint() == two.global_adapter().fingerprint()
    assert one.global_adapter().fingerprint() != other.global_adapter().fingerprint()


@pytest.mark.parametrize(
    ("train", "strategy", "share"),  # of what comes down, at most so much goes up
    [
        ("A", "rolora", 0.75),
        ("alternate", "rolora", 0.75),
        ("alternate", "product_mean", 0.75),
        ("core", "ffa", 0.3),
    ],
)
def test_other_parts_of_the_adapter_can_be_trained(
    go: Run, train: str, strategy: str, share: float
) -> None:
    folder, summary, _ = go(
        "part", "privacy=none", "optimizer.learning_rate=1", f"adapter.train={train}",
        f"strategy={strategy}", "evaluation.alone=false",
    )  # fmt: skip
    for hospital in summary["hospitals"].values():
        assert hospital["perplexity"]["merged"] < hospital["perplexity"]["base"]
    start, one, two = (Adapter.load(folder.adapter_folder(n)).deltas() for n in range(3))
    assert all(not d.norm() for d in start.values())
    for name in start:
        assert one[name].norm() > 0
        assert (two[name] - one[name]).norm() > 0
    up, down = (summary["rounds"][0][key] for key in ("bytes_up", "bytes_down"))
    assert up < share * down


def test_a_quarter_of_the_bytes_ends_in_nearly_the_same_adapter(go: Run) -> None:
    common = (
        "privacy=none", "optimizer.learning_rate=1", "adapter.rank=16",
    )  # fmt: skip
    exact, rough = (go(wire, *common, f"federation.wire={wire}") for wire in ("float32", "int8"))
    up = [summary["rounds"][0]["bytes_up"] for _, summary, _ in (exact, rough)]
    assert up[1] < 0.6 * up[0]  # names and scales weigh more here than in a layer of usual size
    one, two = (folder.global_adapter().deltas() for folder, _, _ in (exact, rough))
    apart = sum((one[n] - two[n]).norm() ** 2 for n in one) / sum(one[n].norm() ** 2 for n in one)
    assert 0 < apart**0.5 < 0.02


def test_a_seed_does_not_decide_the_noise(go: Run) -> None:
    one, two = (go(name, "evaluation.alone=false", "seed=7")[0] for name in ("a", "b"))
    start = [Adapter.load(folder.adapter_folder(0)).fingerprint() for folder in (one, two)]
    assert start[0] == start[1]
    for number in (1, 2):
        for name in SITES:
            sent = [Adapter.load(folder.adapter_folder(number, name)) for folder in (one, two)]
            assert sent[0].fingerprint() != sent[1].fingerprint()


def test_two_hospitals_are_merged_by_statistics_that_their_ledgers_have_paid_for(go: Run) -> None:
    folder, summary, _ = go(
        "measured", "strategy=regmean", "hospitals.count=2", "federation.rounds=2",
        "federation.local_steps=2", "federation.min_hospitals=2", "evaluation.alone=true",
    )  # fmt: skip
    assert len(summary["hospitals"]) == 2
    for name, hospital in summary["hospitals"].items():
        policy = read_policy(folder.path / "sites" / f"{name}.yaml")
        with Ledger.of(policy) as ledger:
            charged = ledger.history()
            assert hospital["epsilon"] == ledger.spent() <= 8.0
        assert [mechanism.steps for mechanism in charged] == [3, 3]
        assert (folder.adapter_folder(2, name) / "statistics.safetensors").exists()
        assert hospital["perplexity"]["local"] > 0  # alone it needs none, and still fits the budget
    assert (folder.path / "report.html").exists()


def test_hospitals_whose_policy_shares_no_statistics_end_the_run_by_a_reason(
    go: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*arguments: Any) -> SitePolicy:
        return site_policy(*arguments).model_copy(update={"share": ShareLimits()})

    monkeypatch.setattr("simulation.sites.site_policy", silent)
    with pytest.raises(RoundFailed, match="east: refused: STATISTICS_NOT_SHARED"):
        go("silent", "strategy=regmean")


def test_without_privacy_no_ledger_is_opened_and_the_run_says_so(go: Run) -> None:
    folder, summary, said = go("open", "privacy=none")
    notice = "privacy is off: nothing this run produces is protected"
    assert notice in said
    assert summary["notices"] == [notice]
    assert not list(folder.path.rglob("*.sqlite"))
    assert summary["privacy"]["enabled"] is False
    assert summary["privacy"]["epsilon_budget"] is None
    assert all(hospital["epsilon"] is None for hospital in summary["hospitals"].values())
    card = (folder.path / "release" / "README.md").read_text()
    assert "There is NO privacy guarantee" in card
    assert "ε" not in card


def test_notes_learned_without_noise_are_predicted_better(go: Run) -> None:
    _, summary, _ = go("open", "privacy=none", "optimizer.learning_rate=1")
    for hospital in summary["hospitals"].values():
        assert hospital["perplexity"]["merged"] < 0.97 * hospital["perplexity"]["base"]
        points = [hospital["perplexity"]["base"]]
        points += [point["perplexity"] for point in hospital["by_round"]]
        assert points == sorted(points, reverse=True)


def test_pooled_notes_are_trained_in_one_place_and_measured_hospital_by_hospital(go: Run) -> None:
    folder, summary, _ = go("pooled", "hospitals=pooled")
    assert [record["hospitals"] for record in summary["rounds"]] == [["pooled"]] * 2
    assert [file.name for file in (folder.path / "sites").iterdir()] == ["pooled.yaml"]
    assert [file.name for file in (folder.path / "ledger").glob("*.sqlite")] == ["pooled.sqlite"]
    assert list(summary["hospitals"]) == SITES
    texts = load_notes(read_policy(folder.path / "sites" / "pooled.yaml").notes).notes
    for name, hospital in summary["hospitals"].items():
        assert hospital["notes"] < sum(note.hospital == name for note in texts)
        assert hospital["perplexity"]["merged"] != hospital["perplexity"]["base"]
    assert len({h["perplexity"]["base"] for h in summary["hospitals"].values()}) == 3
    assert len({h["epsilon"] for h in summary["hospitals"].values()}) == 1  # one ledger
    assert all("local" not in h["perplexity"] for h in summary["hospitals"].values())
    for page in ("report.html", "release/README.md"):
        said = " ".join((folder.path / page).read_text().split())
        assert "left their hospitals" in said
        assert "before anything le" not in said
        assert "reaches alone" not in said
    _, federated, _ = go("federated", "evaluation.alone=false")
    for name in SITES:  # the same patients are held out
        there, here = (s["hospitals"][name] for s in (summary, federated))
        assert there["patients"] == here["patients"]
        assert there["perplexity"]["base"] == here["perplexity"]["base"]


def test_notes_without_patient_ids_are_protected_by_note_and_the_run_says_so(
    go: Run, without_ray: list[str]
) -> None:
    folder, summary, said = go("ids", "notes.patient_field=null")
    (notice,) = summary["notices"]
    assert "the privacy unit is the NOTE" in notice
    assert notice in said
    assert summary["privacy"]["unit"] == "note"
    assert folder.settings().privacy.unit == "note"
    for name, hospital in summary["hospitals"].items():
        assert hospital["patients"] is None
        assert hospital["notes"] > 20
        assert 0 < hospital["epsilon"] <= 8
        policy = read_policy(folder.path / "sites" / f"{name}.yaml")
        assert policy.privacy.unit == "note"
        assert policy.notes.patient_field is None
    assert "note" in (folder.path / "release" / "README.md").read_text()
    resumed = simulate(folder.settings(), folder, Console(file=io.StringIO()))
    assert resumed["notices"] == [notice]
    assert without_ray == ["ids"]


def test_with_patient_ids_there_is_nothing_to_say(go: Run) -> None:
    _, summary, _ = go("plain", "evaluation.alone=false")
    assert summary["notices"] == []
    assert summary["privacy"]["unit"] == "patient"
    assert all("local" not in h["perplexity"] for h in summary["hospitals"].values())


def test_rejected_records_of_no_known_hospital_are_told(
    go: Run, notes_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "notes.jsonl"
    bad = ["{", json.dumps({"text": "A note of nobody, long enough to be one."})]
    file.write_text(notes_file.read_text() + "\n".join(bad) + "\n")
    _, summary, said = go("bad", f"notes.path={file}", "evaluation.alone=false")
    assert summary["notices"] == ["records rejected: 2; which hospital they belong to is not known"]
    assert summary["notices"][0] in said
    assert all(h["rejected_records"] is None for h in summary["hospitals"].values())


def test_the_summary_holds_the_scores_of_the_adapters_in_the_folder(go: Run) -> None:
    folder, summary, _ = go("scores", "privacy=none", "evaluation.notes=100")
    base = load_base(folder.settings().model)
    for name in SITES:
        lines = (folder.path / "notes" / f"{name}.jsonl").read_text().splitlines()
        policy = read_policy(folder.path / "sites" / f"{name}.yaml")
        held_out = _held_out(lines, policy.notes.holdout)
        for stage, adapter in (
            ("base", None),
            ("local", Adapter.load(folder.path / "adapters" / "alone" / name)),
            ("merged", folder.global_adapter()),
        ):
            again = score(base, adapter, held_out, 24)
            written = summary["hospitals"][name]
            assert written["perplexity"][stage] == pytest.approx(again.perplexity, rel=1e-5)
            assert written["bits_per_char"][stage] == pytest.approx(again.bits_per_char, rel=1e-5)


def _held_out(lines: list[str], holdout: float) -> list[str]:
    """One text of each held-out patient: the second of two, as every patient here has two."""
    from client.notes.split import split_units

    texts: dict[str, list[str]] = {}
    for line in lines:
        note = json.loads(line)
        texts.setdefault(note["patient"], []).append(note["text"])
    _, held_out = split_units(dict.fromkeys(texts, ()), holdout)
    return [texts[patient][1] for patient in held_out]
