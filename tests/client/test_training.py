"""One round at a hospital: the order of things, what a crash leaves, and what a seed decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import load_base
from adapters.lowrank import LowRank
from adapters.plan import TrainingPlan
from client import local_steps
from client.notes.split import split_units
from client.privacy.accountant import GaussianSteps, epsilon
from client.privacy.authorise import require_model
from client.privacy.ledger import Ledger
from client.privacy.randomness import SecureRandomness
from client.refusal import Reason, Refusal
from client.site_units import site_units
from client.training import train_round
from conf.policy import SitePolicy
from conf.schema import ModelSettings

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]
Start = tuple[Adapter, str]

OPEN = {"required": False}
OFF = {"enabled": False, "clip_norm": 5.0, "sampling_rate": 0.5}


def ledger_of(policy: SitePolicy) -> Ledger:
    return Ledger.of(policy)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


# --- the order that keeps the promises ---------------------------------------------------------


def test_the_charge_is_on_disk_before_the_first_gradient(
    policy: MakePolicy, plan: MakePlan, starting_point: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, seen = policy(), []

    def watch(real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            with ledger_of(own) as other:  # as another process would read it
                seen.append(other.history())
            return real(*arguments)

        return watched

    for name in ("poisson_sample", "clipped_sum"):
        monkeypatch.setattr(local_steps, name, watch(getattr(local_steps, name)))
    outgoing = train_round(plan(), starting_point[0], own)
    charge = GaussianSteps(1.0, float(outgoing.facts["noise_multiplier"]), 2)
    assert seen == [(charge,)] * 4  # a sample and a gradient, twice


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_round_stays_charged_and_the_next_counts_it(
    end: type[BaseException],
    policy: MakePolicy,
    plan: MakePlan,
    starting_point: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = policy()

    def interrupt(step: int) -> None:
        raise end

    with pytest.raises(end):
        train_round(plan(), starting_point[0], own, interrupt)
    with ledger_of(own) as ledger:
        assert [entry.state for entry in ledger.entries()] == ["RESERVED"]
        (lost,) = ledger.history()
        assert lost.steps == 2
    again = train_round(plan(), starting_point[0], own)
    with ledger_of(own) as ledger:
        assert ledger.history()[0] == lost
        assert len(ledger.history()) == 2
        assert 0 < ledger.spent() <= ledger.budget
    assert float(again.facts["noise_multiplier"]) > lost.noise_multiplier


def test_a_second_run_pays_from_what_the_first_left(
    policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    own = policy()
    for run in ("first", "second"):
        outgoing = train_round(plan(run=run), starting_point[0], own)
    assert float(outgoing.facts["epsilon_spent"]) <= own.privacy.epsilon
    with ledger_of(own) as ledger:
        first, second = ledger.history()
    assert second.noise_multiplier > first.noise_multiplier


# --- noise -------------------------------------------------------------------------------------


def test_two_private_results_differ_by_exactly_the_noise_that_was_charged(
    policy: MakePolicy, plan: MakePlan, tiny_model: Path, tmp_path: Path
) -> None:
    """One step at full sampling: everything but the noise is the same in both, and cancels."""
    wide = {"rank": 8, "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")}
    asked = plan(
        rounds=4, local_steps=1, adapter=wide, optimizer={"learning_rate": 3.0},
        privacy={"clip_norm": 0.7},
    )  # fmt: skip
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    start = lora.initial(base.model, asked.spec, seed=5)
    one, two = (
        train_round(asked, start, policy(ledger=tmp_path / f"{i}.sqlite")) for i in range(2)
    )
    sigma = float(one.facts["noise_multiplier"])
    assert sigma == two.facts["noise_multiplier"]
    difference = flat(one.tensors) - flat(two.tensors)
    expected = 3.0 * sigma * 0.7 / 20 * 2**0.5  # rate, noise, clip norm, denominator, two draws
    n = difference.numel()
    assert n > 2500
    assert float(difference.std()) == pytest.approx(expected, rel=5 / (2 * n) ** 0.5)
    assert abs(float(difference.mean())) < 5 * expected / n**0.5


def test_a_window_that_is_padded_beyond_what_the_model_reads_is_refused(
    policy: MakePolicy, plan: MakePlan
) -> None:
    asked = plan(privacy={"max_tokens": 100})  # a note of 100 tokens is padded to 112
    with pytest.raises(Refusal, match="exceeds") as refusal:
        require_model(asked, asked.base_model, 100)
    assert "padded to 112" in refusal.value.detail
    require_model(asked, asked.base_model, 112)


def test_a_core_wider_than_a_layer_is_refused(policy: MakePolicy, plan: MakePlan) -> None:
    wide = plan(adapter={"rank": 48, "train": "core", "targets": ["k_proj"]}, upload="core")
    layers = {
        f"model.layers.{i}.self_attn.k_proj": LowRank(torch.zeros(16, 48), torch.zeros(48, 32))
        for i in range(2)
    }
    with pytest.raises(Refusal) as refusal:
        train_round(wide, Adapter(wide.spec, layers), policy())
    assert refusal.value.reason is Reason.LIMIT_EXCEEDED
    assert "width" in refusal.value.detail


def test_seeded_noise_repeats_a_round_and_is_refused_on_a_real_lineage(
    policy: MakePolicy, plan: MakePlan, starting_point: Start, tmp_path: Path
) -> None:
    def train(seed: int, ledger: str, lineage: str = "test:invented") -> torch.Tensor:
        own = policy(ledger=tmp_path / ledger, lineage=lineage)
        return flat(train_round(plan(), starting_point[0], own, test_seed=seed).tensors)

    one = train(1, "a.sqlite")
    assert one.equal(train(1, "b.sqlite"))
    assert not one.equal(train(2, "c.sqlite"))
    with ledger_of(policy(ledger=tmp_path / "a.sqlite", lineage="test:invented")) as ledger:
        assert ledger.entries()[0].body["randomness"] == "seeded, for tests"
    with pytest.raises(ValueError, match="this is real"):
        train(1, "real.sqlite", "invented")
    assert not (tmp_path / "real.sqlite").exists()


def test_without_privacy_no_noise_is_drawn_and_no_ledger_opened(
    policy: MakePolicy, plan: MakePlan, starting_point: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("drawn or opened")

    monkeypatch.setattr(SecureRandomness, "__init__", never)
    monkeypatch.setattr(Ledger, "__init__", never)
    own = policy(privacy=OPEN)
    outgoing = train_round(plan(privacy=OFF), starting_point[0], own)
    assert not own.ledger.exists()
    assert not {"epsilon_spent", "noise_multiplier", "delta"} & set(outgoing.facts)
    other = own.model_copy(update={"ledger": own.ledger.with_name("other.sqlite")})
    with pytest.raises(AssertionError, match="opened"):  # and the patch does reach the private path
        train_round(plan(), starting_point[0], other)


@pytest.mark.parametrize(("notes", "half"), [(1, False), (2, False), (2, True)])
def test_one_patient_moves_the_adapter_by_the_clip_norm_at_most(
    notes: int,
    half: bool,
    policy: MakePolicy,
    plan: MakePlan,
    starting_point: Start,
    tmp_path: Path,
) -> None:
    """One step, one patient, no noise: what moves is the clipped gradient and nothing else."""
    patient = next(p for p in map(str, range(99)) if split_units({p: ()}, 0.2)[0])
    texts = ("Seen for chest pain today.", "Given aspirin 100 mg for a fever.")[:notes]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": t, "pid": patient}) + "\n" for t in texts))
    site = policy(privacy=OPEN, notes={"path": own})

    def moved(clip_norm: float) -> float:
        privacy = {"enabled": False, "clip_norm": clip_norm, "max_notes_per_unit": 2}
        asked = plan(
            local_steps=1,
            privacy=privacy,
            optimizer={"learning_rate": 20.0},
            adapter={"freeze_half": half},
        )
        return float(flat(train_round(asked, starting_point[0], site).tensors).norm())

    unclipped = moved(1e6)  # the rate and the denominator, 20, cancel
    for clip_norm in (unclipped / 100, unclipped / 3):
        assert moved(clip_norm) == pytest.approx(clip_norm, rel=1e-4)
    assert moved(unclipped * 2) == pytest.approx(unclipped, rel=1e-6)


@pytest.mark.parametrize("engine", ["fast", "opacus"])
@pytest.mark.parametrize("part", ["B", "A", "both", "core"])
def test_a_half_gets_the_gradient_it_would_get_in_the_whole_and_only_it_travels(
    part: str, engine: str, policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    """One step that nothing clips, so that what is frozen has no influence on what is not."""
    own = policy(privacy=OPEN, compute={"engine": engine})
    start = starting_point[0]
    if part == "A":  # its gradient is zero where B is
        layers = {n: LowRank(x.B + 0.1, x.A) for n, x in start.layers.items()}
        start = Adapter(start.spec, layers)

    def sent(half: bool) -> tuple[TrainingPlan, dict[str, Tensor]]:
        asked = plan(
            local_steps=1,
            upload=part,
            adapter={"train": part, "freeze_half": half},
            privacy={**OFF, "clip_norm": 1e6},
        )
        return asked, train_round(asked, start, own).tensors

    _, whole = sent(False)
    asked, half = sent(True)
    trained = asked.trained_layers(start.layers)
    assert len(trained) == 2
    names = {name for name in whole if name.rpartition(".lora_")[0] in trained}
    assert set(half) == names < set(whole)
    for name in names:
        assert torch.allclose(half[name], whole[name], rtol=1e-4, atol=1e-7)
    untrained = asked.to_travel(start)
    assert any(not half[name].equal(untrained[name]) for name in names)


def test_every_number_of_a_private_half_is_noised_and_no_other_moves(
    policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    received, asked = starting_point[0], plan(adapter={"freeze_half": True})
    after = asked.joined(received, train_round(asked, received, policy()).tensors)
    trained = asked.trained_layers(received.layers)
    for name, layer in after.layers.items():
        was = received.layers[name]
        assert layer.A.equal(was.A)
        assert bool((layer.B != was.B).all()) == (name in trained)
        assert bool((layer.B != was.B).any()) == (name in trained)


# --- what a seed decides, and what a cut does not ----------------------------------------------


def test_a_seed_decides_everything_where_privacy_is_off(
    policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    own = policy(privacy=OPEN)

    def result(**others: Any) -> Tensor:
        return flat(train_round(plan(privacy=OFF, **others), starting_point[0], own).tensors)

    first = result()
    assert torch.equal(result(), first)
    assert not torch.equal(result(seed=4), first)
    assert not torch.equal(result(round=2), first)  # another round draws other patients


def test_learning_rate_and_steps_are_the_plans(
    policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    """SGD from B = 0 with one step: B is linear in the rate, and two steps move further."""
    own = policy(privacy=OPEN)
    steps: list[int] = []

    def result(rate: float, **others: Any) -> Tensor:
        asked = plan(privacy=OFF, optimizer={"learning_rate": rate}, **others)
        return flat(train_round(asked, starting_point[0], own, steps.append).tensors)

    single = result(1.0, local_steps=1)
    torch.testing.assert_close(result(0.5, local_steps=1), single / 2, rtol=1e-4, atol=1e-7)
    double = result(1.0, local_steps=2)
    assert float(double.norm()) > 1.3 * float(single.norm())
    assert steps == [1, 1, 1, 2]


# --- which notes -------------------------------------------------------------------------------


def test_held_out_patients_are_never_trained_on(policy: MakePolicy) -> None:
    found = site_units(policy(), "patient")
    units = found.train
    assert found.has_patients
    assert 5 < len(units) < 15  # of 15
    assert all(note.patient_id == unit for unit, notes in units.items() for note in notes)
    by_note = site_units(policy(), "note").train
    assert len(by_note) == sum(map(len, units.values()))
    assert {n.patient_id for notes in by_note.values() for n in notes} == set(units)
    assert {note.text for notes in by_note.values() for note in notes} == {
        note.text for notes in units.values() for note in notes
    }


def test_a_note_is_cut_to_the_plans_window(
    policy: MakePolicy,
    plan: MakePlan,
    starting_point: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = local_steps.clipped_sum
    lengths: list[int] = []

    def watched(model: Any, units: Any, *others: Any) -> Any:
        lengths.extend(len(note) for unit in units for note in unit)
        return real(model, units, *others)

    monkeypatch.setattr(local_steps, "clipped_sum", watched)
    train_round(plan(privacy=OFF | {"max_tokens": 11}), starting_point[0], policy(privacy=OPEN))
    assert set(lengths) == {11}


def test_unusable_notes_are_a_refusal_whose_detail_is_for_the_site(policy: MakePolicy) -> None:
    with pytest.raises(Refusal) as refusal:
        site_units(policy(notes={"path": Path("/nowhere/notes.jsonl")}), "patient")
    assert refusal.value.reason is Reason.NOTES_UNUSABLE
    assert "/nowhere" not in str(refusal.value)
    assert "notes.path=/nowhere/notes.jsonl" in refusal.value.detail


def test_the_plans_own_budget_holds_over_its_rounds_below_the_policys(
    policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    own = policy()
    for number in (1, 2):
        train_round(plan(round=number, privacy={"epsilon": 2.0}), starting_point[0], own)
    with ledger_of(own) as ledger:
        assert 1.9 < epsilon(ledger.history("first"), 1e-5) <= 2.0
        assert {e.body["site"] for e in ledger.entries() if e.state == "RESERVED"} == {"east"}


def test_room_is_kept_for_what_later_rounds_are_charged_beside_their_steps(
    policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    own = policy(share={"scores": "noised"}, privacy={"epsilon": 1.0})
    for number in (1, 2, 3):
        asked = plan(round=number, rounds=3, privacy={"epsilon": 1.0})
        train_round(asked, starting_point[0], own)
    with ledger_of(own) as ledger:
        rounds = [ledger.history("first", number) for number in (1, 2, 3)]
        assert 0.98 < epsilon(ledger.history(), 1e-5) <= 1.0
    steps = [next(m for m in charged if m.steps == 2) for charged in rounds]
    assert max(m.noise_multiplier for m in steps) < 1.01 * min(m.noise_multiplier for m in steps)
