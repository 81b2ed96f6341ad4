"""Starting, shadowing and ending processes, with real ones."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

from transport import processes

COMMANDS = sorted(set(TASK_TYPE_TO_COMMAND.values()))


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Environment in which ``flwr-clientapp`` is Python's own ``platform`` module."""
    folder = processes.shadow_commands(tmp_path / "commands", "flwr-clientapp", "platform")
    return processes.environment(tmp_path / "home", folder)


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("name", [c for c in COMMANDS if c != "flwr-clientapp"])
def test_every_other_program_that_flower_starts_for_a_task_refuses(
    name: str, env: dict[str, str]
) -> None:
    done = run([name, "--token", "x"], env)
    assert done.returncode == processes.REFUSED
    assert "refuses" in done.stderr


def test_the_one_program_runs_the_installed_module_with_its_arguments(env: dict[str, str]) -> None:
    done = run(["flwr-clientapp", "--terse"], env)
    assert done.returncode == 0
    assert sys.platform.capitalize() in done.stdout


def test_the_folder_a_program_is_started_in_adds_no_code(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "platform.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path)
    assert run(["flwr-clientapp"], env).returncode == 0


def test_output_goes_to_the_log_where_one_is_named(tmp_path: Path) -> None:
    log = tmp_path / "a log"
    folder = processes.shadow_commands(tmp_path / "c", "flwr-serverapp", "platform", log)
    done = run(["flwr-serverapp"], processes.environment(tmp_path, folder))
    assert (done.stdout, done.returncode) == ("", 0)
    assert log.read_text()


def test_a_program_that_flower_does_not_know_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="flwr-other"):
        processes.shadow_commands(tmp_path, "flwr-other", "platform")


def test_environment_keeps_flower_at_home_and_quiet(env: dict[str, str], tmp_path: Path) -> None:
    assert env["FLWR_HOME"] == str(tmp_path / "home")
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["PATH"].split(os.pathsep)[0] == str(tmp_path / "commands")
    assert "127.0.0.1" in env["NO_PROXY"].split(",")


def test_secrets_are_private_and_never_overwritten(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    processes.write_private(secret, b"one")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        processes.write_private(secret, b"two")
    assert secret.read_bytes() == b"one"


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print(child.pid, flush=True)
{then}
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("then", "grace_s"),
    [("", 0.5), ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)", 0.5)],
    ids=["obedient", "stubborn"],
)
def test_stop_ends_a_process_and_its_child(then: str, grace_s: float, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = PARENT.format(then=then)
    process = processes.start([sys.executable, "-c", code], log, dict(os.environ))
    while not log.read_text().endswith("\n"):
        time.sleep(0.05)
    time.sleep(0.2)
    child = psutil.Process(int(log.read_text()))
    assert os.getsid(process.pid) != os.getsid(0)  # Ctrl-C in the terminal does not reach it
    processes.stop(process, grace_s)
    assert process.returncode is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_stop_of_a_process_that_has_ended_is_harmless(tmp_path: Path) -> None:
    process = processes.start([sys.executable, "-c", ""], tmp_path / "log", dict(os.environ))
    process.wait()
    processes.stop(process)


def test_sigterm_ends_a_daemon_like_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), processes.sigterm_like_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
