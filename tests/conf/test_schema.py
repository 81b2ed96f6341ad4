"""Settings: ranges are enforced, options must fit each other, and nothing changes afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from conf.commands import AlignCommand, ClientCommand, EvaluateCommand, ServerCommand
from conf.load import ConfigError, load, validate
from conf.policy import SitePolicy
from conf.schema import RunSettings, Settings, TrainingSettings

Raw = dict[str, Any]
KINDS: dict[str, tuple[type[Settings], list[str]]] = {
    "simulate": (RunSettings, []),
    "server": (ServerCommand, []),
    "client": (ClientCommand, []),
    "align": (AlignCommand, ["adapter=a", "out=b"]),
    "evaluate": (EvaluateCommand, ["adapter=a", "notes.path=n"]),
}
POLICY = {
    "site": "east",
    "lineage": "notes",
    "ledger": "/l.sqlite",
    "notes": {"source": "jsonl", "path": "n.jsonl"},
    "model": {"source": "smollm2"},
    "privacy": {"epsilon": 8, "delta": 1e-5},
}


def dump(settings: BaseModel) -> Raw:
    """Plain values, as a configuration file holds them."""
    return settings.model_dump(mode="json")


@pytest.fixture(scope="module")
def valid() -> dict[str, Raw]:
    """A valid raw configuration of every command, and of a site."""
    commands = {name: dump(load(name, given, kind)) for name, (kind, given) in KINDS.items()}
    return {**commands, "site": dump(SitePolicy.model_validate(POLICY))}


def changed(raw: Raw, **values: Any) -> Raw:
    """A copy with dotted keys (``__`` for the dot) set; an Ellipsis takes the key away."""
    raw = copy.deepcopy(raw)
    for path, value in values.items():
        *parents, last = path.split("__")
        node = raw
        for parent in parents:
            node = node[parent]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return raw


def complaint(raw: Raw, kind: type[BaseModel] = RunSettings) -> str:
    """The one line that refuses ``raw``."""
    with pytest.raises(ConfigError) as caught:
        validate(raw, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sections(raw: Raw, path: str = "") -> Iterator[str]:
    """The dotted path of every nested group; the root is the empty one."""
    yield path
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from sections(value, f"{path}.{key}".lstrip("."))


def kind_of(name: str) -> type[Settings]:
    """The class that the raw configuration ``name`` is checked by."""
    return SitePolicy if name == "site" else KINDS[name][0]


@pytest.mark.parametrize("name", [*KINDS, "site"])
def test_what_is_written_down_reads_back_the_same(valid: dict[str, Raw], name: str) -> None:
    settings = validate(valid[name], kind_of(name))
    assert dump(settings) == valid[name]


@pytest.mark.parametrize("name", [*KINDS, "site"])
def test_no_group_takes_an_unknown_key(valid: dict[str, Raw], name: str) -> None:
    """What a strategy takes, the strategy knows: ``tests/strategies/test_properties.py``."""
    for section in (s for s in sections(valid[name]) if s != "strategy"):
        path = f"{section}.surprise".lstrip(".")
        raw = changed(valid[name], **{path.replace(".", "__"): 1})
        assert complaint(raw, kind_of(name)).startswith(f"{path}=1: ")


@pytest.mark.parametrize("name", [*KINDS, "site"])
def test_settings_cannot_be_changed(valid: dict[str, Raw], name: str) -> None:
    settings = validate(valid[name], kind_of(name))
    for owner in (settings, *(v for _, v in settings if isinstance(v, BaseModel))):
        key, value = next(iter(owner))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(owner, key, value)


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("seed", [0, 2**31 - 1], [-1, 2**31, 0.5, "x", None]),
        ("adapter.rank", [1, 256], [0, 257]),
        ("adapter.alpha", [0.1], [0, -1, float("inf")]),
        ("adapter.targets", [["q_proj"]], [[], "q_proj", [3]]),
        ("adapter.train", ["B"], ["C", ""]),
        ("privacy.unit", ["patient", "note"], ["site", "Patient"]),
        ("privacy.epsilon", [0.01, 100], [0, -3, float("inf"), float("nan"), "eight"]),
        ("privacy.delta", [1e-10, 1e-9], [0, 9e-11, 0.01, 1]),
        ("privacy.clip_norm", [1e-4, 16], [0, 5e-324, 9e-5, 16.1, float("inf")]),
        ("privacy.sampling_rate", [1e-3, 1], [0, 1.01]),
        ("privacy.denominator", [1], [0, 1.5]),
        ("privacy.max_notes_per_unit", [1, 64], [0, 65]),
        ("privacy.max_tokens", [8, 8192], [7, 8193]),
        ("optimizer.name", ["sgd", "adamw"], ["adam"]),
        ("optimizer.learning_rate", [1e-6], [0, float("nan")]),
        ("optimizer.final_fraction", [0.1, 1], [0, 1.1]),
        ("compute.engine", ["fast", "opacus"], ["ghost"]),
        ("compute.micro_tokens", [0, 8192], [-1]),
        ("federation.rounds", [1, 1000], [0, 1001]),
        ("federation.local_steps", [1, 10_000], [0, 10_001]),
        ("federation.min_hospitals", [1, 3], [0, 4]),
        ("federation.timeout_s", [0.5], [0, float("inf")]),
        ("strategy.name", ["product_mean", "ffa"], ["Mean", "", "a b"]),
        ("notes.source", ["clinosim"], ["pdf"]),
        ("notes.min_chars", [1], [0]),
        ("notes.max_chars", [100], [99]),
        ("notes.on_bad_record", ["skip", "refuse"], ["ignore"]),
        ("notes.holdout", [0.01, 0.99], [0, 1]),
        ("hospitals.layout", ["separate", "by_field", "pooled"], ["joined"]),
        ("hospitals.count", [1, 100], [0, 101]),
        ("hospitals.population", [20, 100_000], [19, 100_001]),
        ("hospitals.max_units", [None, 2], [1]),
        ("alignment.data", ["synthetic", "mediflow"], ["other"]),
        ("alignment.examples", [8], [7]),
        ("alignment.held_out", [4], [3]),
        ("alignment.max_tokens", [32, 8192], [31, 8193]),
        ("alignment.sft.steps", [0, 5], [-1]),
        ("alignment.sft.batch", [1], [0]),
        ("alignment.dpo.beta", [0.01], [0]),
        ("evaluation.notes", [1], [0]),
        ("evaluation.max_tokens", [8, 8192], [7, 8193]),
        ("evaluation.alone", [True, False], ["perhaps", None]),
    ],
)
def test_a_value_out_of_range_is_named_and_one_within_is_kept(
    valid: dict[str, Raw], key: str, good: list[Any], bad: list[Any]
) -> None:
    base = changed(valid["simulate"], federation__min_hospitals=1)
    place = key.replace(".", "__")
    for value in good:
        node: Any = validate(changed(base, **{place: value}), RunSettings)
        for part in key.split("."):
            node = getattr(node, part)
        assert node == (tuple(value) if isinstance(value, list) else value)
    for value in bad:
        message = complaint(changed(base, **{place: value}))
        assert message.startswith(key)  # of a list, the place in it
        assert ": " in message


@pytest.mark.parametrize(
    ("name", "key"),
    [("simulate", "seed"), ("server", "federation.rounds"), ("align", "alignment.sft.steps")],
)
def test_a_missing_value_is_named(valid: dict[str, Raw], name: str, key: str) -> None:
    raw = changed(valid[name], **{key.replace(".", "__"): ...})
    assert complaint(raw, kind_of(name)) == f"{key}: field required"


@pytest.mark.parametrize("strategy", ["fedavg", "product_mean"])
def test_other_merges_take_both_factors(valid: dict[str, Raw], strategy: str) -> None:
    raw = changed(valid["simulate"], strategy__name=strategy, adapter__train="both")
    assert validate(raw, RunSettings).adapter.train == "both"


def _training(raw: Raw) -> Raw:
    return {key: raw[key] for key in TrainingSettings.model_fields}


def test_no_more_hospitals_are_waited_for_than_there_are(valid: dict[str, Raw]) -> None:
    raw = changed(valid["simulate"], hospitals__count=2, federation__min_hospitals=2)
    assert validate(raw, RunSettings).federation.min_hospitals == 2
    raw = changed(raw, federation__min_hospitals=3)
    assert complaint(raw) == (
        "federation.min_hospitals=3: must be at most the number of hospitals, 2"
    )


def test_the_pooled_notes_are_at_one_hospital(valid: dict[str, Raw]) -> None:
    raw = changed(valid["simulate"], hospitals__layout="pooled", hospitals__count=5)
    assert validate(raw, RunSettings).hospitals.count == 5
    message = complaint(changed(raw, federation__min_hospitals=2))
    assert message.endswith("at most the number of hospitals, 1")


def test_a_coordinator_may_wait_for_any_number(valid: dict[str, Raw]) -> None:
    raw = changed(valid["server"], federation__min_hospitals=500)
    assert validate(raw, ServerCommand).federation.min_hospitals == 500


@pytest.mark.parametrize("source", ["fhir", "jsonl", "csv", "parquet", "text"])
def test_notes_from_files_need_a_path(valid: dict[str, Raw], source: str) -> None:
    raw = changed(valid["simulate"], notes__source=source)
    assert complaint(raw) == "notes.path must name the file or folder of notes"
    settings = validate(changed(raw, notes__path="there"), RunSettings)
    assert settings.notes.path == Path("there")


@pytest.mark.parametrize("path", [None, ""])
def test_another_model_needs_a_path(valid: dict[str, Raw], path: str | None) -> None:
    raw = changed(valid["simulate"], model={"source": "path", "path": path})
    assert complaint(raw) == "model.path must name a model folder or Hugging Face id"


@pytest.mark.parametrize("address", ["10.0.0.1:8443", "fl.example:1", "[::1]:443"])
def test_a_coordinators_address_is_host_and_port(valid: dict[str, Raw], address: str) -> None:
    raw = changed(valid["client"], client__server=address)
    assert validate(raw, ClientCommand).client.server == address


@pytest.mark.parametrize(
    "address", ["fl.example", "fl.example:", ":8443", "https://a:1", "::1:443", "a b:1", "a:1\n"]
)
def test_anything_else_is_no_address(valid: dict[str, Raw], address: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        validate(changed(valid["client"], client__server=address), ClientCommand)


def test_a_certificate_is_needed_with_tls_only(valid: dict[str, Raw]) -> None:
    raw = changed(valid["client"], client__certificate=None)
    assert complaint(raw, ClientCommand) == "client.certificate must name the coordinator's ca.pem"
    raw = changed(raw, client__transport="insecure")
    assert validate(raw, ClientCommand).client.certificate is None


def test_a_policy_protects_unless_told_otherwise() -> None:
    policy = SitePolicy.model_validate(POLICY)
    assert policy.privacy.required is True
    assert policy.privacy.unit == "patient"
    assert {policy.share.counts, policy.share.losses, policy.share.scores} == {"never"}
