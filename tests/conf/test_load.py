"""Configuration: every choice composes, values arrive as typed, and a mistake gives one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from conf.commands import (
    AlignCommand,
    AuditCommand,
    ClientCommand,
    EvaluateCommand,
    LedgerCommand,
    ServerCommand,
)
from conf.experts import ExpertsCommand, TradeoffCommand, TransferCommand
from conf.load import FOLDER, ConfigError, groups, load, sweep
from conf.schema import RunSettings
from wardround import COMMANDS

KINDS: dict[str, type[BaseModel]] = {
    "simulate": RunSettings,
    "server": ServerCommand,
    "client": ClientCommand,
    "align": AlignCommand,
    "evaluate": EvaluateCommand,
    "experts": ExpertsCommand,
    "tradeoff": TradeoffCommand,
    "transfer": TransferCommand,
    "ledger": LedgerCommand,
    "audit": AuditCommand,
}
NEEDED = {  # what a command, or a choice, cannot do without
    "align": ["adapter=merged", "out=aligned"],
    "evaluate": ["adapter=merged", "notes.path=export"],
    "experts": ["experts=[a,b]", "tasks=[a.jsonl]", "out=merged"],
    "tradeoff": ["adapter=merged", "clinical=[a.jsonl]", "general=[b.jsonl]", "out=curve"],
    "transfer": ["adapter=merged", "base=old", "target=new", "out=moved"],
    "model=path": ["model.path=folder"],
    **{f"notes={s}": ["notes.path=file"] for s in ("csv", "fhir", "jsonl", "parquet", "text")},
}
CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices]
SOME_CHOICES = [  # of the commands beside simulate, which composes them all
    ("server", "privacy", "patient_eps3"),
    ("server", "optimizer", "adamw"),
    ("align", "alignment", "synthetic"),
    ("align", "model", "path"),
    ("evaluate", "notes", "parquet"),
]


def compose(command: str, *overrides: str) -> Any:
    """The settings of ``command``, with what the overrides need beside them."""
    needed = [n for o in (command, *overrides) for n in NEEDED.get(o, [])]
    return load(command, [*overrides, *needed], KINDS[command])


def complaint(command: str, *overrides: str) -> str:
    """The one line that refuses these overrides."""
    with pytest.raises(ConfigError) as caught:
        load(command, list(overrides), KINDS[command])
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_every_command_has_its_file_and_every_file_its_command() -> None:
    files = {file.stem for file in FOLDER.glob("*.yaml")} - {"site.example"}
    assert files == set(COMMANDS) - {"merge"} == set(KINDS)  # whose options are its recipe's


@pytest.mark.parametrize("command", sorted(KINDS))
def test_the_defaults_of_every_command_are_valid(command: str) -> None:
    assert isinstance(compose(command), KINDS[command])


@pytest.mark.parametrize(
    ("command", "group", "choice"), [("simulate", *pair) for pair in CHOICES] + SOME_CHOICES
)
def test_every_group_choice_sets_what_its_file_says(command: str, group: str, choice: str) -> None:
    file = OmegaConf.load(FOLDER / group / f"{choice}.yaml")
    others = {"adapter": {"train": "B"}}  # what a file may refer to
    written = OmegaConf.to_container(OmegaConf.create(others | {group: file}), resolve=True)[group]
    assert isinstance(written, dict)
    written.pop("defaults", None)
    settings = compose(command, f"{group}={choice}").model_dump(mode="json")
    assert settings[group] == {**settings[group], **written, **_paths(settings[group], written)}


def _paths(given: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """A path is left open in the files and comes from the command line."""
    return {"path": given["path"]} if written.get("path", "") is None else {}


@pytest.mark.parametrize("command", ["simulate", "server"])
@pytest.mark.parametrize(
    ("train", "strategy", "rate"),
    [
        ("B", "fedsvd", 10),
        ("core", "ffa", 10),
        ("A", "rolora", 5),
        ("alternate", "rolora", 5),
        ("both", "lora_fair", 5),
    ],
)
def test_a_step_is_half_as_long_where_a_moves_unless_said_otherwise(
    command: str, train: str, strategy: str, rate: float
) -> None:
    chosen = [f"adapter.train={train}", f"strategy={strategy}"]
    assert compose(command, *chosen).optimizer.learning_rate == rate
    said = compose(command, *chosen, "optimizer.learning_rate=7")
    assert said.optimizer.learning_rate == 7


def test_an_unknown_part_to_train_is_what_is_refused_not_its_rate() -> None:
    assert complaint("simulate", "adapter.train=bothh").startswith("adapter.train=bothh: ")


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_file_says_first_what_it_is_for(file: Path) -> None:
    assert file.read_text().startswith("# ")


def test_values_lists_and_null_arrive_as_typed() -> None:
    settings = compose(
        "simulate",
        "privacy=none",
        "privacy.epsilon=3",
        "adapter.targets=[q_proj,o_proj]",
        "hospitals.max_units=null",
        "alignment.sft.learning_rate=1e-4",
        "notes.holdout=0.5",
        "runs=/tmp/elsewhere",
    )
    assert settings.privacy.enabled is False
    assert settings.privacy.epsilon == 3.0
    assert settings.adapter.targets == ("q_proj", "o_proj")
    assert settings.hospitals.max_units is None
    assert settings.alignment.sft.learning_rate == 1e-4
    assert settings.notes.holdout == 0.5
    assert settings.runs == Path("/tmp/elsewhere")


def test_a_value_beats_its_group_whatever_the_order() -> None:
    one = compose("simulate", "privacy.epsilon=5", "privacy=patient_eps1")
    other = compose("simulate", "privacy=patient_eps1", "privacy.epsilon=5")
    assert one.privacy.epsilon == other.privacy.epsilon == 5


@pytest.mark.parametrize("command", ["align", "evaluate"])
def test_an_option_may_be_called_as_a_group_that_the_command_does_not_have(command: str) -> None:
    assert "adapter" in groups()
    overrides = [o.replace("merged", "runs/a/adapters/round-002/global") for o in NEEDED[command]]
    settings: Any = load(command, overrides, KINDS[command])
    assert settings.adapter == Path("runs/a/adapters/round-002/global")


@pytest.mark.parametrize(
    "path",
    [
        "/a/b c/d,e.jsonl",
        "/a/b=c.jsonl",
        "/a/notes (1).jsonl",
        "/a/{b}[c].jsonl",
        "/a/it's.jsonl",
        "/a/#b;c&d.jsonl",
        "/a/Übergabe ‘24.jsonl",
        "./2024",
        "a:b",
    ],
)
def test_a_path_may_have_any_character(path: str) -> None:
    settings = load("simulate", ["notes=text", f"notes.path={path}"], RunSettings)
    assert settings.notes.path == Path(path)


def test_the_home_folder_may_be_written_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert compose("simulate", "runs=~/runs").runs == Path("/home/someone/runs")
    assert compose("simulate", "runs='~/runs'").runs == Path("~/runs")  # in quotes, as it is
    assert compose("server").server.state == Path("/home/someone/.local/state/wardround/server")


@pytest.mark.parametrize(
    ("command", "override", "key", "allowed"),
    [
        ("simulate", "nope=1", "unknown key nope (=1)", "runs, seed, strategy"),
        ("simulate", "privacy.epsilom=1", "unknown key privacy.epsilom (=1)", "epsilon, max_notes"),
        ("simulate", "privacy.epsilon.x=1", "unknown key privacy.epsilon.x (=1)", "no keys"),
        ("simulate", "hydra.run.dir=x", "unknown key hydra.run.dir (=x)", "there are: adapter"),
        ("server", "notes=csv", "unknown key notes (=csv)", "there are: adapter, federation"),
        ("client", "privacy.epsilon=99", "unknown key privacy.epsilon (=99)", "client, site"),
        ("evaluate", "alignment=none", "unknown key alignment (=none)", "max_tokens, model"),
    ],
)
def test_an_unknown_key_is_named_with_the_known_ones(
    command: str, override: str, key: str, allowed: str
) -> None:
    message = complaint(command, override)
    assert message.startswith(key)
    assert allowed in message


@pytest.mark.parametrize("group", groups())
def test_an_unknown_choice_is_named_with_the_choices(group: str) -> None:
    choices = ", ".join(groups()[group])
    said = f"{group}=typo: choose one of {choices}"
    if group == "strategy":
        said += "; one of an installed package is chosen by strategy.name=typo"
    assert complaint("simulate", f"{group}=typo") == said
    assert complaint("simulate", f"{group}=null").startswith(f"{group}=null: choose one of")
    assert complaint("simulate", f"{group}={{}}").startswith(f"{group}={{}}: choose one of")


def test_who_chooses_a_strategy_of_another_package_as_a_group_is_told_how_it_is_chosen() -> None:
    hint = "; one of an installed package is chosen by strategy.name=half"
    assert complaint("experts", "strategy=half", *NEEDED["experts"]).endswith(hint)


@pytest.mark.parametrize("own", [[], ["strategy.share=0.3"]])
@pytest.mark.parametrize("group", [[], ["strategy=ties"]])
def test_another_strategy_by_name_has_none_of_the_groups_parameters(
    own: list[str], group: list[str]
) -> None:
    given = compose("experts", *own, "strategy.name=half", *group).strategy
    assert given.model_dump() == {"name": "half", **({"share": 0.3} if own else {})}


def test_the_groups_own_name_keeps_its_parameters() -> None:
    given = compose("experts", "strategy.name=task_arithmetic").strategy
    assert given.parameters == {"strength": 0.4}


def test_several_choices_at_once_are_told_of_multirun() -> None:
    assert complaint("simulate", "privacy=none,patient_eps8").endswith("--multirun)")


@pytest.mark.parametrize("override", ["privacy", "=3", "+new=1", "~seed", "--fast", "a b=1", ""])
def test_what_is_no_option_is_quoted_with_the_form_of_one(override: str) -> None:
    assert complaint("simulate", override) == f"'{override}': write an option as key=value"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("alignment.sft=3", "alignment.sft=3: set one of its keys: alignment.sft.steps, "),
        ("federation=x", "federation=x: set one of its keys: federation.rounds, "),
        ("seed=1.5", "seed=1.5: input should be a valid integer"),
        ("seed=many", "seed=many: input should be a valid integer"),
        ("privacy.epsilon=1,2", "privacy.epsilon=1,2: input should be a valid number"),
        ("privacy.epsilon=", "privacy.epsilon='': input should be a valid number"),
        ("adapter.targets=q_proj", "adapter.targets=q_proj: must be a list, such as [a,b]"),
        ("runs=2024", "runs=2024: must be a path (write ./NAME "),
        ("runs=???", "runs must be given; see wardround simulate --help"),
        ("runs=/a/${b}", "runs: Interpolation key 'b' not found"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_allowed(
    override: str, expected: str
) -> None:
    assert complaint("simulate", override).startswith(expected)


def test_a_long_value_is_cut() -> None:
    assert "x" * 50 in complaint("simulate", "seed=" + "x" * 50)
    message = complaint("simulate", "seed=" + "x" * 500)
    assert len(message) < 150
    assert "..." in message


@pytest.mark.parametrize("command", ["align", "evaluate"])
def test_what_must_be_given_is_asked_for_by_name(command: str) -> None:
    written = (FOLDER / f"{command}.yaml").read_text().splitlines()
    open_keys = [line.partition(":")[0] for line in written if ": ???" in line]
    assert open_keys == [o.partition("=")[0] for o in NEEDED[command] if "notes" not in o]
    given: list[str] = []
    for key in open_keys:
        expected = f"{key} must be given; see wardround {command} --help"
        assert complaint(command, *given) == expected
        given.append(f"{key}=somewhere")


def test_commands_without_open_keys_have_defaults_for_all() -> None:
    for command in ("simulate", "server", "client"):
        assert "???" not in (FOLDER / f"{command}.yaml").read_text()


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        ([], [[]]),
        (["a=1", "b.c=x"], [["a=1", "b.c=x"]]),
        (["a=1,2", "b=3"], [["a=1", "b=3"], ["a=2", "b=3"]]),
        (["a=1,2", "b=x,y"], [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]),
        (["seed=range(1,4)"], [["seed=1"], ["seed=2"], ["seed=3"]]),
        (["t=[a,b],[c]"], [["t=[a,b]"], ["t=[c]"]]),
        (["p='/a,b.jsonl'"], [["p='/a,b.jsonl'"]]),
        (["p=/a=b,c.jsonl"], [["p=/a=b,c.jsonl"]]),
        (["a=glob(*)"], [["a=glob(*)"]]),
        (["no option"], [["no option"]]),
    ],
)
def test_a_sweep_is_every_combination_in_order(overrides: list[str], jobs: list[list[str]]) -> None:
    assert sweep(overrides) == jobs


def test_a_quoted_path_of_a_sweep_arrives_whole() -> None:
    jobs = sweep(["notes=jsonl", "notes.path='/a b/c,d.jsonl'", "privacy=none,patient_eps1"])
    settings = [load("simulate", job, RunSettings) for job in jobs]
    assert [s.privacy.enabled for s in settings] == [False, True]
    assert [s.notes.path for s in settings] == [Path("/a b/c,d.jsonl")] * 2
