"""The checks: the honest engine passes, and every sabotaged one is caught by the right check."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from client.privacy.engine import clipped_sum, noised_mean
from client.privacy.randomness import SecureRandomness
from conf.schema import ComputeSettings
from simulation.audit.checks import Bench, Verdict, examine
from simulation.audit.engine import HONEST, Engine
from simulation.audit.sabotage import SABOTAGED
from tests.simulation.audit.conftest import make_bench

CAUGHT_BY = {
    "a quarter of the noise": {"canaries", "noise"},
    "clips per micro-batch": {"sensitivity"},
    "batch-averaged loss": {"isolation"},
    "seeded noise": {"fresh noise"},
    "denominator follows N": {"constant"},
}


def found(verdict: Verdict) -> dict[str, float]:
    return {f.check: f.measured for f in verdict.findings}


def test_the_honest_engine_is_the_deployed_one_and_passes(bench: Bench) -> None:
    assert HONEST.gradient_sum is clipped_sum
    assert HONEST.noised is noised_mean
    assert isinstance(HONEST.noise().__self__, SecureRandomness)  # type: ignore[attr-defined]
    verdict = examine(HONEST, bench)
    assert verdict.failed == ()
    assert verdict.as_it_should_be
    assert 0 < verdict.game.proved < verdict.game.claimed == pytest.approx(4.377, abs=0.01)
    # The bound of C is reached: a clip norm that were kept by shrinking everything would hide much.
    assert found(verdict)["sensitivity"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("micro_tokens", [0, 256])
@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_the_engine_is_checked_as_the_site_computes(
    engine: str, micro_tokens: int, bench: Bench
) -> None:
    compute = ComputeSettings.model_validate({"engine": engine, "micro_tokens": micro_tokens})
    installed = HONEST.under(compute)
    called = cast(partial[Any], installed.gradient_sum)
    assert called.func is clipped_sum
    assert called.keywords == {"engine": engine, "micro_tokens": micro_tokens}
    assert examine(installed, bench).failed == ()
    assert SABOTAGED[0].under(compute).gradient_sum is called
    assert SABOTAGED[1].under(compute) is SABOTAGED[1]


@pytest.mark.parametrize("train", ["A", "core"])
def test_other_matrices_are_planted_in_too(train: str) -> None:
    bench = make_bench(60, train)
    assert examine(HONEST, bench).failed == ()
    game = examine(HONEST, bench).game
    n = int(game.included.sum())
    assert game.scores[game.included].mean() == pytest.approx(1, abs=5 * 0.7 / np.sqrt(n))
    for engine in SABOTAGED:
        assert set(examine(engine, bench).failed) & CAUGHT_BY[engine.name]


@pytest.mark.parametrize("engine", SABOTAGED, ids=lambda e: e.name)
def test_a_sabotaged_engine_is_caught_by_its_check(engine: Engine, bench: Bench) -> None:
    verdict = examine(engine, bench)
    assert set(verdict.failed) >= CAUGHT_BY[engine.name]
    assert verdict.as_it_should_be
    # and by nothing that its mistake does not touch
    assert "constant" not in verdict.failed or engine.name == "denominator follows N"
    assert "fresh noise" not in verdict.failed or engine.name == "seeded noise"


def test_every_mistake_of_the_list_is_there() -> None:
    assert {engine.name for engine in SABOTAGED} == set(CAUGHT_BY)


def test_canaries_are_in_the_scores_at_full_norm(bench: Bench) -> None:
    """Their score is 1 if included and 0 if not, plus the noise: what the bounds assume."""
    game = examine(HONEST, bench).game
    inside, outside = game.scores[game.included], game.scores[~game.included]
    spread = 5 / np.sqrt(len(inside))
    assert inside.mean() == pytest.approx(1, abs=spread)
    assert outside.mean() == pytest.approx(0, abs=spread)
    assert np.concatenate([inside - 1, outside]).std() == pytest.approx(1, abs=0.25)


def test_an_engine_without_noise_and_one_that_is_not_a_number_fail(bench: Bench) -> None:
    silent = Engine("silent", noised=lambda s, std, d, n: noised_mean(s, 0.0, d, None))
    assert set(examine(silent, bench).failed) == {"canaries", "fresh noise", "constant", "noise"}
    broken = Engine("broken", noised=lambda s, std, d, n: {k: v * np.nan for k, v in s.items()})
    assert {"fresh noise", "constant", "noise"} <= set(examine(broken, bench).failed)


def test_both_factors_can_be_trained() -> None:
    assert examine(HONEST, make_bench(50, "both")).failed == ()
