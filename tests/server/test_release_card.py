"""The card states every fact, claims nothing beyond them, and reads as a model card."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from client.privacy.accountant import GaussianSteps, epsilon
from conf.schema import TrainedFactors
from server.release_card import (
    AlignmentFacts,
    HospitalFacts,
    PrivacyFacts,
    ReleaseFacts,
    Score,
    round_up,
    write_model_card,
)

FACTS = ReleaseFacts(
    name="ward-notes-1",
    created="2026-11-21T10:42:07+00:00",
    base_model="SmolLM2-135M-Instruct",
    base_fingerprint="sha256:8f6d0c2b51e7a94d",
    base_remark="its weights rounded",
    strategy="fedsvd",
    rounds=3,
    rank=8,
    alpha=16.0,
    targets=("q_proj", "v_proj"),
    trained="B",
    hospitals=(
        HospitalFacts("north", 7.9412, 1e-5, patients=161, notes=512),
        HospitalFacts("harbor", 5.2037, 2.5e-6),
    ),
    privacy=PrivacyFacts("patient", 8.0, "PLD (dp-accounting 0.6.0)", 1.0, 0.25),
    alignment=AlignmentFacts("synthetic MediFlow-schema instructions", 24, 12),
    evaluation=(
        Score("held-out notes, north", "perplexity", 23.418, 14.377, 14.611),
        Score("held-out instructions", "preference accuracy", 0.531, None, 0.812),
    ),
    versions=(("peft", "0.21.2"),),
)


def card(folder: Path, facts: ReleaseFacts) -> str:
    return write_model_card(folder, facts).read_text(encoding="utf-8")


def test_front_matter_is_that_of_a_peft_adapter(tmp_path: Path) -> None:
    _, head, _ = card(tmp_path, FACTS).split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["base_model"] == FACTS.base_model
    assert facts["library_name"] == "peft"
    assert "differential-privacy" in facts["tags"]
    assert "license" not in facts


def test_card_says_which_factors_were_trained_in_which_layers(tmp_path: Path) -> None:
    text = card(tmp_path, FACTS)
    assert "on q\\_proj, v\\_proj; hospitals trained factor B, with a shared and frozen A |" in text
    text = card(tmp_path, replace(FACTS, trained="A", layers=(28, 29)))
    assert "in layers 28, 29; hospitals trained factor A, with a shared and frozen B |" in text
    told = {card(tmp_path, replace(FACTS, trained=part)) for part in get_args(TrainedFactors)}
    assert len(told) == len(get_args(TrainedFactors))


def test_card_states_every_fact(tmp_path: Path) -> None:
    text = card(tmp_path, FACTS)
    for fact in (
        FACTS.base_fingerprint, "(its weights rounded)", "| rounds | 3 |", "rank 8, alpha 16.0",
        "one **patient**",
        "adding or removing one patient", "PLD (dp-accounting 0.6.0)", "norm 1.0",
        "| north | 7.95 | 1e-05 | 161 | 512 |",
        "| harbor | 5.21 | 2.5e-06 | not public | not public |",
        "24 steps of SFT, then 12 of DPO", "| 23.418 | 14.377 | 14.611 |",
        "| 0.531 | – | 0.812 |", "Not a medical device", "2 hospitals",
    ):  # fmt: skip
        assert fact in text, fact
    assert "NO privacy" not in text


def test_privacy_off_is_said_in_bold_and_nothing_is_promised(tmp_path: Path) -> None:
    hospitals = tuple(replace(h, epsilon=None, delta=None) for h in FACTS.hospitals)
    text = card(tmp_path, replace(FACTS, privacy=None, hospitals=hospitals))
    assert re.search(r"\*\*There is NO privacy guarantee[^*]*\*\*", text)
    assert "differential-privacy" not in text
    assert "ε" not in text
    assert "The guarantee" not in text


@pytest.mark.parametrize("missing", ["epsilon", "delta"])
def test_a_private_release_without_epsilon_is_refused(missing: str) -> None:
    with pytest.raises(
        ValueError, match="hospital west has no recorded epsilon and delta"
    ) as error:
        replace(
            FACTS,
            hospitals=(replace(HospitalFacts("west", 1.0, 1e-5), **{missing: None}),),  # type: ignore[arg-type]
        )
    assert "\n" not in str(error.value)


def test_no_alignment_and_no_evaluation_still_make_a_card(tmp_path: Path) -> None:
    text = card(tmp_path, replace(FACTS, alignment=None, evaluation=(), simulated=True))
    assert "| alignment | none |" in text
    assert "## Evaluation" not in text
    assert "All hospitals and patients behind this adapter are simulated." in text


def test_a_pooled_reference_is_not_called_a_federation(tmp_path: Path) -> None:
    text = card(tmp_path, replace(FACTS, pooled=True))
    assert "brought together in one place" in text
    assert "sent only adapters" not in text
    assert "before anything left" not in text
    assert "The notes themselves left their hospitals, without any noise" in text
    assert "for everything that the place where the notes were brought together released" in text


def test_statistics_that_hospitals_sent_are_told(tmp_path: Path) -> None:
    assert "statistics" not in card(tmp_path, FACTS)
    text = card(tmp_path, replace(FACTS, statistics="gram"))
    assert "sent only adapters, and noised statistics of its notes, which the" in text
    assert "each sent noised statistics for the merge (gram), charged as one step more" in text


def test_of_notes_as_units_no_more_is_promised_than_group_privacy_gives(tmp_path: Path) -> None:
    """k eps holds at a delta that grows: one Gaussian step, a patient of two notes moves it by 2C.

    At sigma 1 its epsilon at delta 1e-5 is more than twice that of a note.
    """
    one, two = (epsilon((GaussianSteps(1.0, s, 1),), 1e-5) for s in (1.0, 0.5))
    assert two > 2 * one
    assert FACTS.privacy is not None
    text = card(tmp_path, replace(FACTS, privacy=replace(FACTS.privacy, unit="note")))
    assert "the bound is k·ε at a δ that grows to δ·(e^(kε) − 1)/(e^ε − 1)" in text


def test_tables_stay_tables_whatever_the_names(tmp_path: Path) -> None:
    odd = HospitalFacts("a|b\n<img src=x> *c*", 1.0, 1e-5)
    text = card(tmp_path, replace(FACTS, hospitals=(odd,)))
    assert "<img" not in text
    lines = text.splitlines()
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    tables = [block.splitlines() for block in blocks]
    assert len(tables) == 3
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
        assert len(widths) == 1, table
        assert lines[lines.index(table[0]) - 1] == ""  # Markdown needs the empty line before


def test_loading_code_compiles_and_names_the_base(tmp_path: Path) -> None:
    text = card(tmp_path, replace(FACTS, base_model='odd"name\\'))
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    constants = compile(code, "card", "exec").co_consts
    assert 'odd"name\\' in constants


@given(st.floats(0, 1e6))
def test_epsilon_is_never_stated_below_what_was_spent(spent: float) -> None:
    assert float(round_up(spent)) >= spent - 1e-8
