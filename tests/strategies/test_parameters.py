"""Every strategy has an option file with its defaults, and names in full what is wrong with one."""

from __future__ import annotations

from typing import Any

import pytest

from conf.load import ConfigError, groups, load
from conf.schema import RunSettings
from strategies.registry import OURS, create

NAMES = [kind.name for kind in OURS]


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_has_an_option_file_with_its_defaults(name: str) -> None:
    assert name in groups()["strategy"]
    train = create(name).declared.trains[0]
    chosen = load("simulate", [f"strategy={name}", f"adapter.train={train}"], RunSettings).strategy
    assert create(chosen.name, chosen.parameters) == create(name)
    assert set(chosen.parameters) == set(create(name).model_dump())


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("ties", {"density": 1.5}, "strategy.density=1.5: input should be less than 1"),
        ("ties", {"densty": 0.5}, "strategy.densty=0.5: unknown key; there are: agreeing, den"),
        ("ties", {"scope": "row"}, "strategy.scope=row: input should be 'layer' or 'model'"),
        ("della", {"window": 0.6}, "strategy.density=0.5: from 0.6 to 0.4"),
        ("breadcrumbs", {"outliers": 0.9}, "strategy.density=0.15: with strategy.outliers=0.9 at"),
        ("lines", {"of": "best"}, "strategy.of=best: choose one of "),
        ("lines", {"of": "ties", "parameters": {"density": 2}}, "strategy.parameters.density=2: "),
        (
            "lines",
            {"of": "ties", "parameters": {"density": "abc"}},
            "strategy.parameters.density=abc: must be a number",
        ),
        (
            "lines",
            {"of": "breadcrumbs", "parameters": {"outliers": 0.9}},
            "strategy.parameters.density=0.15: with strategy.parameters.outliers=0.9 at",
        ),
        (
            "lines",
            {"of": "lines", "parameters": {"of": "best"}},
            "strategy.parameters.of=best: choose one of ",
        ),
    ],
)
def test_an_impossible_parameter_is_named(name: str, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as problem:
        create(name, parameters)
    assert str(problem.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "train", "said"),
    [
        ("ffa", "both", "strategy=ffa merges B | core; or take strategy=breadcrumbs | "),
        ("fedsvd", "A", "strategy=fedsvd merges B; or take "),
        ("product_mean", "core", "strategy=product_mean merges B | A | alternate | both; or take "
         "strategy=fedavg | ffa"),
        ("lines", "core", "strategy=lines merges "),
    ],
)  # fmt: skip
def test_a_strategy_follows_only_trainings_whose_frozen_part_it_keeps(
    name: str, train: Any, said: str
) -> None:
    with pytest.raises(ConfigError) as problem:
        create(name, train=train)
    assert str(problem.value).startswith(f"adapter.train={train}: {said}")


@pytest.mark.parametrize(
    "path",
    [
        "model.layers.{}.self_attn.q_proj",
        "transformer.h.{}.attn.c_attn",
        "bert.encoder.layer.{}.attention.self.query",
        "encoder.block.{}.layer.0.SelfAttention.q",
    ],
)
def test_lines_knows_the_depth_of_a_layer_by_its_path(path: str) -> None:
    names = [path.format(number) for number in range(3)]
    assert list(create("lines").factors(names).values()) == [0.5, 0.75, 1.0]  # type: ignore[attr-defined]
