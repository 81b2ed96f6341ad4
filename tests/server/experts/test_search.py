"""The search: finds the best, counts honestly, and goes on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.load import ConfigError
from server.experts.journal import Journal
from server.experts.search import Found, search
from server.experts.space import Candidate, Space
from strategies.base import MergeError
from strategies.registry import create

WHAT = {"what": "a test"}


def toy(candidate: Candidate) -> dict[str, float]:
    """Two tasks with one optimum: first expert at 0.7, density 0.4, sign by weight."""
    p = candidate.parameters
    off = (candidate.weights[0] - 0.7) ** 2 + (p["density"] - 0.4) ** 2
    return {"a": -off, "b": -off - 0.1 * (p["election"] == "unweighted") - (p["strength"] - 1) ** 2}


@pytest.fixture
def space() -> Space:
    return Space.of(create("ties"), 2, keep=["scope"])


def found_in(space: Space, file: Path, budget: int = 60, seed: int = 3, **kwargs: object) -> Found:
    evaluate = kwargs.pop("evaluate", toy)
    return search(space, evaluate, budget, seed, Journal(file, WHAT))  # type: ignore[arg-type]


def test_it_finds_the_optimum_within_the_issue_s_budget(space: Space, tmp_path: Path) -> None:
    found = found_in(space, tmp_path / "log.jsonl", 500)
    assert found.evaluations <= 500
    assert found.candidate.weights[0] == pytest.approx(0.7, abs=0.02)
    assert found.candidate.parameters["density"] == pytest.approx(0.4, abs=0.02)
    assert found.candidate.parameters["election"] == "weighted"
    assert found.objective == pytest.approx(sum(toy(found.candidate).values()) / 2)


def test_the_first_is_the_merge_as_configured_and_the_result_no_worse(
    space: Space, tmp_path: Path
) -> None:
    file = tmp_path / "log.jsonl"
    alone = found_in(space, file, 1)
    assert alone.candidate == space.configured
    assert found_in(space, file, 20).objective >= alone.objective


def test_what_is_configured_is_not_rounded() -> None:
    first = Space.of(create("ties", {"density": 1 / 3}), 3).configured
    assert first.parameters == create("ties", {"density": 1 / 3}).model_dump(mode="json")
    assert first.weights == (1 / 3,) * 3


def test_one_parameter_alone_is_searched_and_stays_in_its_range(tmp_path: Path) -> None:
    space = Space.of(
        create("ties"), 2, keep=["weights", "strength", "scope", "election", "agreeing"]
    )
    assert [dimension.name for dimension in space.dimensions] == ["density"]
    tried: list[float] = []

    def evaluate(candidate: Candidate) -> dict[str, float]:
        tried.append(candidate.parameters["density"])
        return {"a": tried[-1]}  # the best is at the end of the range

    assert found_in(space, tmp_path / "log.jsonl", 200, evaluate=evaluate).objective > 0.99
    assert all(0 < density <= 1 for density in tried)


@pytest.mark.parametrize("stop", [0, 1, 7, 30, 59])
def test_stopped_anywhere_it_ends_the_same(space: Space, tmp_path: Path, stop: int) -> None:
    whole = found_in(space, tmp_path / "whole.jsonl")
    left = stop

    def stopping(candidate: Candidate) -> dict[str, float]:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return toy(candidate)

    file = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        found_in(space, file, evaluate=stopping)
    evaluated: list[Candidate] = []

    def counted(candidate: Candidate) -> dict[str, float]:
        evaluated.append(candidate)
        return toy(candidate)

    assert found_in(space, file, evaluate=counted) == whole
    assert len(evaluated) == 60 - stop  # nothing that was finished is done again
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_larger_budget_goes_on_from_a_smaller_one(space: Space, tmp_path: Path) -> None:
    found_in(space, tmp_path / "log.jsonl", 20)
    again = found_in(space, tmp_path / "log.jsonl", 60)
    assert again == found_in(space, tmp_path / "whole.jsonl", 60)


def test_equal_candidates_are_evaluated_once(tmp_path: Path) -> None:
    space = Space.of(create("ties"), 2, keep=["weights", "density", "strength", "agreeing"])
    seen: list[str] = []

    def evaluate(candidate: Candidate) -> dict[str, float]:
        seen.append(candidate.key)
        return {"a": float(candidate.parameters["scope"] == "layer")}

    found = found_in(space, tmp_path / "log.jsonl", 500, evaluate=evaluate)
    assert len(seen) == len(set(seen)) == found.evaluations <= 4  # scope times election
    assert found.candidate.parameters["scope"] == "layer"


def test_a_merge_that_fails_is_recorded_and_passed_over(space: Space, tmp_path: Path) -> None:
    def evaluate(candidate: Candidate) -> dict[str, float]:
        if candidate.parameters["election"] == "weighted":
            raise MergeError("no")
        return {"a": float("nan")} if candidate.weights[0] < 0.5 else toy(candidate)

    journal = Journal(tmp_path / "log.jsonl", WHAT)
    found = search(space, evaluate, 40, 0, journal)
    assert found.candidate.parameters["election"] == "unweighted"
    reasons = {record["refused"] for record in journal.of("evaluation")}
    assert reasons == {"", "no", "a score is not finite"}
    assert len(journal.of("evaluation")) == found.evaluations == 40  # those that failed count too
    assert search(space, evaluate, 40, 0, Journal(tmp_path / "log.jsonl", WHAT)) == found


def test_nothing_that_can_be_merged_is_said_to_be_so(space: Space, tmp_path: Path) -> None:
    def evaluate(candidate: Candidate) -> dict[str, float]:
        raise MergeError("it is odd")

    with pytest.raises(ConfigError, match=r"ties: no candidate could be merged; it is odd"):
        found_in(space, tmp_path / "log.jsonl", 5, evaluate=evaluate)


def test_without_anything_to_search_there_is_one_evaluation(tmp_path: Path) -> None:
    space = Space.of(create("product_mean"), 1)
    found = found_in(space, tmp_path / "log.jsonl", evaluate=lambda _: {"a": 1.0})
    assert (found.evaluations, found.candidate.weights) == (1, (1.0,))


@pytest.mark.parametrize("name", ["della", "breadcrumbs"])
def test_parameters_that_bound_each_other_are_drawn_again(name: str, tmp_path: Path) -> None:
    space = Space.of(create(name), 2)
    found = found_in(space, tmp_path / "log.jsonl", evaluate=lambda c: {"a": c.weights[0]})
    assert found.evaluations == 60
