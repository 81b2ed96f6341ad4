"""Where the two daemons listen, connect and keep their own files.

These are settings of one machine. Nothing here travels in a message, and nothing here says what a
hospital is willing to do: that is the site policy (``conf.policy``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from conf.schema import Settings

Transport = Literal["tls", "insecure"]
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}")


def _address(text: str) -> str:
    if not _ADDRESS.fullmatch(text):
        raise ValueError("must be HOST:PORT")
    return text


Address = Annotated[str, AfterValidator(_address)]  # an IPv6 address in brackets


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

    server: Address  # of the coordinator
    transport: Transport
    certificate: Path | None  # the coordinator's ca.pem, handed over in person or by post
    state: Path  # node key, logs and Flower's files; private to the hospital

    @model_validator(mode="after")
    def _certificate_with_tls(self) -> ClientSettings:
        if self.transport == "tls" and self.certificate is None:
            raise ValueError("client.certificate must name the coordinator's ca.pem")
        return self
