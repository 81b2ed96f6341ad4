"""Strategies of other packages come in by an entry point, and only if they are what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from conf.load import ConfigError, load
from conf.schema import RunSettings
from server.offline.methods import method
from strategies import registry
from strategies.base import Declaration, Draw, Strategy, Update, product_means
from strategies.merging import merge
from strategies.registry import create, require_strategy, strategies


class Half(Strategy):
    """As in docs/merging.md."""

    name: ClassVar[str] = "half"
    declared: ClassVar = Declaration(space="gram", paper="none")
    share: float = 0.5

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        return product_means(adapters, [self.share * w for w in weights])


class Impostor(Half):
    name: ClassVar[str] = "ties"


class Nameless(Strategy):
    declared: ClassVar = Half.declared
    combine = Half.combine


class Undeclared(Strategy):
    name: ClassVar[str] = "undeclared"
    combine = Half.combine


class Abstract(Strategy):
    name: ClassVar[str] = "abstract"
    declared: ClassVar = Half.declared


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a package whose entry point names an object of this module."""

    def install(what: str) -> None:
        point = EntryPoint("other", f"{__name__}:{what}", registry.GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])
        registry.installed.cache_clear()

    yield install  # type: ignore[misc]
    monkeypatch.undo()
    registry.installed.cache_clear()


def test_a_strategy_of_another_package_is_used_like_ours(installed: Callable[[str], None]) -> None:
    installed("Half")
    one = Adapter(AdapterSpec(2, 2.0, ("q",)), {"q": LowRank(torch.ones(3, 2), torch.ones(2, 4))})
    found = merge(create("half", {"share": 0.25}), [one, one], [0.5, 0.5])
    assert torch.allclose(found.adapter.deltas()["q"].dense(), torch.full((3, 4), 0.5))
    assert found.norm_ratio == pytest.approx(0.25)
    options = ["strategy.name=half", "strategy.share=0.3"]
    chosen = load("simulate", options, RunSettings).strategy
    assert create(chosen.name, chosen.parameters) == Half(share=0.3)


@pytest.mark.parametrize(
    ("what", "name", "said"),
    [
        ("Impostor", "ties", "there are two of this name, ours and {}; uninstall"),
        ("pytest", "other", "{} is no subclass of strategies.base.Strategy; mend or uninstall"),
        ("Missing", "other", "{} cannot be loaded (AttributeError: module"),
        ("Nameless", "other", "{} has no name: ClassVar[str]; mend or uninstall its package"),
        ("Undeclared", "undeclared", "{} has no declared: ClassVar[Declaration]; mend"),
        ("Abstract", "abstract", "{} does not define combine; mend or uninstall its package"),
    ],
)
def test_what_is_no_strategy_is_refused_when_it_is_asked_for_and_harms_no_other(
    installed: Callable[[str], None], what: str, name: str, said: str
) -> None:
    installed(what)
    for asked, parameters, key in ((name, {}, "name"), ("lines", {"of": name}, "of")):
        with pytest.raises(ConfigError) as caught:
            create(asked, parameters)
        expected = said.format(f"{__name__}:{what}")
        assert str(caught.value).startswith(f"strategy.{key}={name}: {expected}")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"merge_method={name}: "):
        method(name)
    for usable in strategies():
        create(usable, {"of": "fedavg"} if usable == "lines" else {})
    assert len(strategies()) == len(registry.OURS) - (name == "ties")
    assert method("dare_ties").strategy == "dare"


def test_what_cannot_be_used_is_named_beside_what_there_is(
    installed: Callable[[str], None],
) -> None:
    installed("Missing")
    with pytest.raises(
        ConfigError, match=r"strategy\.name=half: choose one of .*, tsv_m; "
    ) as found:
        create("half")
    assert str(found.value).endswith("; not usable: other")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("strategy=krum", "hospitals.count=3: krum with liars=1 needs at least 5"),
        ("strategy=slerp", "hospitals.count=3: slerp merges two"),
        ("strategy=median hospitals=pooled", "hospitals=pooled: median needs at least 3"),
    ],
)
def test_a_simulation_of_more_or_fewer_hospitals_than_a_rule_merges_is_refused_at_once(
    options: str, said: str
) -> None:
    """On a server the others may still come; here nobody does."""
    with pytest.raises(ConfigError, match=said):
        require_strategy(load("simulate", options.split(), RunSettings))
    require_strategy(load("simulate", ["strategy=krum", "hospitals.count=5"], RunSettings))


@pytest.mark.parametrize(
    ("name", "fewest"),
    [("krum", 5), ("median", 3), ("trimmed_mean", 3), ("slerp", 1), ("fedsvd", 1)],
)
def test_how_many_a_strategy_needs(name: str, fewest: int) -> None:
    assert create(name).fewest() == fewest
    assert create("lines", {"of": name}).fewest() == fewest
