"""The hospital's node key: how the coordinator knows that it speaks with this hospital.

ECDSA P-384 in OpenSSH format, as Flower's SuperNode reads it. The private half never leaves this
machine; the coordinator is handed the public half, as ``SITE.pub``.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from transport.processes import write_private


class NodeKeyError(RuntimeError):
    """The key file cannot be used; the message says why and what to do."""


def obtain(folder: Path, site: str) -> tuple[Path, Path]:
    """Paths of the private and the public key of ``site``, made at the first call.

    Raises
    ------
    NodeKeyError
        The private key is no ECDSA key in OpenSSH format, or others may read it.
    """
    private, public = folder / "node.key", folder / f"{site}.pub"
    if not private.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        write_private(
            private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        )
    key = _read(private)
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    public.write_bytes(line + f" {site}\n".encode())
    return private, public


def _read(path: Path) -> ec.EllipticCurvePrivateKey:
    if os.stat(path).st_mode & 0o077:
        raise NodeKeyError(f"{path} can be read by others: run chmod 600 on it")
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the last two: it has a password
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise NodeKeyError(
            f"{path} holds no ECDSA key without a password: move it away to have a new one made"
        )
    return key
