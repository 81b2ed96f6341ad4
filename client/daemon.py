"""The hospital's daemon: stays connected to the coordinator and answers with installed code only.

    daemon ── flower-supernode ── flower-superexec ── flwr-clientapp (client.pinned), one a message

The hospital opens the connection; nothing listens but a port on this machine's loopback. The site
policy reaches the ClientApp through this machine's environment, so no message can replace it.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from client import node_key
from client.preflight import preflight
from client.site import SITE
from conf.deployment import ClientSettings
from transport import processes

_POLL_S = 1.0
_LONGEST_PAUSE_S = 60.0
_STEADY_S = 120.0  # a connection that lasted so long was a good one: pauses start small again

# What a person wants to know, by the log line that shows it. Flower 1.41's wording.
_EVENTS = {
    re.compile(r"SuperNode ID: (\d+)"): "connected",
    re.compile(r"\[RUN \d+, ROUND (\d+)\]"): "round {}",
    re.compile(r"(Sent successfully)"): "answer sent",
    re.compile(r"(Connection attempt failed)"): "the coordinator does not answer, trying again",
    re.compile(r"(CERTIFICATE_VERIFY_FAILED)"): "this is not the server of client.certificate, or "
    "its certificate does not cover the name in client.server; trying again",
    re.compile(r"(Failed to activate SuperNode)"): "the coordinator does not know this hospital's "
    "key yet, or still holds its last connection; trying again",
    re.compile(r"(?:WARNING|ERROR) client\.\S+: (.*)"): "{}",
}


class DaemonError(RuntimeError):
    """The hospital cannot take part; the message says why and what to do."""


def serve(policy: Path, settings: ClientSettings, console: Console) -> None:
    """Take part in the coordinator's runs until Ctrl-C or SIGTERM, which end it in order.

    Parameters
    ----------
    policy
        The site policy (``conf.policy.SitePolicy`` as YAML).
    settings
        Whom to connect to, and where keys and logs lie.
    console
        For the person at the terminal.

    Raises
    ------
    SiteError, NodeKeyError, DaemonError
        One line says what is wrong, before anything is started.
    """
    with console.status("reading the notes, as a round will"):
        own, notes = preflight(policy)
    console.print(escape(notes), soft_wrap=True)
    site, allowed = own.site, own.coordinator.address
    if allowed is not None and settings.server != allowed:
        raise DaemonError(
            f"client.server={settings.server}: {policy} allows coordinator.address {allowed} only"
        )
    state = processes.private_folder(settings.state / site)  # two sites of one machine stay apart
    trust = _trust(settings, state, site, console)
    commands = processes.shadow_commands(state / "commands", "flwr-clientapp", "client.pinned")
    env = processes.environment(state / "flower", commands, **{SITE: str(policy.resolve())})
    log = processes.private_folder(state / "logs") / "supernode.log"
    try:
        with processes.sigterm_like_ctrl_c(), console.status("starting") as status:
            story = _Story(console, status)
            for pause in _pauses():
                command = ["flower-supernode", "--superlink", settings.server, *trust]
                command += ["--host", "127.0.0.1", "--port", str(_free_port())]
                code = _attend(command, log, env, story)
                status.update(f"next attempt in {pause:.0f} s (last: status {code}, see {log})")
                time.sleep(pause)
    except KeyboardInterrupt:
        console.print("stopped")


def _trust(settings: ClientSettings, state: Path, site: str, console: Console) -> list[str]:
    """Flags that say whom this hospital trusts and who it is; tells the person what to do."""
    if settings.transport == "insecure":
        console.print(
            "[bold red]transport=insecure: the adapter travels unencrypted and neither side knows "
            "who the other is. Use it on a test network only."
        )
        return ["--insecure"]
    if settings.certificate is None or not settings.certificate.is_file():
        raise DaemonError(
            f"client.certificate={settings.certificate}: no such file, ask the coordinator for "
            "ca.pem"
        )
    private, public = node_key.obtain(state, site)
    console.print("Public key for the coordinator to add:", escape(str(public)), soft_wrap=True)
    authority = str(settings.certificate.resolve())
    return ["--root-certificates", authority, "--auth-supernode-private-key", str(private)]


def _pauses() -> Iterator[float]:
    """Seconds to wait before each next attempt; they double up to a minute."""
    pause, started = 2.0, time.monotonic()
    while True:
        yield pause
        steady = time.monotonic() - started - pause > _STEADY_S
        pause, started = 2.0 if steady else min(2 * pause, _LONGEST_PAUSE_S), time.monotonic()


class _Story:
    """Tells a person what happens, each thing once until something else happens."""

    def __init__(self, console: Console, status: Status) -> None:
        self._console, self._status, self._told = console, status, ""

    def tell(self, event: str) -> None:
        self._status.update(escape(event))
        if event != self._told:
            self._console.print(escape(event), soft_wrap=True)
            self._told = event


def _attend(command: list[str], log: Path, env: dict[str, str], story: _Story) -> int:
    """Run one SuperNode until it ends by itself; return its exit status."""
    lines = _NewLines(log, log.stat().st_size if log.exists() else 0)
    process = processes.start(command, log, env)
    try:
        while True:
            ended = process.poll()  # before reading, so that its last words are not lost
            for event in filter(None, map(_event, lines)):
                story.tell(event)
            if ended is not None:
                return ended
            time.sleep(_POLL_S)
    finally:
        processes.stop(process)


@dataclass
class _NewLines:
    """Whole lines that were written to a file since the last look."""

    path: Path
    offset: int

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        yield from whole.decode(errors="replace").splitlines()


def _event(line: str) -> str | None:
    for pattern, wording in _EVENTS.items():
        if found := pattern.search(line):
            return wording.format(found[1])
    return None


def _free_port() -> int:
    """A port of the loopback for the SuperNode and its own ClientApps."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
