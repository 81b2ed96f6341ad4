"""Start and stop Flower's processes, the same way at the coordinator and at a hospital.

Flower starts each piece of work as a program that it looks up by name on ``PATH``. Both daemons use
this: ``shadow_commands`` puts a folder first on ``PATH`` that answers for every such name. One name
runs Wardround's own installed code; all others refuse. So what the other side sends can choose
which message is handled, never which code handles it.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

ROOT = Path(__file__).resolve().parent.parent
REFUSED = 77  # exit status of a refusing command
_KILL_S = 5.0  # a killed process is gone within

_SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONUNBUFFERED": "1",  # log lines appear when they are written
}


def private_folder(folder: Path) -> Path:
    """Make ``folder`` (mode 0700) and return its absolute path."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder.resolve()


def write_private(path: Path, content: bytes) -> None:
    """Write ``content`` to a new file that only its owner may read, from its first byte on.

    Raises
    ------
    FileExistsError
        A secret is never overwritten.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
        sink.write(content)


def shadow_commands(folder: Path, command: str, module: str, log: Path | None = None) -> Path:
    """Make ``folder`` answer for every program that Flower starts for a task.

    Parameters
    ----------
    folder
        Written anew; must come first on ``PATH`` (``environment`` does that).
    command, module
        The one program that runs, as ``python -m module``; every other one exits with ``REFUSED``.
    log
        Append the program's output here instead of passing it on.
    """
    known = set(TASK_TYPE_TO_COMMAND.values())
    if command not in known:
        raise RuntimeError(f"this release of Flower starts no program called {command}")
    private_folder(folder)
    run = (
        f"PYTHONPATH={shlex.quote(str(ROOT))} "
        f'exec {shlex.quote(sys.executable)} -P -m {module} "$@"'
    )
    if log is not None:
        run += f" >>{shlex.quote(str(log))} 2>&1"
    for name in known:
        refusal = f"echo 'wardround refuses to run {name}: it is not {command}' >&2; exit {REFUSED}"
        script = folder / name
        script.write_text(f"#!/bin/sh\n{run if name == command else refusal}\n", encoding="utf-8")
        script.chmod(0o700)
    return folder


def environment(home: Path, commands: Path, **extra: str) -> dict[str, str]:
    """Environment of Flower's processes: ``commands`` first on ``PATH``, ``home`` as FLWR_HOME."""
    programs = Path(sys.executable).parent  # Flower's own programs, also without an activated venv
    no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1", "localhost")))
    return {
        **os.environ,
        **_SETTINGS,
        "FLWR_HOME": str(home),
        "PATH": os.pathsep.join((str(commands), str(programs), os.environ.get("PATH", os.defpath))),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        **extra,
    }


def start(command: Sequence[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own, output appended to ``log``.

    Its own session keeps a Ctrl-C in the terminal from reaching it: the daemon decides what ends,
    and in which order.
    """
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes], grace_s: float = 10.0) -> None:
    """End ``process`` and all its descendants: politely, and by force after ``grace_s`` seconds."""
    family = _alive([psutil.Process(process.pid)] if process.poll() is None else [])
    if family:
        process.terminate()
    try:
        family = _wait_for_end(family, process, grace_s)
    finally:  # also when a second Ctrl-C cuts the waiting short
        for member in family:
            with suppress(psutil.NoSuchProcess):  # psutil checks that the pid was not given away
                member.kill()
        process.wait()
        _wait_for_end(family, process, _KILL_S)


def _wait_for_end(
    family: set[psutil.Process], leader: subprocess.Popen[bytes], seconds: float
) -> set[psutil.Process]:
    """Wait until all have ended; return those that had not in time."""
    deadline = time.monotonic() + seconds
    while family and time.monotonic() < deadline:
        leader.poll()  # reaps it, or it would stay on as a zombie
        time.sleep(0.1)
        family = _alive(family)
    return family


def _alive(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Those of ``processes`` that still run, and their descendants."""
    living = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            members = {process, *process.children(recursive=True)}
            living |= {m for m in members if m.status() != psutil.STATUS_ZOMBIE}
    return living


def log_to_stderr() -> None:
    """Logging of a program that runs in Flower's place: ours beside Flower's, each line once."""
    layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=layout)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per request otherwise
    logging.getLogger("flwr").propagate = False  # prints its own lines


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that both ways of ending a daemon clean up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
