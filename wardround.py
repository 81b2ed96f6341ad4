"""The command ``wardround``: one entry for researchers, hospitals and coordinators.

Options are Hydra overrides (``key=value``), composed from ``conf/`` and checked before anything
runs. A mistake gives one line on standard error and exit code 2; a run that fails gives one line
and exit code 1; Ctrl-C gives 130.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from conf.commands import (
    AlignCommand,
    AuditCommand,
    ClientCommand,
    EvaluateCommand,
    LedgerCommand,
    ServerCommand,
)
from conf.experts import ExpertsCommand, TradeoffCommand, TransferCommand
from conf.load import ConfigError, command_help, groups, load, sweep
from conf.schema import RunSettings

# Flower and the libraries below it read these when they are imported.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # the bars of libraries would write over ours
}.items():
    os.environ.setdefault(_name, _value)

_USAGE = 2
_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A subcommand: the function that does it, for whom it is, and how it is called."""

    run: Callable[[list[str], bool, Console], int]
    user: str
    usage: str = "[key=value ...]"
    options: str = "Options are key=value, as in the files under conf/, where each is explained."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    options, overrides = _parser().parse_known_args(arguments)
    unknown = [o for o in overrides if o.startswith("-")]
    console = Console(stderr=True)
    if unknown:
        return _say(console, f"unknown option {unknown[0]}; see wardround {options.command} --help")
    _quiet()
    try:
        return COMMANDS[options.command].run(
            overrides, getattr(options, "multirun", False), console
        )
    except ConfigError as problem:
        return _say(console, str(problem), _USAGE)
    except KeyboardInterrupt:
        return _say(console, "stopped; nothing that was finished is lost", _INTERRUPTED)
    except _expected() as problem:
        if isinstance(problem, OSError) and problem.filename and problem.strerror:
            return _say(console, f"{problem.filename}: {problem.strerror.lower()}", 1)
        return _say(console, str(problem), 1)


def run() -> NoReturn:
    """The command on a terminal: ``main``, then the end of the process.

    An interrupt can leave threads of the simulation engine waiting for workers that are gone, and
    Python would wait for those threads for ever: all our own files are closed by then.
    """
    code = main()
    if code == _INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _simulate(overrides: list[str], multirun: bool, console: Console) -> int:
    jobs = sweep(overrides) if multirun else [overrides]
    checked = [load("simulate", job, RunSettings) for job in jobs]  # before the slow imports

    from simulation.report import print_summary
    from simulation.run import open_run, simulate
    from simulation.sweep import run_sweep

    if multirun:
        run_sweep(jobs, console)
        return 0
    settings, folder = open_run(checked[0], overrides)
    print_summary(simulate(settings, folder, console), console)
    console.print(
        f"report: [bold]{escape(str(folder.path / 'report.html'))}[/bold]", soft_wrap=True
    )
    return 0


def _server(overrides: list[str], multirun: bool, console: Console) -> int:
    from server.daemon import serve
    from server.run_folder import RunFolder
    from strategies.registry import require_strategy

    command = load("server", overrides, ServerCommand)
    require_strategy(command)
    folder = RunFolder(command.run_dir)
    if not (folder.path / "config.yaml").exists():
        folder.create(command)
    elif (begun := folder.training()) != (asked := RunFolder.training_of(command)):
        from simulation.comparison import differences

        both = [settings.model_dump(mode="json") for settings in (begun, asked)]
        changed = ", ".join(f"{key}={was}" for key, (was, _) in differences(both).items())
        raise ConfigError(
            f"run_dir={command.run_dir}: holds a run with another configuration; give the options "
            f"it was started with ({changed}), or another run_dir"
        )
    if len(folder.finished_rounds()) >= command.federation.rounds:
        console.print(
            "all rounds are done; merged adapter: "
            f"[bold]{escape(str(folder.adapter_folder(command.federation.rounds)))}[/bold]",
            soft_wrap=True,
        )
        return 0
    return 0 if serve(command.server, folder, console) else 1


def _client(overrides: list[str], multirun: bool, console: Console) -> int:
    from client.daemon import serve

    command = load("client", overrides, ClientCommand)
    serve(command.site, command.client, console)
    return 0


def _align(overrides: list[str], multirun: bool, console: Console) -> int:
    from server.alignment.command import run

    folder = run(load("align", overrides, AlignCommand), console)
    console.print(f"aligned adapter: [bold]{escape(str(folder))}[/bold]", soft_wrap=True)
    return 0


def _merge(words: list[str], multirun: bool, console: Console) -> int:
    if len(words) != 2:
        raise ConfigError("say what and where to: wardround merge FILE.yaml OUT_DIR")

    from server.offline.command import run

    folder = run(Path(words[0]), Path(words[1]), console)
    console.print(f"merged: [bold]{escape(str(folder))}[/bold]", soft_wrap=True)
    return 0


def _evaluate(overrides: list[str], multirun: bool, console: Console) -> int:
    from client.evaluation import run

    run(load("evaluate", overrides, EvaluateCommand), console)
    return 0


def _ledger(overrides: list[str], multirun: bool, console: Console) -> int:
    from client.ledger_command import ACTIONS, run

    if not overrides or overrides[0] not in ACTIONS:
        raise ConfigError(f"say what to do: wardround ledger {' | '.join(ACTIONS)}")
    run(overrides[0], load("ledger", overrides[1:], LedgerCommand), console)
    return 0


def _audit(overrides: list[str], multirun: bool, console: Console) -> int:
    command = load("audit", overrides, AuditCommand)

    from simulation.audit.record import write_record
    from simulation.audit.report import print_audit, write_report
    from simulation.audit.run import audit

    result = audit(command, console)
    write_record(result, command.out)
    print_audit(result, console)
    console.print(
        f"report: [bold]{escape(str(write_report(result, command.out)))}[/bold]", soft_wrap=True
    )
    return 1 if result.problems else 0


def _experts(overrides: list[str], multirun: bool, console: Console) -> int:
    from server.experts.command import run

    run(load("experts", overrides, ExpertsCommand), console)
    return 0


def _tradeoff(overrides: list[str], multirun: bool, console: Console) -> int:
    from server.experts.tradeoff import run

    run(load("tradeoff", overrides, TradeoffCommand), console)
    return 0


def _transfer(overrides: list[str], multirun: bool, console: Console) -> int:
    from server.experts.transfer_command import run

    run(load("transfer", overrides, TransferCommand), console)
    return 0


_RESEARCHER, _HOSPITAL, _COORDINATOR = "a researcher", "a hospital", "a coordinator"

COMMANDS = {
    "simulate": Command(_simulate, _RESEARCHER),
    "experts": Command(_experts, _RESEARCHER),
    "tradeoff": Command(_tradeoff, _RESEARCHER),
    "client": Command(_client, _HOSPITAL),
    "ledger": Command(_ledger, _HOSPITAL),
    "audit": Command(_audit, _HOSPITAL),
    "evaluate": Command(_evaluate, _HOSPITAL),
    "server": Command(_server, _COORDINATOR),
    "align": Command(_align, _COORDINATOR),
    "merge": Command(
        _merge,
        _COORDINATOR,
        usage="FILE.yaml OUT_DIR",
        options="Methods, parameters, and where they differ from mergekit: docs/offline-merging.md",
    ),
    "transfer": Command(_transfer, _COORDINATOR),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the usage above it."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument COMMAND: ")
        self.exit(_USAGE, f"wardround: {message}; see {self.prog} --help\n")


def _by_user() -> dict[str, list[str]]:
    """The names of the commands, by whom they are for."""
    users = dict.fromkeys(command.user for command in COMMANDS.values())
    return {user: [n for n, command in COMMANDS.items() if command.user == user] for user in users}


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    texts = {name: command_help(name) for name in COMMANDS}
    lines = "\n\n".join(
        f"for {user}:\n" + "\n".join(f"  {name:10} {texts[name][0]}" for name in names)
        for user, names in _by_user().items()
    )
    parser = _Parser(
        prog="wardround",
        formatter_class=plain,
        usage="wardround COMMAND [key=value ...]",
        description="Federated, differentially private adaptation of a language model to clinical "
        f"notes.\n\nTo see all of it at work: wardround simulate\n\n{lines}",
        epilog="wardround COMMAND --help says more about one of them.",
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    choices = "\n".join(
        textwrap.fill(
            f"  {name + '=':14}{' | '.join(values)}", 98, subsequent_indent=" " * 16,
            break_on_hyphens=False,
        )
        for name, values in groups().items()
    )  # fmt: skip
    for name, command in COMMANDS.items():
        epilog = command.options
        if name == "simulate":
            epilog += f"\n\ngroups:\n{choices}"
        one = commands.add_parser(
            name,
            formatter_class=plain,
            usage=f"wardround {name} {command.usage}",
            description=texts[name][1],
            epilog=epilog,
        )
        if name == "simulate":
            one.add_argument(
                "--multirun", action="store_true", help="run every combination of key=a,b choices"
            )
    return parser


def _expected() -> tuple[type[Exception], ...]:
    """Errors whose message is one line for a person; anything else is a defect and shows itself."""
    from adapters.base_model import ModelError
    from adapters.lora import UnsupportedAdapter
    from client.daemon import DaemonError as ClientDaemonError
    from client.node_key import NodeKeyError
    from client.notes.load import NotesError
    from client.privacy.ledger import LedgerError
    from client.refusal import Refusal
    from client.site import SiteError
    from server.alignment.mediflow import InstructionsError
    from server.certificates import CertificateError
    from server.daemon import DaemonError
    from server.rounds import RoundFailed
    from simulation.cohort import SimulationError
    from strategies.base import MergeError

    return (
        ModelError, ClientDaemonError, NodeKeyError, NotesError, SiteError, InstructionsError,
        CertificateError, DaemonError, RoundFailed, SimulationError, LedgerError,
        UnsupportedAdapter, Refusal, MergeError,
        OSError,  # a disk that is full, a folder that may not be written
    )  # fmt: skip


def _quiet() -> None:
    """Warnings of the libraries below are theirs; ours are printed by ``logging`` and ``rich``."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _say(console: Console, message: str, code: int = _USAGE) -> int:
    console.print(f"[bold red]wardround:[/bold red] {escape(message)}", soft_wrap=True)
    return code


if __name__ == "__main__":
    run()
