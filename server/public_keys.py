"""The hospitals' public keys: one file ``NAME.pub`` each, in a folder the coordinator looks after.

A key in the folder is the coordinator's decision to let that hospital connect.
"""

from __future__ import annotations

import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class PublicKeyError(ValueError):
    """A file that is no hospital's key; the message names it."""


def read_public_key(path: Path) -> tuple[str, bytes]:
    """Name of the hospital, and its key as PEM (SubjectPublicKeyInfo).

    Raises
    ------
    PublicKeyError
        The file is no ECDSA P-384 key in OpenSSH format, or its name is no site name.
    """
    if not NAME.fullmatch(path.stem) or path.stem.casefold() == "global":
        raise PublicKeyError(f"{path}: rename it to SITE.pub, SITE being the hospital's name")
    try:
        key = load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        raise PublicKeyError(f"{path}: not an OpenSSH public key, ask the hospital again") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise PublicKeyError(f"{path}: not an ECDSA P-384 key, ask the hospital for its SITE.pub")
    return path.stem, key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
