"""The coordinator's own certificate authority, and the server certificate that it signs.

Hospitals are handed ``ca.pem`` once and trust nothing else. The authority lives for five years and
a server certificate for one, so that renewing the certificate changes nothing at the hospitals.
Keys are ECDSA P-384 in files that only their owner may read. What is there and still good is used
again; what is not is never replaced silently.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from transport.processes import private_folder, write_private

AUTHORITY_LIFE = timedelta(days=5 * 365)
SERVER_LIFE = timedelta(days=365)
_CLOCK_SKEW = timedelta(hours=1)  # a hospital's clock may run behind


class CertificateError(RuntimeError):
    """The certificates at hand cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files."""

    ca: Path  # the authority's certificate: public, for the hospitals
    certificate: Path
    key: Path


def obtain(folder: Path, hosts: Sequence[str], now: datetime | None = None) -> Certificates:
    """The certificates in ``folder``, made at the first call.

    Parameters
    ----------
    folder
        Holds ca.pem, ca.key, server.pem and server.key. A certificate from elsewhere may be put
        there under these names, without ca.key.
    hosts
        Host names and IP addresses by which the server is reached.
    now
        Time of day, UTC; None asks the clock.

    Raises
    ------
    CertificateError
        A certificate has expired, does not cover a host, or a file is missing or unreadable.
    """
    now = now or datetime.now(UTC)
    folder = private_folder(folder)
    paths = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    authority_key = folder / "ca.key"
    if not paths.ca.exists():
        _make_authority(paths.ca, authority_key, now)
    if not paths.certificate.exists():
        _make_server(paths, authority_key, hosts, now)
    _check(paths, hosts, now)
    return paths


def _make_authority(ca: Path, key_path: Path, now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Wardround coordinator authority")])
    certificate = (
        _builder(name, name, key.public_key(), key.public_key(), now, AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_pair(certificate, ca, key, key_path)


def _make_server(
    paths: Certificates, authority_key: Path, hosts: Sequence[str], now: datetime
) -> None:
    if not authority_key.exists():
        raise CertificateError(
            f"{paths.certificate} is missing, and without {authority_key.name} none can be issued"
        )
    signer = load_pem_private_key(authority_key.read_bytes(), None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{authority_key} holds no elliptic curve key")
    authority = _read(paths.ca)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Wardround coordinator")])
    certificate = (
        _builder(name, authority.subject, key.public_key(), signer.public_key(), now, SERVER_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_san(h) for h in hosts]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write_pair(certificate, paths.certificate, key, paths.key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    now: datetime,
    life: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )


def _usage(**granted: bool) -> x509.KeyUsage:
    every = [
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ]
    return x509.KeyUsage(**{name: granted.get(name, False) for name in every})


def _san(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        try:
            return x509.DNSName(host.encode("idna").decode("ascii"))
        except UnicodeError:
            raise CertificateError(f"server.names: {host!a} is no host name") from None


def _write_pair(
    certificate: x509.Certificate, path: Path, key: ec.EllipticCurvePrivateKey, key_path: Path
) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    key_path.unlink(missing_ok=True)  # of a certificate that was deleted to be renewed
    write_private(key_path, pem)
    path.write_bytes(certificate.public_bytes(Encoding.PEM))


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise CertificateError(f"{path} cannot be read as a PEM certificate") from None


def _check(paths: Certificates, hosts: Sequence[str], now: datetime) -> None:
    renew = f"delete {paths.certificate} to have a new one issued"
    ca, server = _read(paths.ca), _read(paths.certificate)
    if ca.not_valid_after_utc <= now:
        raise CertificateError(
            f"the authority {paths.ca} expired on {ca.not_valid_after_utc:%Y-%m-%d}: delete "
            f"{paths.ca.parent} and give every hospital the new ca.pem"
        )
    if server.not_valid_after_utc <= now:
        raise CertificateError(
            f"{paths.certificate} expired on {server.not_valid_after_utc:%Y-%m-%d}: {renew}"
        )
    if not paths.key.exists():
        raise CertificateError(f"{paths.key} is missing: {renew}")
    try:
        server.verify_directly_issued_by(ca)
    except Exception:  # three kinds, by what does not match
        raise CertificateError(f"{paths.certificate} was not issued by {paths.ca}") from None
    missing = [host for host in hosts if _san(host) not in _names(server)]
    if missing:
        raise CertificateError(f"{paths.certificate} does not cover {', '.join(missing)}: {renew}")


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return list(found.value)
