"""CMA-ES finds what is to be found, stays in the cube, and repeats itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from server.experts.cma import CmaEs, Vector


def minimise(
    loss: Callable[[Vector], float], n: int, generations: int, seed: int = 0
) -> tuple[float, list[Vector]]:
    optimizer, seen = CmaEs(np.full(n, 0.5), 0.2, seed), []
    for _ in range(generations):
        points = [optimizer.draw() for _ in range(optimizer.size)]
        seen += points
        optimizer.tell(points, [loss(point) for point in points])
    return min(map(loss, seen)), seen


def ellipsoid(x: Vector) -> float:
    scales = 10.0 ** np.linspace(0, 4, len(x))
    return float(scales @ (x - 0.3) ** 2)


def rotated(x: Vector) -> float:
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(len(x), len(x))))[0]
    return ellipsoid(turn @ (x - 0.3) + 0.3)


@pytest.mark.parametrize("loss", [ellipsoid, rotated])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_it_converges_whatever_the_scales_and_axes(loss: Callable[[Vector], float], n: int) -> None:
    assert minimise(loss, n, 250)[0] < 1e-6


def test_it_beats_random_search_on_the_budget_of_a_merge() -> None:
    def loss(x: Vector) -> float:
        return float(np.sum((x - 0.8) ** 2))

    random = np.random.default_rng(0).uniform(size=(500, 8))
    assert minimise(loss, 8, 50)[0] < min(map(loss, random)) / 100


def test_an_optimum_in_the_corner_is_reached_without_leaving_the_cube() -> None:
    best, seen = minimise(lambda x: float(x.sum()), 4, 100)
    assert best < 1e-3
    assert all(((point >= 0) & (point <= 1)).all() for point in seen)


def test_the_seed_decides_everything() -> None:
    def of(seed: int) -> list[Vector]:
        return minimise(ellipsoid, 3, 10, seed)[1]

    assert all((a == b).all() for a, b in zip(of(1), of(1), strict=True))
    assert not (of(1)[0] == of(2)[0]).all()


def test_a_point_that_could_not_be_judged_is_the_worst() -> None:
    assert minimise(lambda x: math.inf if x[0] < 0.4 else float(x[0]), 2, 60)[0] < 0.41
