"""Randomness and sampling: distribution, independence, and what cannot be done with a seed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from client.privacy import randomness
from client.privacy.randomness import SecureRandomness, SeededSampling
from client.privacy.sampling import poisson_sample
from client.privacy.seeded_noise import SeededNoise

UNITS = {f"p{i}": [f"p{i}n{j}" for j in range(1 + i % 4)] for i in range(2000)}


def test_noise_is_standard_normal() -> None:
    draws = SecureRandomness().normal(200_000)
    assert stats.kstest(draws, "norm").pvalue > 1e-5
    assert draws.std() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_any_number_can_be_drawn(n: int) -> None:
    assert SecureRandomness().normal(n).shape == (n,)


def test_uniform_numbers_are_uniform() -> None:
    draws = SecureRandomness().uniform(100_000)
    assert 0 <= draws.min() <= draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-5


def test_a_key_is_replaced_before_its_stream_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that ended would raise, and when it does depends on how many notes there are."""
    keys = []
    real = SecureRandomness._key

    def counted(self: SecureRandomness) -> bytes:
        keys.append(real(self))
        return keys[-1]

    monkeypatch.setattr(randomness, "_BYTES_A_KEY", 1000)
    monkeypatch.setattr(SecureRandomness, "_key", counted)
    draws = SecureRandomness().normal(20_000)
    assert len(keys) == 160 == len(set(keys))
    assert stats.kstest(draws, "norm").pvalue > 1e-5
    assert abs(np.corrcoef(draws[:-125], draws[125:])[0, 1]) < 0.05


def test_seeded_noise_differs_by_every_part_of_its_key() -> None:
    one, same, other = (SeededNoise("test:x", 1, site).normal(500) for site in ("a", "a", "b"))
    assert np.array_equal(one, same)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.3
    with pytest.raises(ValueError, match="this is real"):
        SeededNoise("patients", 1)


def test_two_generators_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(0)
    one = SecureRandomness().normal(1000)
    np.random.seed(0)
    other = SecureRandomness().normal(1000)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


def test_what_can_be_seeded_cannot_make_noise() -> None:
    assert not hasattr(SeededSampling(1, "site", 1), "normal")


def test_seeded_sampling_repeats_and_depends_on_its_whole_key() -> None:
    one, same, other = (SeededSampling(3, s, 1).uniform(50) for s in ("a", "a", "b"))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_units_enter_independently_at_the_public_rate() -> None:
    sizes = [len(poisson_sample(UNITS, 0.3, 9, SecureRandomness())) for _ in range(60)]
    assert np.mean(sizes) == pytest.approx(600, abs=6 * (600 * 0.7 / 60) ** 0.5)
    assert np.std(sizes) == pytest.approx((600 * 0.7) ** 0.5, rel=0.5)  # binomial, not a fixed size


def test_a_unit_gives_at_most_k_records_chosen_at_random() -> None:
    batch = poisson_sample(UNITS, 1.0, 2, SecureRandomness())
    assert len(batch) == len(UNITS)
    assert [len(b) for b in batch] == [min(2, len(v)) for v in UNITS.values()]
    chosen = {r for b, own in zip(batch, UNITS.values(), strict=True) if len(own) == 4 for r in b}
    share = [sum(r.endswith(f"n{j}") for r in chosen) for j in range(4)]
    assert min(share) > 150  # 250 expected of each


def test_a_batch_may_be_empty() -> None:
    assert poisson_sample({"p": ["n"]}, 1e-9, 1, SeededSampling(1)) == []
