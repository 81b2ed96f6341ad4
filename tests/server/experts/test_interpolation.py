"""Scaling an update against SLERP of full weights: equal to mergekit's, and how far apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors
from torch import Tensor

from adapters.adapter import Adapter
from adapters.base_model import BaseModel
from adapters.lowrank import LowRank
from server.experts.inputs import weights_under
from server.experts.interpolation import arc, furthest, towards_base


def pair(size: float, seed: int = 0, shape: tuple[int, int] = (24, 40)) -> tuple[Tensor, LowRank]:
    """A weight, and a rank-3 update of ``size`` times its norm."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    delta = LowRank(
        torch.randn(shape[0], 3, generator=g, dtype=torch.float64),
        torch.randn(3, shape[1], generator=g, dtype=torch.float64),
    )
    return weight, delta * (size * float(weight.norm()) / delta.norm())


@given(size=st.floats(0.001, 3), t=st.floats(0.05, 0.95), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_coefficients_are_those_of_mergekit(size: float, t: float, seed: int) -> None:
    weight, delta = pair(size, seed)
    theirs = merge_tensors([weight, weight + delta.dense()], "slerp", parameters={"t": t},
                           base_index=0)  # fmt: skip
    found = arc(weight, delta, t)
    ours = found.base * weight + found.update * delta.dense()
    assert (ours - theirs).norm() < 1e-6 * weight.norm()  # mergekit rounds t to float32
    line = weight + t * delta.dense()
    apart = float((ours - line).norm() / (t * delta.dense()).norm())
    assert found.departure == pytest.approx(apart, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("t", [0.1, 0.25, 0.5])
def test_a_small_update_is_scaled_by_slerp_too(t: float) -> None:
    weight, delta = pair(0.03)
    assert arc(weight, delta, t).departure == 0  # mergekit takes the line here
    theirs = merge_tensors([weight, weight + delta.dense()], "slerp", parameters={"t": t},
                           base_index=0)  # fmt: skip
    assert torch.allclose(theirs, weight + t * delta.dense(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("t", [0.1, 0.25, 0.5])
def test_the_departure_grows_with_the_angle(size: float, t: float) -> None:
    """About (1 - t) theta / 2 where update and weight are orthogonal."""
    weight, delta = pair(size)
    inner = float((weight * delta.dense()).sum() / weight.square().sum())
    delta = delta - LowRank(inner * weight, torch.eye(40, dtype=torch.float64))
    found = arc(weight, delta, t, line=1.0)
    assert found.angle == pytest.approx(math.atan(delta.norm() / float(weight.norm())), rel=1e-9)
    assert found.departure == pytest.approx((1 - t) * found.angle / 2, rel=0.05)


def test_no_update_departs_from_nothing() -> None:
    weight, delta = pair(0.1)
    assert arc(weight, delta * 0.0, 0.5).departure == 0


def test_an_expert_brought_back_is_its_update_scaled(
    base: BaseModel, random_adapter: Callable[..., Adapter]
) -> None:
    expert = random_adapter(1)
    quarter = towards_base(expert, 0.25)
    for name, delta in expert.deltas().items():
        assert torch.allclose(quarter.deltas()[name].dense(), 0.25 * delta.dense())
        assert quarter.layers[name].B.equal(expert.layers[name].B)
    found = furthest(weights_under(base, expert), expert, 0.25)
    assert found.departure == max(
        arc(weight, expert.deltas()[name], 0.25, line=1.0).departure
        for name, weight in weights_under(base, expert).items()
    )
