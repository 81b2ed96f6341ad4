"""The pinned programs: what they replace, what they refuse, and that they fail closed."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli import install
from flwr.cli.build import build_fab_from_files
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp as runtime

from client import pinned
from server.pinned import ForeignRunError, require_submitted
from server.superlink import APP

SECRET = "Mrs Example, born 1950"


@pytest.fixture
def pinned_runtime() -> Iterator[ModuleType]:
    names = ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn")
    before = {name: getattr(runtime, name) for name in names}
    source = install.install_from_fab
    pinned.pin()
    yield runtime
    for name, function in before.items():
        setattr(runtime, name, function)
    install.install_from_fab = source


@pytest.fixture(autouse=True)
def a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages and replies are made within a task, as in Flower's own processes."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def a_message() -> Message:
    content = RecordDict({"plan": ConfigRecord({"json": "{}"})})
    return Message(content=content, dst_node_id=1, message_type="train")


def a_context() -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def test_a_bundle_stays_packed(
    pinned_runtime: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    bundle = build_fab_from_files({"pyproject.toml": APP, "client/app.py": b"1 / 0"})[0]
    for unpack in (pinned_runtime.install_from_fab, install.install_from_fab):
        unpack(bundle, skip_prompt=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(pinned.PinError):
        pinned_runtime.install_app_dependencies(tmp_path)


def test_the_installed_application_answers(
    pinned_runtime: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WARDROUND_SITE", raising=False)
    monkeypatch.delenv("WARDROUND_SITES", raising=False)
    load = pinned_runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    app = load("someone/else", "6.6.6", "0" * 64)
    message = a_message()
    message.metadata.__dict__["_message_id"] = "1"
    reply = app(message=message, context=a_context())
    assert reply.content["refusal"]["code"] == "INTERNAL"  # client.app's own: no site policy is set


def test_no_text_of_an_exception_leaves(caplog: pytest.LogCaptureFixture) -> None:
    def app(message: Message, context: Context) -> Message:
        raise ValueError(SECRET)

    with pytest.raises(pinned.ClientFailure) as failure:
        pinned.guarded(app)(a_message(), a_context())
    assert SECRET not in f"{failure.value!r} {failure.value.__cause__} {failure.value.__context__}"
    assert SECRET not in caplog.text
    assert "ValueError at test_pinned.py:" in caplog.text


def test_another_release_of_flower_runs_nothing() -> None:
    with pytest.raises(pinned.PinError, match=r"1\.42\.0"):
        pinned.pin(flower="1.42.0")


def altered(body: str) -> ModuleType:
    module = ModuleType("altered")
    for name in ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn"):
        setattr(module, name, lambda *_: None)
    exec(f"def run_clientapp():\n    {body}", module.__dict__)
    return module


ALL_THREE = "install_from_fab(install_app_dependencies(get_load_client_app_fn()))"


@pytest.mark.parametrize(
    "body",
    [
        "install_from_fab()",  # the application comes from somewhere else
        f"{ALL_THREE}; load_app()",  # and also from somewhere else
        f"def inner(): exec('1')\n    {ALL_THREE}",
    ],
)
def test_a_message_loop_that_loads_code_otherwise_runs_nothing(body: str) -> None:
    with pytest.raises(pinned.PinError, match="unknown way"):
        pinned.pin(altered(body))


def test_a_message_loop_that_loads_code_as_known_is_bound() -> None:
    module = altered(ALL_THREE)
    source = install.install_from_fab
    pinned.pin(module)
    install.install_from_fab = source
    assert module.install_from_fab is pinned._leave_packed


def test_the_coordinators_bundle_carries_no_code() -> None:
    bundle = build_fab_from_files({"pyproject.toml": APP})[0]
    assert len(bundle) < 2000
    with zipfile.ZipFile(io.BytesIO(bundle)) as files:
        assert sorted(files.namelist()) == [".info/CONTENT", "pyproject.toml"]


def test_only_the_submitted_run_is_answered(tmp_path: Path) -> None:
    record = tmp_path / "submitted"
    with pytest.raises(ForeignRunError):
        require_submitted(7, record, wait_s=0.1)
    record.write_text("8")
    with pytest.raises(ForeignRunError, match="run 7 was not submitted"):
        require_submitted(7, record, wait_s=0.1)
    require_submitted(8, record, wait_s=0.1)


def test_the_serverapp_may_start_before_the_daemon_knows_the_run(tmp_path: Path) -> None:
    record = tmp_path / "submitted"

    def later() -> None:
        time.sleep(0.3)
        record.write_text("9")

    thread = threading.Thread(target=later)
    thread.start()
    require_submitted(9, record, wait_s=10)
    thread.join()
