"""The proxy of docs/deployment.md: hospitals take part through it, and reach nothing else."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from conf.load import FOLDER
from server.run_folder import RunFolder

if TYPE_CHECKING:
    from conftest import Loopback

NGINX = shutil.which("nginx")
DOCS = FOLDER.parent / "docs" / "deployment.md"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]


@pytest.fixture
def proxy(loopback: Loopback, tmp_path: Path) -> Iterator[int]:
    """The port of an nginx that is configured as the docs say; it starts with the certificates."""
    found = re.search(r"```nginx\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found
    port = loopback.free_port()
    server = found[1].replace("listen 443", f"listen 127.0.0.1:{port}")
    server = server.replace("127.0.0.1:8443", f"127.0.0.1:{loopback.port}")
    server = server.replace("/var/lib/wardround/server", str(loopback.state))
    config = tmp_path / "nginx.conf"
    own = f"pid {tmp_path}/nginx.pid; error_log {tmp_path}/nginx.log; daemon off;\nevents {{}}\n"
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(f"{own}http {{ access_log off;\n{temporary}{server}}}\n")
    made = loopback.ca.with_name("server.pem")  # the last to be written
    loopback.until(made.exists, 90, "certificate")
    assert NGINX is not None
    running = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(config)])
    loopback.until(lambda: _listens(port), 30, "proxy")
    yield port
    running.terminate()
    running.wait(timeout=30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def server(loopback: Loopback, tiny_model: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A coordinator of one round that waits for two hospitals."""
    return loopback.server(
        f"run_dir={tmp_path / 'run'}", "model=path", f"model.path={tiny_model}", "privacy=none",
        "adapter.rank=4", "privacy.max_tokens=32", "federation.rounds=1",
        "federation.timeout_s=200", "server.names=[coordinator.example]",
    )  # fmt: skip


def test_hospitals_take_part_through_the_proxy_and_nothing_else_is_reached(
    server: subprocess.Popen[bytes],
    proxy: int,
    loopback: Loopback,
    policies: list[Path],
    tmp_path: Path,
) -> None:
    trust = ssl.create_default_context(cafile=str(loopback.ca))
    refused = httpx.post(f"https://127.0.0.1:{proxy}/v1/control", verify=trust, trust_env=False)
    assert (refused.status_code, "nginx" in refused.text) == (404, True)
    asking = http.client.HTTPSConnection("127.0.0.1", proxy, context=trust)
    asking.putrequest("POST", "/v1/fleet/huge")
    asking.putheader("Content-Length", str(17 * 2**20))
    asking.endheaders()
    assert asking.getresponse().status == 413  # before a byte of it is sent
    asking.close()

    for policy in policies:
        loopback.client(policy, f"client.server=127.0.0.1:{proxy}")
        key = loopback.public_key(policy.stem)
        loopback.until(key.exists, 60, f"key of {policy.stem}")
        shutil.copy(key, loopback.sites)
    assert server.wait(timeout=300) == 0, loopback.said("server").read_text()
    (record,) = RunFolder(tmp_path / "run").finished_rounds()
    assert record["hospitals"] == ["east", "west"]
