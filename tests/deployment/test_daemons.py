"""Both daemons: what they refuse before anything starts, and what they tell a person."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from typing import cast

import httpx
import pytest
import yaml
from pydantic import ValidationError
from rich.console import Console

import wardround
from client import daemon as client_daemon
from client import node_key
from client.site import SiteError
from conf.commands import ClientCommand, ServerCommand
from conf.deployment import ClientSettings, ServerSettings
from conf.load import load
from server import daemon as server_daemon
from server.run_folder import RunFolder
from server.superlink import SuperLink


def client_settings(tmp_path: Path, **changes: object) -> ClientSettings:
    base = {"server": "127.0.0.1:9", "transport": "tls", "certificate": tmp_path / "ca.pem"}
    return ClientSettings.model_validate({**base, "state": tmp_path / "state", **changes})


def test_the_commands_compose() -> None:
    server = load("server", ["strategy=ffa", "federation.min_hospitals=7"], ServerCommand)
    assert server.server.host == "127.0.0.1"
    assert server.server.transport == "tls"
    assert server.server.sites == server.server.state / "sites"
    client = load("client", ["site=/etc/site.yaml", "client.server=fl.example:8443"], ClientCommand)
    assert client.site == Path("/etc/site.yaml")
    assert client.client.transport == "tls"


@pytest.mark.parametrize(
    "server", ["fl.example", "fl.example:", "http://fl.example:1", "a b:1", ""]
)
def test_an_address_without_host_and_port_is_refused(server: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        client_settings(tmp_path, server=server)


@pytest.mark.parametrize("server", ["fl.example:8443", "10.0.0.1:1", "[::1]:8443"])
def test_an_address_with_host_and_port_is_taken(server: str, tmp_path: Path) -> None:
    assert client_settings(tmp_path, server=server).server == server


def test_tls_needs_a_certificate_and_insecure_does_not(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="certificate"):
        client_settings(tmp_path, certificate=None)
    client_settings(tmp_path, certificate=None, transport="insecure")


def test_a_hospital_without_the_coordinators_certificate_is_told_so(
    policies: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(client_daemon.DaemonError, match=r"ask the coordinator for ca\.pem"):
        client_daemon.serve(policies[0], client_settings(tmp_path), Console(quiet=True))
    with pytest.raises(SiteError, match=r"absent\.yaml"):
        client_daemon.serve(
            tmp_path / "absent.yaml", client_settings(tmp_path), Console(quiet=True)
        )


def test_a_hospital_whose_notes_are_not_there_does_not_start(
    policies: list[Path], tmp_path: Path
) -> None:
    policy = yaml.safe_load(policies[0].read_text())
    policy["notes"]["path"] = "/nowhere"
    policies[0].write_text(yaml.safe_dump(policy))
    with pytest.raises(
        SiteError, match=r"east\.yaml: notes\.path=/nowhere: no such file or folder"
    ):
        client_daemon.serve(policies[0], client_settings(tmp_path), Console(quiet=True))
    assert not (tmp_path / "state").exists()


def test_a_hospital_connects_to_the_coordinator_of_its_policy_only(
    policies: list[Path], tmp_path: Path
) -> None:
    with policies[0].open("a") as policy:
        policy.write("coordinator: {address: 'fl.example:8443'}\n")
    for server, told in (
        ("fl.example:8444", r"client\.server=fl\.example:8444: .* fl\.example:8443 only"),
        ("fl.example:8443", r"ask the coordinator for ca\.pem"),  # one check further
    ):
        settings = client_settings(tmp_path, server=server)
        with pytest.raises(client_daemon.DaemonError, match=told):
            client_daemon.serve(policies[0], settings, Console(quiet=True))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("\x1b[92mINFO \x1b[0m:      SuperNode ID: 6468863935913660549", "connected"),
        ("INFO :      [RUN 13908877212405899198, ROUND 2]", "round 2"),
        ("INFO :      Sent successfully", "answer sent"),
        ("2026-11-21 10:17:23,941 WARNING client.app: east: refused: no", "east: refused: no"),
        ("[code: 2004] Failed to activate SuperNode.", "does not know this hospital's key"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "not the server"),
        ("INFO :      Received successfully", None),
    ],
)
def test_a_person_is_told_what_the_log_says(line: str, told: str | None) -> None:
    event = client_daemon._event(line)
    assert told in event if told and event else event is told


def test_only_whole_new_lines_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"old\nfirst\nsec")
    lines = client_daemon._NewLines(log, offset=4)
    assert list(lines) == ["first"]
    with log.open("ab") as file:
        file.write(b"ond\n\xff\n")
    assert list(lines) == ["second", "\N{REPLACEMENT CHARACTER}"]
    assert list(lines) == []


def test_attempts_become_rarer_up_to_one_a_minute() -> None:
    pauses = list(itertools.islice(client_daemon._pauses(), 8))
    assert pauses[0] == 2.0
    assert pauses == sorted(pauses)
    assert pauses[-2:] == [60.0, 60.0]


def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path) -> None:
    run = load("server", [f"run_dir={tmp_path / 'run'}"], ServerCommand)
    folder = RunFolder(run.run_dir).create(run)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = ServerSettings(
            host="127.0.0.1", port=port, names=(), transport="tls",
            state=tmp_path / "state", sites=tmp_path / "sites",
        )  # fmt: skip
        with pytest.raises(server_daemon.DaemonError, match=f"server.port={port}"):
            server_daemon.serve(settings, folder, Console(quiet=True))
    assert not (tmp_path / "state" / "certificates").exists()


@pytest.mark.parametrize(
    ("host", "reached"),
    [("0.0.0.0", "127.0.0.1:1"), ("::", "[::1]:1"), ("fl.example", "fl.example:1")],
)
def test_a_server_on_every_interface_is_reached_over_loopback(host: str, reached: str) -> None:
    assert server_daemon._local_address(host, 1)[1] == reached


class Registry:
    """Stands for the SuperLink where keys are registered."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def register(self, name: str, key: bytes) -> None:
        if name == "taken":
            request = httpx.Request("POST", "http://127.0.0.1")
            answer = httpx.Response(409, request=request)
            raise httpx.HTTPStatusError("conflict", request=request, response=answer)
        self.names.append(name)


def test_what_lies_among_the_keys_never_ends_a_federation(tmp_path: Path) -> None:
    sites, registry = tmp_path / "sites", Registry()
    sites.mkdir()
    door = server_daemon._Door(sites, cast(SuperLink, registry))
    public = node_key.obtain(tmp_path, "east")[1].read_bytes()
    (sites / "east.pub").write_bytes(public)
    assert door.admit() == ["east may connect"]
    (sites / ".#west.pub").symlink_to("somebody@host.1234")  # an editor's lock
    (sites / "East.pub").write_bytes(public)
    (sites / "taken.pub").write_bytes(public)
    case, taken = door.admit()
    assert case.endswith("East.pub: another hospital has this name but for its case")
    assert taken.endswith(
        "not registered (HTTP 409): is this key there already, under another name?"
    )
    assert door.admit() == []
    (sites / "west.pub").write_bytes(public)
    assert door.admit() == ["west may connect"]
    assert registry.names == ["east", "west"]


def test_a_run_that_is_finished_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"run_dir={tmp_path / 'run'}", "federation.rounds=1"]
    folder = RunFolder(tmp_path / "run").create(load("server", options, ServerCommand))
    folder.finish_round({"round": 1, "hospitals": []})
    assert wardround.main(["server", *options]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("all rounds are done; merged adapter: ")
    assert said.endswith("round-001/global")


def test_a_run_needs_a_name_that_hospitals_can_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wardround.main(["server", f"run_dir={tmp_path / 'my run'}"]) == 2
    assert "its last part names the run" in capsys.readouterr().err
    assert not (tmp_path / "my run").exists()
