"""A hospital's key, made at the hospital, read by the coordinator and by Flower."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve

from client.node_key import NodeKeyError, obtain
from server.public_keys import PublicKeyError, read_public_key


def test_the_coordinator_reads_what_the_hospital_made(tmp_path: Path) -> None:
    private, public = obtain(tmp_path, "st-marys")
    name, pem = read_public_key(public)
    key = load_ssh_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert name == "st-marys"
    assert bytes_to_public_key(pem).public_numbers() == key.public_key().public_numbers()
    assert uses_nist_ec_curve(bytes_to_public_key(pem))


def test_the_private_key_is_private_and_lasts(tmp_path: Path) -> None:
    private, _ = obtain(tmp_path, "a")
    made = private.read_bytes()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert obtain(tmp_path, "a")[0].read_bytes() == made
    private.chmod(0o644)
    with pytest.raises(NodeKeyError, match="chmod 600"):
        obtain(tmp_path, "a")


def test_a_private_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    private, _ = obtain(tmp_path, "a")
    other = ed25519.Ed25519PrivateKey.generate()
    private.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    with pytest.raises(NodeKeyError, match="no ECDSA key"):
        obtain(tmp_path, "a")
    private.write_bytes(b"rubbish")
    with pytest.raises(NodeKeyError, match="no ECDSA key"):
        obtain(tmp_path, "a")


@pytest.mark.parametrize("problem", [TypeError("encrypted"), UnsupportedAlgorithm("no bcrypt")])
def test_a_private_key_with_a_password_is_refused(
    problem: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cryptography raises of one: with bcrypt installed, and without."""

    def locked(*_: object) -> None:
        raise problem

    obtain(tmp_path, "a")
    monkeypatch.setattr("client.node_key.load_ssh_private_key", locked)
    with pytest.raises(NodeKeyError, match="key without a password"):
        obtain(tmp_path, "a")


def test_what_is_no_hospital_key_is_refused_by_name(tmp_path: Path) -> None:
    weak = ec.generate_private_key(ec.SECP256R1()).public_key()
    files = {
        "rubbish.pub": b"rubbish",
        "weak.pub": weak.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        "two words.pub": obtain(tmp_path, "x")[1].read_bytes(),
        "Global.pub": obtain(tmp_path, "x")[1].read_bytes(),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(PublicKeyError, match=name):
            read_public_key(path)
