"""A density for each adapter: as if each were merged alone at its own; not where order is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from conf.load import ConfigError, load
from conf.schema import RunSettings
from strategies.base import Draw, MergeError
from strategies.registry import create, require_strategy

WEIGHTS = [0.5, 0.3, 0.2]
DENSITIES = [0.3, 0.5, 0.8]
NAMES = ["ties", "dare", "della", "breadcrumbs"]


def adapters(count: int = 3) -> list[Adapter]:
    g = torch.Generator().manual_seed(0)
    return [
        Adapter(
            AdapterSpec(2, 2.0, ("q",)),
            {"q": LowRank(torch.randn(12, 2, generator=g), torch.randn(2, 10, generator=g))},
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", ["dare", "della", "breadcrumbs"])
def test_each_is_thinned_at_its_own_density(name: str) -> None:
    """Without an election the merge is linear, so it is the sum of what each gives alone."""
    common: dict[str, Any] = {"elect": False}
    merged = create(name, {**common, "density": DENSITIES}).combine(adapters(), WEIGHTS, Draw("r"))
    alone = [
        w * create(name, {**common, "density": d}).combine([a], [1.0], Draw("r"))["q"]
        for a, w, d in zip(adapters(), WEIGHTS, DENSITIES, strict=True)
    ]
    assert torch.allclose(torch.as_tensor(merged["q"]), sum(alone))


@pytest.mark.parametrize("name", NAMES)
def test_equal_densities_are_one_density(name: str) -> None:
    one = create(name, {"density": 0.5}).combine(adapters(), WEIGHTS, Draw("r"))["q"]
    each = create(name, {"density": [0.5] * 3}).combine(adapters(), WEIGHTS, Draw("r"))["q"]
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(each))


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(MergeError, match="density: 2 numbers for 3 adapters; give one for each"):
        create(name, {"density": [0.5, 0.4]}).combine(adapters(), WEIGHTS, Draw("r"))
    with pytest.raises(ConfigError, match=r"^strategy\.density=1\.5: input should be less than 1$"):
        create(name, {"density": [0.5, 1.5]})
    with pytest.raises(ConfigError, match=r"^strategy\.density=x: must be a number, or one for ea"):
        create(name, {"density": "x"})


@pytest.mark.parametrize(
    "options", ["strategy=ties strategy.density={}", "strategy=lines strategy.of=ties "
                "strategy.parameters.density={}"],
)  # fmt: skip
def test_in_rounds_there_is_one_density(options: str) -> None:
    def check(density: str) -> None:
        require_strategy(load("simulate", options.format(density).split(), RunSettings))

    check("0.3")
    with pytest.raises(ConfigError, match="a density for each adapter needs an order, which hosp"):
        check("[0.3,0.4]")


def test_parameters_that_bound_each_other_bound_every_density() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.density=0\.95: from 0\.1 to 0\.9"):
        create("della", {"density": [0.5, 0.95]})
    with pytest.raises(ConfigError, match=r"strategy\.density=0\.6: with strategy\.outliers=0\.5"):
        create("breadcrumbs", {"density": [0.4, 0.6], "outliers": 0.5})
