"""Every strategy has a search space that its own declared ranges give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.load import ConfigError
from server.experts.space import Dimension, Space, parameters_of
from strategies.registry import OURS, create

NAMES = sorted(kind.name for kind in OURS)


def names(strategy: str, **parameters: object) -> set[str]:
    return {d.name for d in parameters_of(create(strategy, parameters))}


def test_what_is_searched_follows_from_the_fields() -> None:
    assert names("product_mean") == set()
    assert names("task_arithmetic") == {"strength"}
    assert names("ties") == {"density", "scope", "election", "agreeing", "strength"}
    assert names("breadcrumbs") == {"density", "outliers", "elect", "agreeing", "strength"}
    assert names("knots") == {"density", "strength"}
    assert names("tsv_m") == {"strength"}
    assert names("krum") == {"scope"}  # its counts have no upper bound
    assert names("lines", of="ties") == {"first", "last"} | {
        f"parameters.{name}" for name in names("ties")
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_the_merge_as_configured(name: str) -> None:
    strategy = create(name)
    space = Space.of(strategy, 3)
    first = space.candidate(space.start)
    assert first is not None
    assert first.weights == pytest.approx((1 / 3,) * 3)
    assert create(name, first.parameters) == (
        strategy if name != "lines" else create("lines", first.parameters)
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_point_is_a_valid_merge_or_refused(name: str) -> None:
    space = Space.of(create(name), 3)
    random = np.random.default_rng(0)
    taken = 0
    for at in random.uniform(size=(200, len(space.dimensions))):
        candidate = space.candidate(at)
        if candidate is not None:
            taken += 1
            create(name, candidate.parameters)
            assert min(candidate.weights) > 0
            assert sum(candidate.weights) == pytest.approx(1, abs=1e-12)
    assert taken > 20
    corners = [np.zeros(len(space.dimensions)), np.ones(len(space.dimensions))]
    if name not in ("della", "breadcrumbs"):  # whose parameters bound each other
        assert all(space.candidate(corner) for corner in corners)


def test_the_parameters_of_a_wrapped_strategy_are_set_in_place() -> None:
    space = Space.of(create("lines", {"of": "ties"}), 2, keep=["weights"])
    at = space.start
    where = [d.name for d in space.dimensions].index("parameters.density")
    at[where] = 1.0
    candidate = space.candidate(at)
    assert candidate is not None
    assert candidate.parameters["parameters"]["density"] == pytest.approx(0.999)
    assert candidate.parameters["of"] == "ties"
    twice = Space.of(create("lines", {"of": "lines", "parameters": {"of": "ties"}}), 2)
    found = twice.candidate(twice.start)
    assert found is not None
    assert found.parameters["parameters"]["parameters"]["density"] == pytest.approx(0.2)


@given(at=st.floats(0, 1), low=st.floats(0.001, 1), ratio=st.floats(2, 1e4))
def test_place_and_value_are_inverse(at: float, low: float, ratio: float) -> None:
    dimension = Dimension("x", low, low * ratio)
    value = dimension.value(at)
    assert low <= value <= low * ratio
    assert dimension.value(dimension.place(value)) == pytest.approx(value, rel=1e-3)


def test_choices_and_counts_cover_all_they_have() -> None:
    grid = np.linspace(0, 1, 101)
    choice = Dimension("x", choices=("a", "b", "c"))
    assert {choice.value(at) for at in grid} == {"a", "b", "c"}
    assert all(choice.value(choice.place(c)) == c for c in choice.choices)
    assert {Dimension("x", 1, 5, whole=True).value(at) for at in grid} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_density_for_each_expert_is_searched_for_each(wrapped: bool) -> None:
    own: dict[str, object] = {"density": [0.3, 0.6]}
    name, parameters = ("lines", {"of": "dare", "parameters": own}) if wrapped else ("dare", own)
    space = Space.of(create(name, parameters), 2, ["weights"])
    prefix = "parameters." if wrapped else ""
    where = [d.name for d in space.dimensions].index(f"{prefix}density 1")
    at = space.start
    for place, second in ((at[where], 0.6), (0.0, 0.001)):
        at[where] = place
        candidate = space.candidate(at)
        assert candidate is not None
        found = candidate.parameters["parameters"] if wrapped else candidate.parameters
        assert found["density"] == pytest.approx([0.3, second])
    kept = Space.of(create(name, parameters), 2, [f"{prefix}density"])
    assert not any("density" in d.name for d in kept.dimensions)


def test_what_is_kept_is_not_searched() -> None:
    space = Space.of(create("ties", {"density": 0.3}), 2, ["weights", "density", "agreeing"])
    assert {d.name for d in space.dimensions} == {"scope", "election", "strength"}
    candidate = space.candidate(np.zeros(3))
    assert candidate is not None
    assert candidate.parameters["density"] == 0.3
    assert candidate.weights == (0.5, 0.5)
    with pytest.raises(
        ConfigError, match=r"search.keep: gamma is not searched; choose of agreeing"
    ):
        Space.of(create("ties"), 2, ["gamma"])


def test_weights_are_searched_only_where_they_have_an_effect() -> None:
    assert not Space.of(create("median"), 3).dimensions
    names = [d.name for d in Space.of(create("lines", {"of": "trimmed_mean"}), 3).dimensions]
    assert names == ["first", "last"]
    with pytest.raises(ConfigError, match=r"search.keep: weights is not searched"):
        Space.of(create("median"), 3, ["weights"])
