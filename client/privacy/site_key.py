"""The site's one secret, and the keys derived from it.

From 32 random bytes in a file that only its owner may read, HKDF-SHA-256 (RFC 5869) derives the
keys of the ledger's and the anchor's MACs and an Ed25519 key that signs statements. The secret is
made once. Where a ledger exists and its key does not, no new one is made: the new key would vouch
for entries that nobody can check.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from client.privacy import durable
from client.privacy.chain import LedgerError

_BYTES = 32


class SiteKey:
    """Keys of one site; ``secret`` is 32 bytes."""

    def __init__(self, secret: bytes) -> None:
        self._macs = {use: _derive(secret, use) for use in ("entry", "anchor")}
        self._signing = Ed25519PrivateKey.from_private_bytes(_derive(secret, "statement"))

    def mac_entry(self, digest: str) -> str:
        """HMAC-SHA-256, hex, of a ledger entry's hash."""
        return self._mac("entry", digest)

    def mac_anchor(self, text: str) -> str:
        """HMAC-SHA-256, hex, of what an anchor says."""
        return self._mac("anchor", text)

    def sign(self, content: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._signing.sign(content)

    @property
    def public(self) -> bytes:
        """Public half of the signing key, 32 bytes."""
        return self._signing.public_key().public_bytes_raw()

    def _mac(self, use: str, text: str) -> str:
        return hmac.new(self._macs[use], text.encode(), hashlib.sha256).hexdigest()


def obtain(path: Path, may_create: bool) -> SiteKey:
    """The key in the file ``path``; where there is none and ``may_create``, a new one.

    Raises LedgerError when it is missing, is no key, or others may read it.
    """
    if may_create and not path.exists():
        try:
            durable.create(path, os.urandom(_BYTES).hex().encode() + b"\n")
        except FileExistsError:
            pass  # another process was first
        except OSError as problem:
            raise LedgerError(f"{path}: the site key cannot be written ({problem})") from None
    return _read(path)


def trace(key: Path, ledger: Path) -> Path:
    """The file beside a key which tells that this ledger was begun with it."""
    name = hashlib.sha256(os.fsencode(ledger.absolute())).hexdigest()[:16]
    return key.with_name(f"{key.name}.{name}")


def leave_trace(file: Path, ledger: Path) -> None:
    """Make ``trace``'s file where it is not there. Raises LedgerError."""
    if file.exists():
        return
    try:
        durable.replace(file, b"begun: " + os.fsencode(ledger.absolute()) + b"\n")
    except OSError as problem:
        raise LedgerError(
            f"{file}: cannot be written ({problem}): it tells a ledger that was lost from one that "
            "was never begun"
        ) from None


def _read(path: Path) -> SiteKey:
    try:
        if path.stat().st_mode & 0o077:
            raise LedgerError(f"{path}: others can read the site key: run chmod 600 on it")
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        raise LedgerError(
            f"{path}: the site key of this ledger is missing: put it back from your backup. Until "
            "then nothing can be spent, and nothing that was spent is forgotten"
        ) from None
    except OSError as problem:
        raise LedgerError(f"{path}: the site key cannot be read ({problem})") from None
    except ValueError:
        secret = b""
    if len(secret) != _BYTES:
        raise LedgerError(f"{path}: holds no site key: put it back from your backup")
    return SiteKey(secret)


def _derive(secret: bytes, use: str) -> bytes:
    return HKDF(SHA256(), _BYTES, salt=None, info=f"wardround {use}".encode()).derive(secret)
