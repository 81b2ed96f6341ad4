"""Certificates: real TLS handshakes on loopback, and every way in which they stop being good."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server.certificates import SERVER_LIFE, CertificateError, Certificates, obtain

HOSTS = ["localhost", "127.0.0.1"]


def handshake(server: Certificates, trusted: Path, name: str) -> str | None:
    """TLS version agreed on when a client that trusts ``trusted`` connects to ``name``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    client = ssl.create_default_context(cafile=str(trusted))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # what newer Pythons ask for
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            with context.wrap_socket(far, server_side=True) as tls:
                tls.recv(1)
        except (ssl.SSLError, OSError):
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(near, server_hostname=name) as tls:
            return tls.version()
    finally:
        near.close()
        thread.join()


@pytest.mark.parametrize("name", HOSTS)
def test_a_hospital_that_holds_ca_pem_can_connect(name: str, tmp_path: Path) -> None:
    made = obtain(tmp_path / "c", HOSTS)
    assert handshake(made, made.ca, name) == "TLSv1.3"


def test_a_server_of_another_authority_or_name_is_not_trusted(tmp_path: Path) -> None:
    made, other = obtain(tmp_path / "one", HOSTS), obtain(tmp_path / "two", HOSTS)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, other.ca, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, made.ca, "elsewhere.example")


def test_keys_are_private(tmp_path: Path) -> None:
    made = obtain(tmp_path / "c", HOSTS)
    for key in (made.key, made.ca.with_name("ca.key")):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700


def contents(made: Certificates) -> list[bytes]:
    return [path.read_bytes() for path in (made.ca, made.certificate, made.key)]


def test_good_certificates_are_used_again(tmp_path: Path) -> None:
    first = contents(obtain(tmp_path, HOSTS))
    assert contents(obtain(tmp_path, HOSTS[:1])) == first


def test_an_expired_certificate_is_renewed_by_hand_and_hospitals_keep_their_ca(
    tmp_path: Path,
) -> None:
    made = obtain(tmp_path, HOSTS)
    before = contents(made)
    later = datetime.now(UTC) + SERVER_LIFE + timedelta(days=1)
    with pytest.raises(CertificateError, match=r"server\.pem expired on .*: delete"):
        obtain(tmp_path, HOSTS, now=later)
    made.certificate.unlink()
    renewed = contents(obtain(tmp_path, HOSTS, now=later))
    assert renewed[0] == before[0]
    assert renewed[1:] != before[1:]


def test_an_expired_authority_says_that_hospitals_need_a_new_one(tmp_path: Path) -> None:
    obtain(tmp_path, HOSTS)
    with pytest.raises(CertificateError, match="give every hospital the new"):
        obtain(tmp_path, HOSTS, now=datetime.now(UTC) + timedelta(days=6 * 365))


def test_a_host_that_is_not_covered_is_named(tmp_path: Path) -> None:
    obtain(tmp_path, HOSTS)
    with pytest.raises(CertificateError, match=r"does not cover fl\.example"):
        obtain(tmp_path, [*HOSTS, "fl.example"])


def test_a_name_of_another_script_is_encoded_and_rubbish_is_told(tmp_path: Path) -> None:
    assert obtain(tmp_path / "one", [*HOSTS, "münchen.example"]).certificate.exists()
    with pytest.raises(CertificateError, match="is no host name"):
        obtain(tmp_path / "two", [*HOSTS, "a..b"])


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one, two = obtain(tmp_path / "1", HOSTS), obtain(tmp_path / "2", HOSTS)
    one.certificate.write_bytes(two.certificate.read_bytes())
    with pytest.raises(CertificateError, match="was not issued by"):
        obtain(tmp_path / "1", HOSTS)
    two.key.unlink()
    with pytest.raises(CertificateError, match=r"server\.key is missing"):
        obtain(tmp_path / "2", HOSTS)
    two.ca.write_text("no certificate")
    with pytest.raises(CertificateError, match="cannot be read"):
        obtain(tmp_path / "2", HOSTS)


def test_without_the_authority_key_nothing_can_be_issued(tmp_path: Path) -> None:
    made = obtain(tmp_path, HOSTS)
    made.ca.with_name("ca.key").unlink()
    assert obtain(tmp_path, HOSTS) == made  # a certificate from elsewhere needs no ca.key
    made.certificate.unlink()
    with pytest.raises(CertificateError, match="none can be issued"):
        obtain(tmp_path, HOSTS)
