"""Shares are ratios of gains, the reference is the nearest run, and only differing keys show."""

from __future__ import annotations

import copy
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from simulation.comparison import (
    compare,
    differences,
    flatten,
    gains,
    print_comparison,
    reading,
    share,
    write_comparison,
)
from simulation.record import RunRecordError, load_run

Json = dict[str, Any]


@pytest.fixture
def arm(
    make_run: Callable[[str, Json, Json], Path], summary: Json, config: Json
) -> Callable[..., Path]:
    """A run whose gain is ``scale`` times that of the example, at every hospital."""

    def write(
        name: str, scale: float, private: bool = True, pooled: bool = False, merge: str = "fedsvd"
    ) -> Path:
        facts, settings = copy.deepcopy(summary), copy.deepcopy(config)
        for hospital in facts["hospitals"].values():
            bits = hospital["bits_per_char"]
            bits["merged"] = bits["base"] - scale * (bits["base"] - bits["merged"])
            hospital["epsilon"] = hospital["epsilon"] if private else None
        if not private:
            facts["privacy"] = {"enabled": False}
        facts["strategy"] = settings["strategy"]["name"] = merge
        settings["privacy"]["enabled"] = private
        settings["hospitals"]["layout"] = "pooled" if pooled else "separate"
        settings["runs"] = f"runs/{name}"
        return make_run(name, facts, settings)

    return write


def test_shares_are_the_ratio_of_gains_at_every_hospital(arm: Callable[..., Path]) -> None:
    folders = [arm("private", 0.6), arm("open", 0.8, False), arm("pooled", 1.2, False, True)]
    private, plain, pooled = compare([load_run(folder) for folder in folders]).arms
    assert private.of_unprivate is not None
    assert private.of_pooled is not None
    assert plain.of_pooled is not None
    for kept, expected in (
        (private.of_unprivate, 0.75),
        (private.of_pooled, 0.5),
        (plain.of_pooled, 2 / 3),
    ):
        assert kept.overall == pytest.approx(expected)
        assert list(kept.by_hospital) == ["north", "harbor", "valley"]
        assert all(value == pytest.approx(expected) for value in kept.by_hospital.values())
        assert kept.same_notes
    assert plain.of_unprivate is None
    assert pooled.of_unprivate is None
    assert pooled.of_pooled is None


def test_gain_is_base_minus_merged(arm: Callable[..., Path], summary: Json) -> None:
    run = load_run(arm("one", 1.0))
    assert gains(run) == pytest.approx(
        {
            name: hospital["bits_per_char"]["base"] - hospital["bits_per_char"]["merged"]
            for name, hospital in summary["hospitals"].items()
        }
    )


def test_reference_is_the_most_similar_run(arm: Callable[..., Path]) -> None:
    folders = [
        arm("a", 0.5, merge="ffa"),
        arm("b", 0.9, False, merge="fedsvd"),
        arm("c", 1.0, False, merge="ffa"),
    ]
    first = compare([load_run(folder) for folder in folders]).arms[0]
    assert first.of_unprivate is not None
    assert first.of_unprivate.reference == "no privacy, ffa"
    assert first.of_unprivate.overall == pytest.approx(0.5)


def test_other_held_out_notes_are_pointed_out(arm: Callable[..., Path]) -> None:
    pooled = arm("pooled", 1.0, False, True)
    facts = json.loads((pooled / "summary.json").read_text(encoding="utf-8"))
    facts["hospitals"] = {"pooled": facts["hospitals"]["north"]}
    (pooled / "summary.json").write_text(json.dumps(facts), encoding="utf-8")
    comparison = compare([load_run(arm("plain", 0.5, False)), load_run(pooled)])
    kept = comparison.arms[0].of_pooled
    assert kept is not None
    assert not kept.same_notes
    assert kept.overall is not None
    assert set(kept.by_hospital.values()) == {None}
    assert "different held-out notes" in reading(comparison)


def test_reference_that_gains_nothing_gives_no_share(arm: Callable[..., Path]) -> None:
    arms = compare([load_run(arm("a", 0.5)), load_run(arm("b", -0.1, False))]).arms
    assert arms[0].of_unprivate is not None
    assert arms[0].of_unprivate.overall is None


@given(st.floats(-10, 10), st.floats(1e-6, 10), st.floats(0.01, 100))
def test_share_does_not_depend_on_the_unit_of_gain(gain: float, other: float, unit: float) -> None:
    kept = share(gain, other)
    assert kept is not None
    assert kept * other == pytest.approx(gain)
    assert share(gain * unit, other * unit) == pytest.approx(kept)
    assert share(other, other) == 1
    assert share(gain, -other) is None


_VALUES = st.sampled_from([0, 1, True, "x", "", None, [1], [1, 2]])
_CONFIGS = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), _VALUES),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), st.one_of(_VALUES, inner)),
    max_leaves=8,
)


@given(_CONFIGS, _CONFIGS)
def test_differences_are_exactly_the_keys_that_differ(one: Json, two: Json) -> None:
    left, right = flatten(one), flatten(two)
    found = differences([one, two])
    missing = object()
    for key in left.keys() | right.keys():
        assert (key in found) == (left.get(key, missing) != right.get(key, missing))
    assert differences([one, one]) == {}


def test_page_shows_gains_shares_and_differing_keys(
    arm: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [arm("private", 0.6), arm("open", 0.8, False)]
    path = write_comparison(folders, tmp_path / "sweep")
    assert path == tmp_path / "sweep" / "report.html"
    text = path.read_text("utf-8")
    for folder in folders:
        for gain in gains(load_run(folder)).values():
            assert f'<data value="{gain}">{gain:.3f}</data>' in text
        merges = load_run(folder).summary.rounds
        cosine = statistics.fmean(r.mean_cosine for r in merges if r.mean_cosine is not None)
        assert f'<data value="{cosine}">{cosine:.3f}</data>' in text
    assert "75\N{NO-BREAK SPACE}%" in text
    assert "privacy.enabled" in text
    for same in ("adapter.rank", "hospitals.count", "runs/private"):
        assert same not in text
    assert "<script" not in text
    assert 'aria-label="Gain over the base model' in text


def test_runs_that_look_alike_are_told_apart(arm: Callable[..., Path]) -> None:
    arms = compare([load_run(arm("first", 0.5)), load_run(arm("second", 0.6))]).arms
    assert [a.label for a in arms] == ["ε 8 per patient (first)", "ε 8 per patient (second)"]


def test_terminal_table(arm: Callable[..., Path]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_comparison([arm("private", 0.6), arm("open", 0.8, False)], console)
    (row,) = (line for line in console.export_text().splitlines() if "per patient" in line)
    assert "7.95" in row
    assert "75" in row


def test_one_run_is_no_comparison(arm: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RunRecordError, match="at least 2 runs"):
        write_comparison([arm("only", 1.0)], tmp_path)
