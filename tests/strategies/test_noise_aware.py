"""The noise-aware mean: right weights, right shrinkage, and what it refuses."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from conf.load import ConfigError, load
from conf.schema import RunSettings
from strategies.base import Draw, MergeError, Noise
from strategies.merging import merge
from strategies.noise_aware import Shrinkage, precision_weights, shrunk
from strategies.registry import create, require_strategy

SHAPES = {"layers.0.q": (30, 20), "layers.1.v": (12, 25)}
SPEC = AdapterSpec(4, 8.0, ("q", "v"))


def start(seed: int = 0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    return Adapter(
        SPEC,
        {n: LowRank(torch.randn(m, 4, generator=g), torch.randn(4, w, generator=g))
         for n, (m, w) in SHAPES.items()},
    )  # fmt: skip


def moved(sent: Adapter, steps: dict[str, Tensor], std: float, seed: int) -> Adapter:
    """``sent`` with B moved by the given steps and noise of that standard deviation."""
    g = torch.Generator().manual_seed(seed)
    return Adapter(
        sent.spec,
        {n: LowRank(x.B + steps[n] + std * torch.randn(x.B.shape, generator=g), x.A)
         for n, x in sent.layers.items()},
    )  # fmt: skip


def signal(seed: int, size: float) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(m, 4, generator=g) for n, (m, _) in SHAPES.items()}


def error(merged: Adapter, sent: Adapter, truth: dict[str, Tensor]) -> float:
    """Root mean square over the entries of B."""
    gaps = [merged.layers[n].B - x.B - truth[n] for n, x in sent.layers.items()]
    return math.sqrt(torch.cat([gap.flatten() for gap in gaps]).square().mean())


def test_hospitals_that_agree_count_by_what_their_noise_leaves_certain() -> None:
    """The error of the optimal weights is known: (sum 1 / tau^2)^-1/2."""
    sent, truth, stds = start(), signal(1, 0.1), (0.1, 0.1, 1.0, 2.0)
    found = {"noise_aware": [], "ffa": []}  # type: dict[str, list[float]]
    for trial in range(40):
        adapters = [moved(sent, truth, std, 10 * trial + k) for k, std in enumerate(stds)]
        for name, errors in found.items():
            merged = merge(create(name), adapters, [0.25] * 4, Draw(noise=Noise(sent, stds)))
            errors.append(error(merged.adapter, sent, truth))
    best = sum(std**-2 for std in stds) ** -0.5
    mean = {name: math.sqrt(sum(e**2 for e in errors) / 40) for name, errors in found.items()}
    assert mean["noise_aware"] == pytest.approx(best, rel=0.05)
    assert mean["ffa"] == pytest.approx(math.sqrt(sum(s**2 for s in stds)) / 4, rel=0.05)


def test_hospitals_that_differ_much_count_as_they_are_given() -> None:
    found = precision_weights([signal(k, 10.0) for k in range(3)], [0.5, 0.3, 0.2], [0.1, 0.2, 0.3])
    assert found == pytest.approx([0.5, 0.3, 0.2], rel=2e-3)


@pytest.mark.parametrize("between", [0.0, 0.3, 2.0])
def test_the_weights_follow_from_the_variance_between_hospitals(between: float) -> None:
    """With many entries its estimate is close to the truth, so the weights are the optimal ones."""
    g = torch.Generator().manual_seed(3)
    stds, weights = [0.5, 1.0, 2.0], [0.2, 0.3, 0.5]
    common = torch.randn(40_000, generator=g)
    parts = [common + (between + std**2) ** 0.5 * torch.randn(40_000, generator=g) for std in stds]
    wanted = [w / (between + std**2) for w, std in zip(weights, stds, strict=True)]
    found = precision_weights([{"q": part} for part in parts], weights, stds)
    assert found == pytest.approx([w / sum(wanted) for w in wanted], rel=0.1)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_noise_far_below_what_hospitals_agree_on_is_still_told_apart(size: float) -> None:
    g = torch.Generator().manual_seed(5)
    common = torch.randn(20_000, generator=g, dtype=torch.float64)
    stds = [size, 3 * size, 10 * size]
    moves = [{"q": common + std * torch.randn(20_000, generator=g).double()} for std in stds]
    wanted = [1.0, 1 / 9, 1 / 100]
    found = precision_weights(moves, [1 / 3] * 3, stds)
    assert found == pytest.approx([w / sum(wanted) for w in wanted], rel=0.05)


def test_weights_go_with_their_hospitals() -> None:
    sent, stds = start(), (0.1, 0.5, 2.0)
    adapters = [moved(sent, signal(k, 0.2), std, k) for k, std in enumerate(stds)]
    results = []
    for order in permutations(range(3)):
        draw = Draw(noise=Noise(sent, tuple(stds[k] for k in order)))
        weights = [(0.5, 0.3, 0.2)[k] for k in order]
        own = merge(create("noise_aware"), [adapters[k] for k in order], weights, draw)
        results.append(own.adapter.layers["layers.0.q"].B)
    assert all(torch.allclose(r, results[0], atol=1e-6) for r in results)


@pytest.mark.parametrize("how", ["none", "singular", "stein"])
def test_without_noise_it_is_the_exact_mean(how: Shrinkage) -> None:
    sent = start()
    adapters = [moved(sent, signal(k, 0.2), 0.0, k) for k in range(3)]
    draw = Draw(noise=Noise(sent, (0.0,) * 3))
    one = merge(create("noise_aware", {"shrink": how}), adapters, [0.5, 0.25, 0.25], draw).adapter
    other = merge(create("ffa"), adapters, [0.5, 0.25, 0.25]).adapter
    for name, layer in one.layers.items():
        assert torch.allclose(layer.B, other.layers[name].B, atol=1e-6)


def test_either_factor_may_be_the_shared_one() -> None:
    sent, stds = start(), (0.1, 1.0)
    by_B = [moved(sent, signal(k, 0.2), std, k) for k, std in enumerate(stds)]
    kind = create("noise_aware", {"shrink": "singular"})
    one = merge(kind, by_B, [0.5, 0.5], Draw(noise=Noise(sent, stds))).adapter
    by_A = [transposed(a) for a in by_B]
    other = merge(kind, by_A, [0.5, 0.5], Draw(noise=Noise(transposed(sent), stds))).adapter
    for name, layer in one.layers.items():
        assert torch.allclose(layer.B, other.layers[name].A.T, atol=1e-5)


def transposed(adapter: Adapter) -> Adapter:
    layers = {
        name: LowRank(layer.A.T.contiguous(), layer.B.T.contiguous())
        for name, layer in adapter.layers.items()
    }
    return Adapter(adapter.spec, layers)


def low_rank(m: int, r: int, size: float, g: torch.Generator) -> Tensor:
    u, v = torch.randn(m, 1, generator=g).double(), torch.randn(1, r, generator=g).double()
    return size * (u / u.norm()) @ (v / v.norm())


@pytest.mark.parametrize("how", ["singular", "stein"])
@pytest.mark.parametrize("shape", [(300, 8), (8, 300)])
def test_shrinking_brings_a_noisy_matrix_nearer_to_the_truth(
    how: Shrinkage, shape: tuple[int, int]
) -> None:
    """And no common factor would have brought it nearer than the singular values' own."""
    g = torch.Generator().manual_seed(5)
    gained, oracle = 0.0, 0.0
    for _ in range(10):
        truth = low_rank(300, 8, 40.0, g)
        truth = truth if shape == (300, 8) else truth.T
        X = truth + torch.randn(shape, generator=g).double()
        gained += float((shrunk(X, 1.0, how) - truth).norm() ** 2)
        factor = float((X * truth).sum() / (X * X).sum())
        oracle += float((factor * X - truth).norm() ** 2)
    assert gained < 0.9 * 10 * 300 * 8  # what it is without shrinking
    if how == "singular":
        assert gained < 0.5 * oracle
    else:
        assert gained == pytest.approx(oracle, rel=0.1)


def test_singular_values_lose_what_the_formula_says() -> None:
    """By the signal's own size: x -> y = sqrt((x + 1/x)(x + b/x)), of which x^2's share is kept.

    Gavish and Donoho's shrinker is the inverse of how noise inflates a singular value, times the
    cosines by which it turns the vectors: (x^4 - b) / (x^2 y).
    """
    m, r, x = 400, 16, 1.7
    b = r / m
    y = math.sqrt((x + 1 / x) * (x + b / x))
    X = torch.zeros(m, r, dtype=torch.float64)
    X[0, 0] = y * math.sqrt(m) * 0.3  # at noise of 0.3
    X[1, 1] = 0.99 * (1 + math.sqrt(b)) * math.sqrt(m) * 0.3  # what noise alone reaches
    found = shrunk(X, 0.3, "singular")
    assert float(found[0, 0]) == pytest.approx((x**4 - b) / (x**2 * y) * math.sqrt(m) * 0.3)
    assert float(found[1, 1]) == 0.0


def test_stein_takes_off_the_share_that_noise_is_expected_to_have() -> None:
    """1 - m r tau^2 / ||X||^2, of few entries, and nothing of what is shorter than its noise."""
    X = torch.tensor([[3.0, 0.0], [1.0, -2.0]], dtype=torch.float64)  # of squared norm 14
    assert torch.allclose(shrunk(X, 1.2, "stein"), (1 - 4 * 1.2**2 / 14) * X)
    assert not shrunk(X, 1.9, "stein").any()


@pytest.mark.parametrize("how", ["singular", "stein"])
@pytest.mark.parametrize("weigh", [True, False])
def test_the_mean_is_shrunk_by_the_noise_that_is_left_in_it(how: Shrinkage, weigh: bool) -> None:
    """Of variance sum_k a_k^2 tau_k^2, whether the a_k are given or follow from precision."""
    sent, truth, stds, a = start(), signal(1, 0.3), (0.2, 0.4, 0.8), [0.5, 0.3, 0.2]
    adapters = [moved(sent, truth, std, k) for k, std in enumerate(stds)]
    steps = [
        {n: x.layers[n].B.double() - y.B.double() for n, y in sent.layers.items()} for x in adapters
    ]
    kind = create("noise_aware", {"shrink": how, "weigh": weigh})
    found = kind.combine(adapters, a, Draw(noise=Noise(sent, stds)))
    a = precision_weights(steps, a, stds) if weigh else a
    tau = math.hypot(*(w * std for w, std in zip(a, stds, strict=True)))
    for n, layer in sent.layers.items():
        X = torch.stack([w * step[n] for w, step in zip(a, steps, strict=True)]).sum(0)
        merged = found[n]
        assert isinstance(merged, LowRank)
        assert torch.allclose(merged.B / SPEC.scale - layer.B, shrunk(X, tau, how), atol=1e-12)


def test_without_knowing_the_noise_there_is_no_such_merge() -> None:
    sent = start()
    adapters = [moved(sent, signal(k, 0.2), 0.1, k) for k in range(2)]
    with pytest.raises(MergeError, match="only rounds know"):
        merge(create("noise_aware"), adapters, [0.5, 0.5])
    with pytest.raises(MergeError, match="one noise for each"):
        merge(create("noise_aware"), adapters, [0.5, 0.5], Draw(noise=Noise(sent, (0.1,))))
    draw = Draw(noise=Noise(start(9), (0.1, 0.1)))
    with pytest.raises(MergeError, match="left as it was sent"):
        merge(create("noise_aware"), adapters, [0.5, 0.5], draw)


def test_an_optimizer_whose_noise_is_not_known_is_refused_before_the_run() -> None:
    options = ["strategy=noise_aware", "optimizer=adamw"]
    with pytest.raises(ConfigError, match="optimizer=sgd"):
        require_strategy(load("simulate", options, RunSettings))
    require_strategy(load("simulate", options[:1], RunSettings))
