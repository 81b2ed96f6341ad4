"""Merges that weigh by statistics: against least squares, a plain loop, and what noise leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from adapters.statistics import MeasuredAdapter
from conf.load import ConfigError, load
from conf.schema import RunSettings
from strategies.base import Draw, MergeError
from strategies.merging import merge
from strategies.registry import create, require_strategy

SPEC = AdapterSpec(3, 6.0, ("q", "v"))
SHAPES = {"layers.0.q": (9, 7), "layers.1.v": (6, 8)}
WEIGHTS = [0.5, 0.2, 0.3]


def data(seed: int = 1) -> tuple[dict[str, Tensor], dict[str, list[tuple[Tensor, Tensor]]]]:
    """A shared A by layer, and each of three hospitals' inputs x (N, n) and targets (N, m)."""
    g = torch.Generator().manual_seed(seed)
    A, seen = {}, {}
    for name, (m, n) in SHAPES.items():
        A[name] = torch.randn(3, n, generator=g, dtype=torch.float64)
        seen[name] = [
            (
                torch.randn(N, n, generator=g, dtype=torch.float64) * (k + 1),
                torch.randn(N, m, generator=g, dtype=torch.float64),
            )
            for k, N in enumerate((30, 60, 11))
        ]
    return A, seen


def solved(A: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The B (m, r) that is best on this data alone: y = scale B A x."""
    return torch.linalg.lstsq(x @ A.T, y / SPEC.scale).solution.T


def hospitals() -> list[MeasuredAdapter]:
    """Each with its own least squares, and the Gram matrix of its data; float64."""
    A, seen = data()
    made = []
    for k in range(3):
        layers = {n: LowRank(solved(A[n], *seen[n][k]), A[n]) for n in SHAPES}
        z = {n: seen[n][k][0] @ A[n].T for n in SHAPES}
        made.append(MeasuredAdapter(SPEC, layers, {n: own.T @ own for n, own in z.items()}))
    return made


def combined(name: str, adapters: list[Adapter], weights: list[float], **options: float) -> dict:
    return {
        n: d.dense() for n, d in create(name, options).combine(adapters, weights, Draw()).items()
    }


# --- RegMean -----------------------------------------------------------------------------------


def test_regmean_without_ridge_is_the_least_squares_of_all_data_together() -> None:
    """With weight w_k every row of hospital k counts w_k; equal weights are plain pooling."""
    A, seen = data()
    for weights in ([1 / 3] * 3, WEIGHTS):
        found = combined("regmean", hospitals(), weights, ridge=0)
        for name in SHAPES:
            x = torch.cat([w**0.5 * own for w, (own, _) in zip(weights, seen[name], strict=True)])
            y = torch.cat([w**0.5 * own for w, (_, own) in zip(weights, seen[name], strict=True)])
            pooled = SPEC.scale * solved(A[name], x, y) @ A[name]
            assert float((found[name] - pooled).norm() / pooled.norm()) < 1e-12


def test_regmean_fits_the_pooled_data_better_than_the_mean() -> None:
    _, seen = data()

    def loss(merged: dict) -> float:
        return sum(float((x @ merged[n].T - y).square().sum()) for n in SHAPES for x, y in seen[n])

    own = hospitals()
    losses = [loss(combined("regmean", own, WEIGHTS, ridge=ridge)) for ridge in (0, 1, 1000)]
    losses.append(loss(combined("ffa", own, WEIGHTS)))
    assert losses[0] < losses[1] < losses[2] < losses[3]


def test_a_large_ridge_leaves_the_mean() -> None:
    far = combined("regmean", hospitals(), WEIGHTS, ridge=1000)
    mean = combined("ffa", hospitals(), WEIGHTS)
    assert all(float((far[n] - mean[n]).norm() / mean[n].norm()) < 1e-2 for n in SHAPES)


def test_where_nobody_has_seen_anything_the_mean_is_kept() -> None:
    """One direction of z that no data reach, and then none at all, without any ridge."""
    A, _ = data()
    only = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    adapters = [replace(a, statistics=dict.fromkeys(SHAPES, only)) for a in hospitals()]
    mean = combined("ffa", adapters, WEIGHTS)
    found = combined("regmean", adapters, WEIGHTS, ridge=0)
    for name in SHAPES:
        back = torch.linalg.pinv(A[name])
        assert torch.allclose((found[name] @ back)[:, 2], (mean[name] @ back)[:, 2])
    none = [replace(a, statistics=dict.fromkeys(SHAPES, 0 * only)) for a in adapters]
    for ridge in (0, 1):
        found = combined("regmean", none, WEIGHTS, ridge=ridge)
        assert all(torch.allclose(found[n], mean[n], rtol=1e-12) for n in SHAPES)


def test_gram_matrices_that_are_all_noise_move_regmean_no_further_than_the_hospitals_differ() -> (
    None
):
    g = torch.Generator().manual_seed(2)
    own = hospitals()
    mean = combined("ffa", own, WEIGHTS)
    spread = max(
        float((a.deltas()[n].dense() - mean[n]).norm()) for a in own for n in SHAPES
    )  # fmt: skip
    for _ in range(50):
        noisy = []
        for adapter in own:
            noise = {n: torch.randn(3, 3, generator=g, dtype=torch.float64) for n in SHAPES}
            noisy.append(replace(adapter, statistics={n: x + x.T for n, x in noise.items()}))
        found = combined("regmean", noisy, WEIGHTS)
        assert all(float((found[n] - mean[n]).norm()) < 2 * spread for n in SHAPES)


@pytest.mark.parametrize("ridge", [0.0, 1e-12])
def test_equal_hospitals_lose_no_digit_to_statistics_that_are_nearly_singular(ridge: float) -> None:
    first = hospitals()[0]
    g = torch.Generator().manual_seed(4)
    adapters = []
    for _ in range(4):
        Q = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64)).Q
        G = Q * torch.tensor([1.0, 1e-6, 1e-13], dtype=torch.float64) @ Q.T
        adapters.append(replace(first, statistics=dict.fromkeys(SHAPES, G)))
    found = combined("regmean", adapters, [0.4, 0.3, 0.2, 0.1], ridge=ridge)
    for name, layer in first.layers.items():
        expected = SPEC.scale * layer.to(torch.float64).dense()
        assert torch.allclose(found[name], expected, rtol=1e-12, atol=1e-13)


# --- Fisher ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["B", "A"])
def test_fisher_equals_a_loop_over_entries(trained: str) -> None:
    g = torch.Generator().manual_seed(3)
    shared = {n: (torch.randn(m, 3, generator=g), torch.randn(3, k, generator=g))
              for n, (m, k) in SHAPES.items()}  # fmt: skip
    adapters = []
    for _ in range(3):
        layers = {
            n: LowRank(torch.randn(m, 3, generator=g), shared[n][1])
            if trained == "B"
            else LowRank(shared[n][0], torch.randn(3, k, generator=g))
            for n, (m, k) in SHAPES.items()
        }
        F = {
            f"{n}.lora_{trained}.weight": torch.randn(getattr(x, trained).shape, generator=g)
            for n, x in layers.items()
        }
        adapters.append(MeasuredAdapter(SPEC, layers, F))
    found = create("fisher", {"floor": 0.25}).combine(adapters, WEIGHTS, Draw())
    for name in SHAPES:
        key = f"{name}.lora_{trained}.weight"
        entries = [f for a in adapters for f in a.statistics[key].flatten().tolist()]
        least = 0.25 * sum(map(abs, entries)) / len(entries)
        theta = [getattr(a.layers[name], trained) for a in adapters]
        expected = torch.zeros(theta[0].shape, dtype=torch.float64)
        for i in range(expected.shape[0]):
            for j in range(expected.shape[1]):
                over = under = 0.0
                for a, t, w in zip(adapters, theta, WEIGHTS, strict=True):
                    F_ij = max(float(a.statistics[key][i, j]), least)
                    over, under = over + w * F_ij * float(t[i, j]), under + w * F_ij
                expected[i, j] = over / under
        B, A = (x.double() for x in shared[name])
        product = expected @ A if trained == "B" else B @ expected
        assert torch.allclose(found[name].dense(), SPEC.scale * product, rtol=1e-9)


def test_a_high_floor_and_nothing_measured_give_the_mean() -> None:
    own = [replace(a, statistics={}) for a in hospitals()]
    mean = combined("ffa", own, WEIGHTS)
    for value, floor in ((1.0, 1.0), (0.0, 1e-3)):
        same = [
            replace(
                a,
                statistics={f"{n}.lora_B.weight": torch.full((m, 3), value)
                            for n, (m, _) in SHAPES.items()},
            )
            for a in own
        ]  # fmt: skip
        found = combined("fisher", same, WEIGHTS, floor=floor)
        assert all(torch.allclose(found[n], mean[n], rtol=1e-12) for n in SHAPES)


# --- without what they need --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_an_adapter_without_statistics_cannot_be_merged(name: str) -> None:
    plain = [Adapter(a.spec, a.layers) for a in hospitals()]
    with pytest.raises(MergeError, match=r"without statistics of layers\.0\.q"):
        merge(create(name), plain, WEIGHTS)
    other = [MeasuredAdapter(a.spec, a.layers, {"layers.1.v": torch.eye(3)}) for a in plain]
    with pytest.raises(MergeError, match=r"without statistics of layers\.0\.q"):
        merge(create(name), other, WEIGHTS)


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_adapters_that_share_no_factor_cannot_be_merged(name: str) -> None:
    fisher = {f"{n}.lora_B.weight": torch.ones(m, 3) for n, (m, _) in SHAPES.items()}
    one, two, three = (replace(a, statistics={**a.statistics, **fisher}) for a in hospitals())
    turned = replace(two, layers={n: LowRank(x.B, -x.A) for n, x in two.layers.items()})
    with pytest.raises(MergeError, match=f"{name} needs the same A in all"):
        merge(create(name), [one, turned, three], WEIGHTS)


def test_a_wrapper_asks_for_what_it_wraps_and_hands_it_on() -> None:
    wrapped = create("lines", {"of": "regmean", "first": 1.0, "last": 1.0})
    assert wrapped.statistics == "gram"
    assert create("lines").statistics is None
    own = hospitals()
    found = wrapped.combine(own, WEIGHTS, Draw())
    plain = combined("regmean", own, WEIGHTS)
    assert all(torch.allclose(found[n].dense(), plain[n], rtol=1e-12) for n in SHAPES)


@pytest.mark.parametrize(
    "options", [["strategy=regmean"], ["strategy=lines", "strategy.of=fisher"]]
)
def test_a_run_without_a_budget_cannot_have_statistics(options: list[str]) -> None:
    settings = load("simulate", [*options, "privacy=none", "adapter.train=B"], RunSettings)
    with pytest.raises(ConfigError, match="release only noised and charged") as problem:
        require_strategy(settings)
    assert str(problem.value).startswith(f"{options[0]}: needs ")
    assert "\n" not in str(problem.value)
    require_strategy(load("simulate", [*options, "adapter.train=B"], RunSettings))
