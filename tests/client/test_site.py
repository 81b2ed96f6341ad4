"""The site policy: read from this machine alone, and every mistake in it is one clear line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, RecordDict

from client.site import SITE, SITES, SiteError, policy_of, read_policy
from conf.policy import SitePolicy

GOOD: dict[str, Any] = {
    "site": "st-marys",
    "lineage": "discharge-notes",
    "ledger": "/var/lib/wardround/ledger.sqlite",
    "notes": {"source": "jsonl", "path": "/srv/notes.jsonl", "patient_field": "pid"},
    "model": {"source": "smollm2"},
    "privacy": {"epsilon": 8.0, "delta": 1e-5},
}
EXAMPLE = Path(__file__).parents[2] / "conf" / "site.example.yaml"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a policy file; ``raw`` bytes as they are, else the good policy with changes."""

    def make(name: str = "site.yaml", raw: bytes | None = None, **changes: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw if raw is not None else yaml.safe_dump(GOOD | changes).encode())
        return path

    return make


def context(**node_config: Any) -> Context:
    return Context(1, 7, node_config, RecordDict(), {})


def complaint(path: Path) -> str:
    with pytest.raises(SiteError) as error:
        read_policy(path)
    line = str(error.value)
    assert line.startswith(f"{path}")
    assert "\n" not in line
    assert error.value.__cause__ is None  # a traceback would quote the file
    return line.removeprefix(str(path))


def test_a_short_policy_is_strict_where_it_is_silent(write: Write) -> None:
    policy = read_policy(write())
    assert policy.privacy.required
    assert policy.privacy.unit == "patient"
    assert {policy.share.counts, policy.share.losses, policy.share.scores} == {"never"}
    assert policy.adapter.base_models == ()
    assert policy.audit_file == Path("/var/lib/wardround/ledger.audit.jsonl")


def test_the_example_is_a_valid_policy_and_shows_every_key_with_its_default(write: Write) -> None:
    shown = yaml.safe_load(EXAMPLE.read_text())
    policy = read_policy(EXAMPLE)
    assert policy.site == "st-marys"
    assert set(shown) == set(SitePolicy.model_fields)
    silent = read_policy(write())
    for name in ("notes", "model", "compute", "privacy", "adapter", "share", "coordinator"):
        known = set(type(getattr(policy, name)).model_fields)
        assert set(shown[name]) == known - {"hospital_field"}, name  # there is one hospital
    for name in ("compute", "privacy", "adapter", "share", "coordinator"):
        assert getattr(policy, name) == getattr(silent, name), name
    for name in ("quiet_hours", "audit_log"):
        assert getattr(policy, name) == getattr(silent, name), name


def test_every_limit_of_the_example_is_explained() -> None:
    """A comment stands beside or above each key."""
    lines = EXAMPLE.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r" *[a-z_]+:", line)]
    bare = [
        lines[i]
        for i in keys
        if "#" not in lines[i] and "#" not in lines[i - 1]
        and not (lines[i].rstrip().endswith(":") and lines[i + 1].startswith("  "))
    ]  # fmt: skip
    assert bare == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"shre": {"counts": "public"}},
            ": shre={counts: public}: unknown key; there are: ad",
        ),
        ({"site": "../other"}, ": site='../other': must be letters, digits"),
        ({"site": "a b"}, ": site='a b': must be"),
        ({"site": "east\n"}, ": site='east\\n': must"),
        ({"site": "Global"}, ": site=Global: the merged adapter has this name"),
        ({"ledger": "ledger.sqlite"}, ": ledger=ledger.sqlite: must be a whole path, beginning"),
        ({"ledger": "~/ledger.sqlite"}, ": ledger=~/ledger.sqlite: must be a whole path"),
        ({"site_key": "keys/site.key"}, ": site_key=keys/site.key: must be a whole path"),
        ({"anchor": "anchor"}, ": anchor=anchor: must be a whole path"),
        ({"audit_log": "log"}, ": audit_log=log: must be a whole path"),
        ({"lineage": ""}, ": lineage="),
        (
            {"privacy": {"epsilon": -1, "delta": 1e-5}},
            ": privacy.epsilon=-1: input should be g",
        ),
        ({"privacy": {"epsilon": 8, "delta": 0.5}}, ": privacy.delta=0.5: input should be less"),
        ({"privacy": {"epsilon": 8, "delta": 1e-5, "unit": "ward"}}, ": privacy.unit=ward: "),
        ({"privacy": {"epsilon": 8}}, ": privacy.delta: field required"),
        (
            {"privacy": {"epsilom": 8, "delta": 1e-5}},  # a mistake, no key left out
            ": privacy.epsilom=8: unknown key; there are: delta, epsilon, max_clip_norm, ",
        ),
        ({"notes": {"source": "jsonl"}}, ": notes.path must name"),
        ({"share": {"counts": "always"}}, ": share.counts=always: input should be 'never', 'nois"),
        ({"share": {"noise": 0.5}}, ": share.noise=0.5: input should be greater"),
        ({"quiet_hours": ["7-19"]}, ": quiet_hours: '7-19': write it as"),
        ({"coordinator": {"address": "here"}}, ": coordinator.address=here: must be HOST"),
        ({"adapter": {"train": ["C"]}}, ": adapter.train.0=C: input should be"),
        ({"adapter": {"strategies": [3]}}, ": adapter.strategies.0=3: input should be"),
        ({"adapter": {"strategies": "ffa"}}, ": adapter.strategies=ffa: must be a list, such as ["),
    ],
)
def test_a_key_or_value_that_does_not_fit_is_named(
    write: Write, changes: dict[str, Any], expected: str
) -> None:
    assert complaint(write(**changes)).startswith(expected)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"site:\n\t- a", ", line 2: not valid YAML"),
        (b"site: [east\n", ", line 2: not valid YAML"),
        (b"site: \x00", ": not valid YAML"),
        (b"!!python/object/apply:os.getcwd []", ", line 1: not valid YAML"),  # nothing is run
        (b"site: caf\xe9\n", ": not a readable file of UTF-8 text"),
        (b"site: east\nsite: west\n", ", line 2: a key is set twice"),
        (
            b"privacy:\n  epsilon: 1\n  delta: 1e-5\n  epsilon: 100\n",
            ", line 4: a key is set twice",
        ),
        (b"", ": must be keys with values"),
        (b"- east\n", ": must be keys with values"),
    ],
)
def test_a_file_that_is_no_policy_is_said_to_be_none(
    write: Write, raw: bytes, expected: str
) -> None:
    assert complaint(write(raw=raw)).startswith(expected)


def test_an_absent_file_and_a_folder_are_said_to_be_so(tmp_path: Path) -> None:
    assert complaint(tmp_path / "absent.yaml") == ": no such site policy"
    assert complaint(tmp_path) == ": not a readable file of UTF-8 text"


def test_the_policy_is_the_one_this_machine_names(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(SITE, raising=False)
    monkeypatch.delenv(SITES, raising=False)
    with pytest.raises(SiteError, match=f"set {SITE}"):
        policy_of(context())
    for name in ("b", "a", "c"):
        write(f"sites/{name}.yaml", site=f"site-{name}")
    monkeypatch.setenv(SITES, str(tmp_path / "sites"))
    simulated = [policy_of(context(**{"partition-id": i})).site for i in range(3)]
    assert simulated == ["site-a", "site-b", "site-c"]
    with pytest.raises(SiteError):
        policy_of(context(**{"partition-id": 3}))
    # A deployed site's own file wins over everything that comes with the message.
    monkeypatch.setenv(SITE, str(write("own.yaml", site="own")))
    assert policy_of(context(**{"partition-id": 1})).site == "own"


def test_nothing_in_a_flower_context_can_name_a_policy(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SITES, raising=False)
    monkeypatch.setenv(SITE, str(write(site="own")))
    lax = str(write("lax.yaml", site="lax", privacy={"required": False} | GOOD["privacy"]))
    sent = Context(1, 7, {SITE: lax, "site": lax}, RecordDict(), {SITE: lax, "site": lax})
    assert policy_of(sent).site == "own"
