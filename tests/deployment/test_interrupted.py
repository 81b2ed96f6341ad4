"""Both daemons on real Flower, interrupted: they tell what happens and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from rich.console import Console

from client import daemon as client_daemon
from client import node_key
from conf.commands import ServerCommand
from conf.deployment import ClientSettings, ServerSettings
from conf.load import load
from server import daemon as server_daemon
from server.run_folder import RunFolder
from server.superlink import SuperLink

if TYPE_CHECKING:
    from conftest import Loopback


@contextmanager
def sigterm_once(said: Callable[[], bool], seconds: float = 60) -> Iterator[None]:
    """Send SIGTERM to this process as soon as ``said`` holds, or when the time is over."""

    def watch() -> None:
        deadline = time.monotonic() + seconds
        while not said() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def flower_processes() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "flower" in " ".join(child.cmdline())
    ]


def test_the_coordinator_lets_hospitals_in_and_ends_in_order(
    loopback: Loopback, tmp_path: Path
) -> None:
    run = load("server", [f"run_dir={tmp_path / 'run'}"], ServerCommand)
    settings = ServerSettings(
        host="127.0.0.1", port=loopback.port, names=("fl.example",), transport="tls",
        state=loopback.state, sites=loopback.sites,
    )  # fmt: skip
    loopback.sites.mkdir()
    for site in ("east", "west"):
        shutil.copy(node_key.obtain(tmp_path, site)[1], loopback.sites)  # one key, two names
    (loopback.sites / "broken.pub").write_text("rubbish")
    said = loopback.said("server").open("w+")
    seen: list[str] = []

    def told() -> bool:
        text = loopback.said("server").read_text()
        if "west.pub" in text and not seen:
            with SuperLink(f"127.0.0.1:{loopback.port}", loopback.ca.read_bytes()) as link:
                run_id = link.submit()  # not by the daemon: nobody may run it
                seen.append(link.status(run_id).state)
                link.stop(run_id)
                seen.extend((link.status(run_id).state, *link.online()))
        return bool(seen)

    with sigterm_once(told), pytest.raises(KeyboardInterrupt):
        server_daemon.serve(settings, RunFolder(run.run_dir).create(run), Console(file=said))
    text = " ".join(loopback.said("server").read_text().split())
    assert f"certificate: {loopback.ca}" in text
    assert "east may connect" in text
    assert "west.pub: not registered (HTTP 412): is this key there already, under" in text
    assert "broken.pub: not an OpenSSH public key" in text
    assert seen[0] in ("pending", "starting", "running")
    assert seen[1:] == ["finished"]
    assert flower_processes() == []
    assert not loopback.answers()


def test_a_hospital_waits_for_its_coordinator_and_ends_in_order(
    loopback: Loopback, policies: list[Path], tmp_path: Path
) -> None:
    settings = ClientSettings(
        server=f"127.0.0.1:{loopback.port}", transport="insecure", certificate=None,
        state=tmp_path / "clients",
    )  # fmt: skip
    said = loopback.said("east").open("w+")
    away = "the coordinator does not answer"
    with sigterm_once(lambda: away in loopback.said("east").read_text()):
        client_daemon.serve(policies[0], settings, Console(file=said))
    text = loopback.said("east").read_text()
    assert "transport=insecure" in text
    assert text.count(away) == 1  # told once, however often it tries
    assert text.rstrip().endswith("stopped")
    assert flower_processes() == []
