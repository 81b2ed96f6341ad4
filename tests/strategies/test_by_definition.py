"""Strategies against their definitions, written once more in a few lines on dense matrices.

Parameters are not the defaults, so that one which is ignored shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import Dense, LowRank
from strategies.base import Draw, MergeError
from strategies.registry import create

SHAPES = {"q": (12, 10), "v": (8, 14)}
WEIGHTS = [0.4, 0.25, 0.2, 0.15]
EQUAL = [0.25] * 4


def hospitals(count: int = 4, whole: bool = False) -> list[Adapter]:
    """Of rank 2, around a common update; layer v has entries four times as large as q."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    common = {n: (draw(m, 2), draw(2, w)) for n, (m, w) in SHAPES.items()}
    made = []
    for _ in range(count):
        layers: dict[str, LowRank] = {}
        for n, (B, A) in common.items():
            own = B + 0.7 * draw(*B.shape), A + 0.7 * draw(*A.shape)
            layers[n] = LowRank(own[0] * (4 if n == "v" else 1), own[1])
            if whole:
                layers[n] = Dense(layers[n].dense() + 0.1 * draw(*SHAPES[n]))
        made.append(Adapter(AdapterSpec(2, 2.0, tuple(SHAPES)), layers))
    return made


def dense(adapters: Sequence[Adapter], layer: str) -> list[Tensor]:
    return [a.layers[layer].dense() for a in adapters]


def ours(
    name: str, adapters: Sequence[Adapter], weights: Sequence[float], **parameters: Any
) -> dict[str, Tensor]:
    found = create(name, parameters).combine(adapters, weights, Draw())
    return {n: u.dense() if isinstance(u, LowRank) else u for n, u in found.items()}


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def mean(own: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(w * d for w, d in zip(weights, own, strict=True))  # type: ignore[return-value]


def trim(update: Tensor, density: float) -> Tensor:
    order = update.abs().flatten().sort(descending=True).values
    return update * (update.abs() >= order[round(density * update.numel()) - 1])


def ties(kept: Sequence[Tensor], weights: Sequence[float], votes: Sequence[float]) -> Tensor:
    sign = mean(kept, votes).sign()
    agrees = [(d.sign() == sign) & (d != 0) for d in kept]
    total = mean([d * a for d, a in zip(kept, agrees, strict=True)], weights)
    return total / mean([a.double() for a in agrees], weights).clamp(min=1e-12)


def span(columns: Tensor, directions: int) -> Tensor:
    """Orthonormal basis (m, directions) of the columns, as eigenvectors."""
    return torch.linalg.eigh(columns @ columns.T).eigenvectors[:, -directions:]


# --- by entries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("election", ["weighted", "unweighted"])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_ties(scope: str, election: str) -> None:
    own = hospitals()
    votes = WEIGHTS if election == "weighted" else EQUAL
    if scope == "layer":
        kept = {n: [trim(d, 0.3) for d in dense(own, n)] for n in SHAPES}
    else:
        parts = zip(*(dense(own, n) for n in SHAPES), strict=True)
        flat = [trim(torch.cat([d.flatten() for d in each]), 0.3) for each in parts]
        cut = [each.split([m * w for m, w in SHAPES.values()]) for each in flat]
        kept = {n: [each[i].reshape(SHAPES[n]) for each in cut] for i, n in enumerate(SHAPES)}
    found = ours("ties", own, WEIGHTS, density=0.3, scope=scope, election=election, strength=1.5)
    for n in SHAPES:
        assert gap(found[n], 1.5 * ties(kept[n], WEIGHTS, votes)) < 1e-12


@pytest.mark.parametrize(("count", "liars"), [(3, 1), (5, 1), (5, 2), (7, 2), (7, 3)])
def test_trimmed_mean(count: int, liars: int) -> None:
    own = hospitals(count)
    found = ours("trimmed_mean", own, [1 / count] * count, liars=liars)
    for n in SHAPES:
        rest = torch.stack(dense(own, n)).sort(0).values[liars : count - liars]
        assert gap(found[n], rest.mean(0)) < 1e-12
    with pytest.raises(MergeError, match=f"liars={liars} needs at least {2 * liars + 1} to m"):
        ours("trimmed_mean", own[: 2 * liars], [0.5 / liars] * (2 * liars), liars=liars)


@pytest.mark.parametrize("count", [4, 6])
def test_median_of_an_even_number_is_the_mean_of_the_middle_two(count: int) -> None:
    own = hospitals(count)
    found = ours("median", own, [1 / count] * count)
    for n in SHAPES:
        ordered = torch.stack(dense(own, n)).sort(0).values
        assert gap(found[n], (ordered[count // 2 - 1] + ordered[count // 2]) / 2) < 1e-12


# --- by inner products --------------------------------------------------------------------------


@pytest.mark.parametrize("liars", [1, 2])
@pytest.mark.parametrize("chosen", [1, 3, None])
def test_krum(liars: int, chosen: int | None) -> None:
    """Several draws, for several rules may choose alike in one."""
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        own = []
        for k in range(7):
            B, A = (
                torch.randn(12, 2, generator=g).double(),
                torch.randn(2, 10, generator=g).double(),
            )
            own.append(Adapter(AdapterSpec(2, 2.0, ("q",)), {"q": LowRank(B * 1.1**k, A)}))
        flat = torch.stack([d.flatten() for d in dense(own, "q")])
        nearest = torch.cdist(flat, flat).square().sort(1).values[:, 1 : 7 - liars - 2 + 1]
        best = nearest.sum(1).argsort()[: chosen or 7 - liars]
        found = ours("krum", own, [1 / 7] * 7, liars=liars, chosen=chosen)
        assert gap(found["q"], flat[best].mean(0).reshape(12, 10)) < 1e-12


@pytest.mark.parametrize("multiple", [1.0, 1.2, 3.0])
def test_norm_bound(multiple: float) -> None:
    own = hospitals(5)
    weights = [0.3, 0.25, 0.2, 0.15, 0.1]
    found = ours("norm_bound", own, weights, multiple=multiple)
    for n in SHAPES:
        bound = multiple * torch.stack([d.norm() for d in dense(own, n)]).median()
        cut = [d * min(1.0, float(bound / d.norm())) for d in dense(own, n)]
        assert gap(found[n], mean(cut, weights)) < 1e-12


@pytest.mark.parametrize("name", ["slerp", "karcher", "norm_weighted", "model_stock", "norm_bound"])
def test_with_scope_model_all_layers_are_one_vector(name: str) -> None:
    """As one layer is that has them on its diagonal. By layer it is something else."""
    count = 2 if name == "slerp" else 4
    own, weights = hospitals(count), [w / sum(WEIGHTS[:count]) for w in WEIGHTS[:count]]
    together = [
        Adapter(
            AdapterSpec(4, 4.0, ("all",)),
            {
                "all": LowRank(
                    torch.block_diag(*(a.layers[n].B for n in SHAPES)),
                    torch.block_diag(*(a.layers[n].A for n in SHAPES)),
                )
            },
        )
        for a in own
    ]
    model, layer = (ours(name, own, weights, scope=scope) for scope in ("model", "layer"))
    expected = ours(name, together, weights)["all"]
    assert gap(torch.block_diag(*model.values()), expected) < 1e-9
    assert gap(torch.block_diag(*layer.values()), expected) > 1e-3


@pytest.mark.parametrize("cosine", [-0.95, 0.3, 0.91, 0.95, 0.999])
def test_slerp_stays_on_the_arc_at_its_share_of_the_angle(cosine: float) -> None:
    angle = math.acos(cosine)

    def at(share: float) -> Tensor:
        turned = share * angle
        return torch.tensor([[math.cos(turned)], [math.sin(turned)]], dtype=torch.float64)

    row, spec = torch.ones(1, 1, dtype=torch.float64), AdapterSpec(1, 1.0, ("q",))
    pair = [Adapter(spec, {"q": LowRank(at(share), row)}) for share in (0.0, 1.0)]
    assert gap(ours("slerp", pair, [0.7, 0.3])["q"], at(0.3)) < 1e-12


def with_a_silent_one() -> list[Adapter]:
    *others, last = hospitals()
    return [*others, replace(last, layers={n: x * 0.0 for n, x in last.layers.items()})]


def test_to_model_stock_who_learned_nothing_agrees_with_nobody() -> None:
    """The mean cosine is that of all pairs, its own being zero."""
    own = with_a_silent_one()
    found = ours("model_stock", own, WEIGHTS)
    for n in SHAPES:
        pairs = combinations([d.flatten() for d in dense(own, n)], 2)
        c = float(torch.stack([torch.cosine_similarity(*pair, dim=0) for pair in pairs]).mean())
        assert gap(found[n], 4 * c / (1 + 3 * c) * mean(dense(own, n), WEIGHTS)) < 1e-9


@pytest.mark.parametrize("name", ["karcher", "norm_weighted"])
def test_who_learned_nothing_counts_in_the_mean_norm_but_has_no_direction(name: str) -> None:
    own, learned = with_a_silent_one(), sum(WEIGHTS[:3])
    found = ours(name, own, WEIGHTS)
    others = ours(name, own[:3], [w / learned for w in WEIGHTS[:3]])
    for n in SHAPES:
        assert gap(found[n], learned * others[n]) < 1e-9


# --- spectral -----------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("whole", [False, True])
def test_knots_is_ties_beside_one_left_basis_within_the_rows_that_hospitals_span(
    density: float, whole: bool
) -> None:
    own = hospitals(whole=whole)
    found = ours("knots", own, WEIGHTS, density=density, strength=2.0)
    for n, (m, w) in SHAPES.items():
        beside = torch.cat(dense(own, n), 1)
        rank = min(m, 8, w) if not whole else m
        U = span(beside, rank)
        kept = [trim(part, density) for part in (U.T @ beside).split(w, 1)]
        rows = span(torch.cat(dense(own, n)).T, w if whole else min(w, 8))
        expected = 2.0 * U @ ties(kept, WEIGHTS, WEIGHTS) @ rows @ rows.T
        assert gap(found[n], expected) < 1e-9


@pytest.mark.parametrize("election", ["weighted", "unweighted"])
def test_core_ties_is_ties_between_both_bases(election: str) -> None:
    own = hospitals()
    votes = WEIGHTS if election == "weighted" else EQUAL
    found = ours("core_ties", own, WEIGHTS, density=0.4, election=election, strength=2.0)
    for n in SHAPES:
        U, V = span(torch.cat(dense(own, n), 1), 8), span(torch.cat(dense(own, n)).T, 8)
        kept = [trim(U.T @ d @ V, 0.4) for d in dense(own, n)]
        assert gap(found[n], 2.0 * U @ ties(kept, WEIGHTS, votes) @ V.T) < 1e-9


@pytest.mark.parametrize("whole", [False, True])
def test_tsv_m_with_strength_k_is_the_sum_of_the_paper(whole: bool) -> None:
    """R / K components of each, rounded up: 8 / 4, all there are; of whole matrices also 10 / 4."""
    own = hospitals(whole=whole)
    found = ours("tsv_m", own, EQUAL, strength=4.0)
    for n in SHAPES:
        parts = [torch.linalg.svd(d, full_matrices=False) for d in dense(own, n)]
        k = math.ceil(min(SHAPES[n]) / 4) if whole else 2
        U, V = torch.cat([p[0][:, :k] for p in parts], 1), torch.cat([p[2][:k] for p in parts])
        S = torch.cat([p[1][:k] for p in parts])
        left, right = torch.linalg.svd(U, full_matrices=False), torch.linalg.svd(V, False)
        expected = left[0] @ left[2] @ S.diag() @ right[0] @ right[2]
        assert gap(found[n], expected) < 1e-9


def test_iso_c_with_strength_k_is_the_sum_of_the_paper() -> None:
    own = hospitals()
    found = ours("iso_c", own, EQUAL, strength=4.0)
    for n in SHAPES:
        U, S, Vh = torch.linalg.svd(sum(dense(own, n)))
        assert gap(found[n], S[:8].mean() * U[:, :8] @ Vh[:8]) < 1e-9


def test_karcher_leaves_out_who_points_away_from_the_mean() -> None:
    """There is no shortest way to the opposite point: its pull would be rounding, blown up."""
    (own,) = hospitals(1)
    away = replace(own, layers={n: x * -3.0 for n, x in own.layers.items()})
    merged = create("karcher").combine([own, away], [0.6, 0.4], Draw())
    for name, layer in own.deltas().items():
        size = 0.6 + 0.4 * 3  # the mean of the norms, in norms of the first
        found = merged[name]
        assert isinstance(found, LowRank)
        assert gap(found.dense(), size * layer.to(torch.float64).dense()) < 1e-6


@pytest.mark.parametrize("name", ["dare", "della"])
def test_equal_hospitals_are_what_dropping_expects(name: str) -> None:
    """Over many masks the update itself: who kept an entry does not outvote the others."""
    (own,) = hospitals(1)
    copies = [  # not quite equal: of one update all masks would be the same
        replace(own, layers={n: x * (1 + 1e-9 * k) for n, x in own.layers.items()})
        for k in range(4)
    ]
    draws = 400
    total = torch.zeros(SHAPES["q"], dtype=torch.float64)
    for number in range(draws):
        update = create(name).combine(copies, EQUAL, Draw("run", number))["q"]
        assert isinstance(update, Tensor)
        total += update / draws
    assert gap(total, own.layers["q"].dense()) < 0.1
