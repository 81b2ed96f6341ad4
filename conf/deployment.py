"""Where the two daemons listen, connect and keep their own files.

These are settings of one machine. Nothing here travels in a message, and nothing here says what a
hospital is willing to do: that is the site policy (``conf.policy``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from conf.schema import Settings

Transport = Literal["tls", "insecure"]
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}")


def is_address(text: str) -> bool:
    """Whether ``text`` is HOST:PORT."""
    return _ADDRESS.fullmatch(text) is not None


class ServerSettings(Settings):
    """The coordinator's machine."""

    host: Annotated[str, Field(min_length=1)]  # address to listen on
    port: Annotated[int, Field(ge=1, le=65535)]
    names: tuple[str, ...]  # further host names and addresses by which hospitals reach this server
    transport: Transport
    state: Path  # certificates, secret and logs; private to the coordinator
    sites: Path  # folder of the hospitals' public keys, one NAME.pub each


class ClientSettings(Settings):
    """The hospital's machine."""

    server: str  # HOST:PORT of the coordinator; an IPv6 address in brackets
    transport: Transport
    certificate: Path | None  # the coordinator's ca.pem, handed over in person or by post
    state: Path  # node key, logs and Flower's files; private to the hospital

    @model_validator(mode="after")
    def _server_is_an_address(self) -> ClientSettings:
        if not is_address(self.server):
            raise ValueError(f"client.server={self.server}: must be HOST:PORT")
        return self

    @model_validator(mode="after")
    def _certificate_with_tls(self) -> ClientSettings:
        if self.transport == "tls" and self.certificate is None:
            raise ValueError("client.certificate must name the coordinator's ca.pem")
        return self
