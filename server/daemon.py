"""The coordinator's daemon: from a run folder to a finished run, and nothing left behind.

    daemon ─┬─ flower-superlink   one port: hospitals, control, ServerApp
            └─ flower-superexec ── flwr-serverapp (server.pinned)

The daemon lets in the hospitals whose public keys lie in a folder, submits one run when enough of
them are connected, tells a person how it goes, and ends every process it started, whatever happens.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from conf.deployment import ServerSettings
from server import certificates
from server.app import RUN
from server.pinned import SUBMITTED
from server.public_keys import PublicKeyError, read_public_key
from server.rounds import hospitals_needed
from server.run_folder import RunFolder, write_atomically
from server.superlink import SuperLink
from transport import processes

_START_S = 90.0  # for Flower to answer after its start
_POLL_S = 1.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class DaemonError(RuntimeError):
    """The coordinator cannot go on; the message says why and what to do."""


@dataclass
class _Flower:
    """Flower's processes, with their logs."""

    address: str  # host:port as reached from this machine
    serverapp_log: Path
    ca: Path | None = None
    running: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)

    def require_alive(self) -> None:
        for log, process in self.running.items():
            if process.poll() is not None:
                raise DaemonError(f"{log.stem} ended with status {process.returncode}, see {log}")


def serve(settings: ServerSettings, folder: RunFolder, console: Console) -> bool:
    """Run the federation of ``folder`` with real hospitals; return whether it finished.

    Parameters
    ----------
    settings
        Where to listen, and where keys and logs lie.
    folder
        Holds ``config.yaml``; finished rounds in it are not run again.
    console
        For the person at the terminal.

    Raises
    ------
    DaemonError, CertificateError
        One line says what is wrong, before or while Flower runs.
    KeyboardInterrupt
        Ctrl-C or SIGTERM, after everything has been stopped.
    """
    federation = folder.training().federation
    state = processes.private_folder(settings.state)
    settings.sites.mkdir(parents=True, exist_ok=True)
    with processes.sigterm_like_ctrl_c(), ExitStack() as stack:
        flower = _start_flower(settings, state, folder, stack)
        _say_how_to_join(settings, flower.ca, console)
        ca = flower.ca.read_bytes() if flower.ca else None
        link = stack.enter_context(SuperLink(flower.address, ca))
        status = stack.enter_context(console.status("starting Flower"))
        try:
            _wait(flower, link.ready)
            door = _Door(settings.sites, link) if ca else None
            needed, said_by = hospitals_needed(folder.training())
            console.print(f"waiting for {needed} hospitals ({escape(said_by)})")
            _gather(link, door, needed, flower, status, console)
            run_id = link.submit()
            write_atomically(_submitted(state), str(run_id))
            stack.callback(_stop_run, link, run_id)
            return _follow(link, door, run_id, folder, federation.rounds, flower, status, console)
        except httpx.HTTPError as problem:
            flower.require_alive()  # the better message, if Flower ended
            raise DaemonError(f"Flower did not answer ({type(problem).__name__})") from None


def _local_address(host: str, port: int) -> tuple[str, str]:
    """Host name and ``host:port`` by which this machine reaches what listens on ``host``."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return local, f"[{local}]:{port}" if ":" in local else f"{local}:{port}"


def _start_flower(
    settings: ServerSettings, state: Path, folder: RunFolder, stack: ExitStack
) -> _Flower:
    """Start SuperLink and SuperExec; ``stack`` stops them."""
    local, address = _local_address(settings.host, settings.port)
    logs = processes.private_folder(state / "logs")
    flower = _Flower(address, logs / "serverapp.log")
    _require_free(settings.host, settings.port)
    server_tls, client_tls = ["--insecure"], ["--insecure"]
    if settings.transport == "tls":
        hosts = dict.fromkeys((*_LOOPBACK, local, *settings.names))
        made = certificates.obtain(state / "certificates", list(hosts))
        flower.ca = made.ca
        server_tls = ["--enable-supernode-auth", "--ssl-ca-certfile", str(made.ca)]
        server_tls += ["--ssl-certfile", str(made.certificate), "--ssl-keyfile", str(made.key)]
        client_tls = ["--root-certificates", str(made.ca)]

    secret = state / "superexec.secret"  # without it, any process that reaches the port could
    secret.unlink(missing_ok=True)  # pose as the SuperExec and run the ServerApp elsewhere
    processes.write_private(secret, secrets.token_hex(48).encode())
    _submitted(state).unlink(missing_ok=True)
    commands = processes.shadow_commands(
        state / "commands", "flwr-serverapp", "server.pinned", flower.serverapp_log
    )
    env = processes.environment(
        state / "flower",
        commands,
        **{RUN: str(folder.path.resolve()), SUBMITTED: str(_submitted(state))},
    )
    shared = ["--superexec-auth-secret-file", str(secret)]
    superlink = ["flower-superlink", "--isolation", "process", *server_tls, *shared]
    superlink += ["--host", settings.host, "--port", str(settings.port)]
    superlink += ["--disable-runtime-dependency-installation"]
    superexec = ["flower-superexec", "--runtime-api-address", address, *client_tls, *shared]
    superexec += ["--parent-pid", str(os.getpid())]  # no ServerApp outlives its daemon
    for command in (superlink, superexec):
        log = logs / f"{command[0]}.log"
        process = processes.start(command, log, env)
        stack.callback(processes.stop, process)
        flower.running[log] = process
    return flower


def _submitted(state: Path) -> Path:
    return state / "submitted-run"


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            why = problem.strerror
            raise DaemonError(f"server.port={port} on {host} cannot be used: {why}") from None


def _wait(flower: _Flower, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_S
    while not ready():
        flower.require_alive()
        if time.monotonic() > deadline:
            raise DaemonError(f"Flower did not answer within {_START_S:.0f} s, see its logs")
        time.sleep(0.3)


def _say_how_to_join(settings: ServerSettings, ca: Path | None, console: Console) -> None:
    if ca is None:
        console.print(
            "[bold red]transport=insecure: adapters travel unencrypted, and whoever reaches "
            f"port {settings.port} can join. Use it on a test network only."
        )
        return
    console.print("Hospitals need this certificate:", escape(str(ca)), soft_wrap=True)
    where = escape(str(settings.sites))
    console.print("Their public keys belong here, as SITE.pub:", where, soft_wrap=True)


class _Door:
    """Registers every key in the folder once, also those that are put there while it waits."""

    def __init__(self, sites: Path, link: SuperLink) -> None:
        self._sites, self._link = sites, link
        self._seen: dict[Path, int] = {}  # file -> its modification time when it was read
        self._names: dict[str, Path] = {}  # without case, as folders of some disks have them

    def admit(self) -> list[str]:
        """Register new keys; return lines about what was admitted and what could not be."""
        lines = []
        for path in sorted(self._sites.glob("*.pub")):
            try:
                changed = path.stat().st_mtime_ns
            except OSError:
                continue  # a dangling link, or gone since the folder was read
            if self._seen.get(path) == changed:
                continue
            self._seen[path] = changed
            try:
                name, key = read_public_key(path)
                if self._names.setdefault(name.casefold(), path) != path:
                    raise PublicKeyError(f"{path}: another hospital has this name but for its case")
                self._link.register(name, key)
            except PublicKeyError as problem:
                lines.append(str(problem))
            except httpx.HTTPStatusError as problem:
                code = problem.response.status_code
                lines.append(
                    f"{path}: not registered (HTTP {code}): is this key there already, under "
                    "another name?"
                )
            else:
                lines.append(f"{name} may connect")
        return lines


def _admit(door: _Door | None, console: Console) -> None:
    for line in door.admit() if door else ():
        console.print(escape(line), soft_wrap=True)


def _gather(
    link: SuperLink,
    door: _Door | None,
    needed: int,
    flower: _Flower,
    status: Status,
    console: Console,
) -> None:
    """Wait, without a limit, until ``needed`` hospitals are connected."""
    known: tuple[str, ...] = ()
    while True:
        flower.require_alive()
        _admit(door, console)
        online = link.online()
        for name in (name for name in online if name not in known):
            console.print(f"{escape(name)} connected")
        known = online
        status.update(f"hospitals connected: {len(online)} of {needed}")
        if len(online) >= needed:
            return
        time.sleep(_POLL_S)


def _follow(
    link: SuperLink,
    door: _Door | None,
    run_id: int,
    folder: RunFolder,
    rounds: int,
    flower: _Flower,
    status: Status,
    console: Console,
) -> bool:
    """Tell about each finished round until the run ends; return whether it completed.

    A hospital whose key comes late takes part from its next round on.
    """
    told = len(folder.finished_rounds())
    deadline = time.monotonic() + _START_S
    while True:
        flower.require_alive()
        _admit(door, console)
        now = link.status(run_id)
        if now.state in ("pending", "starting") and time.monotonic() > deadline:
            raise DaemonError(f"the ServerApp did not start, see {flower.serverapp_log}")
        finished = folder.finished_rounds()
        for record in finished[told:]:
            took = f"{len(record['hospitals'])} hospitals, {record['seconds']:.0f} s"
            console.print(f"round {record['round']} of {rounds}: {took}")
            for site, reason in record["left_out"].items():
                console.print(f"  [yellow]{escape(site)} left out: {escape(reason)}")
        told = len(finished)
        status.update(f"round {min(told + 1, rounds)} of {rounds}, Flower run {now.state}")
        if now.state == "finished":
            if now.completed:
                console.print(
                    f"merged adapter: [bold]{escape(str(folder.adapter_folder(rounds)))}[/bold]",
                    soft_wrap=True,
                )
            else:
                console.print(f"[red]the run failed: {escape(now.details)}")
            return now.completed
        time.sleep(_POLL_S)


def _stop_run(link: SuperLink, run_id: int) -> None:
    """Let the ServerApp end in order when the daemon is interrupted."""
    with suppress(httpx.HTTPError):
        if link.status(run_id).state != "finished":
            link.stop(run_id)
