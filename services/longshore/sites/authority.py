"""The certificate authority that a home site keeps: it says which certificates are rollout sites', and for how long.

Two files in a folder: `ca.crt`, which everybody may know, and `ca.key`, which is its owner's alone (mode 0600). They
are made here, or given: those of cert-manager's secret of a CA, say, have other names and the same content.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from longshore.errors import ConfigError
from longshore.sites.certificates import HOME_URI, new_key, now, private_pem, requested_key, site_uri

_AUTHORITY_DAYS = 3650
# Clocks of two sites differ.
_SKEW = timedelta(minutes=5)
_PEM = serialization.Encoding.PEM


class Authority:
    """Signs certificates of sites and of home's own servers."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key
        self.pem: bytes = certificate.public_bytes(_PEM)

    def __repr__(self) -> str:
        return f"Authority({self._certificate.subject.rfc4514_string()})"

    @staticmethod
    def open(folder: Path) -> Authority:
        """The authority of a folder, made there if the folder has none.

        Raises:
            ConfigError: the files cannot be read, written or used, or the key is open to everyone on the machine.
        """
        certificate_file, key_file = folder / "ca.crt", folder / "ca.key"
        try:
            if not certificate_file.exists() and not key_file.exists():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                made = Authority._generate()
                # The key last: whoever finds the certificate alone was cut off here, and is told so.
                certificate_file.write_bytes(made.pem)
                write_private(key_file, private_pem(made._key))
            if stat.S_IMODE(key_file.stat().st_mode) & 0o007:
                raise ConfigError(f"the authority's key {key_file} is open to every user: chmod 600 it")
            return Authority._load(certificate_file.read_bytes(), key_file.read_bytes(), folder)
        except OSError as error:
            raise ConfigError(f"authority {folder}: {error.filename}: {error.strerror}") from None

    def issue_site(self, site: str, request_pem: bytes, days: float) -> bytes:
        """A site's certificate in PEM, for a client alone. Raises Rejected: the request is unsound."""
        builder = self._builder(site, requested_key(request_pem), timedelta(days=days))
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(site_uri(site))])
        builder = builder.add_extension(names, critical=False)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        return self._sign(builder.add_extension(usage, critical=False)).public_bytes(_PEM)

    def issue_home(self, names: Sequence[str], days: float) -> tuple[bytes, bytes]:
        """A certificate for home's own processes, both servers and clients, and its key, in PEM.

        Args:
            names: host names and addresses under which others reach them.
        """
        key = new_key()
        builder = self._builder(names[0], key.public_key(), timedelta(days=days))
        general = [_general_name(name) for name in names]
        alternative = x509.SubjectAlternativeName([*general, x509.UniformResourceIdentifier(HOME_URI)])
        builder = builder.add_extension(alternative, critical=False)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        return self._sign(builder.add_extension(usage, critical=False)).public_bytes(_PEM), private_pem(key)

    @staticmethod
    def _generate() -> Authority:
        key = new_key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Longshore sites {secrets.token_hex(4)}")])
        builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now() - _SKEW).not_valid_after(now() + timedelta(days=_AUTHORITY_DAYS))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return Authority(builder.sign(key, hashes.SHA256()), key)

    @staticmethod
    def _load(certificate_pem: bytes, key_pem: bytes, folder: Path) -> Authority:
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            key = serialization.load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"authority {folder}: ca.crt and ca.key must be unencrypted PEM: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"authority {folder}: ca.key must be an elliptic key (P-256, say)")
        if certificate.public_key() != key.public_key():
            raise ConfigError(f"authority {folder}: ca.key is not the key of ca.crt")
        if certificate.not_valid_after_utc <= now():
            raise ConfigError(f"authority {folder}: ca.crt expired at {certificate.not_valid_after_utc.isoformat()}")
        return Authority(certificate, key)

    def _builder(self, name: str, key: ec.EllipticCurvePublicKey, life: timedelta) -> x509.CertificateBuilder:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        builder = x509.CertificateBuilder(self._certificate.subject, subject, key, x509.random_serial_number())
        # A certificate cannot outlive who vouches for it.
        until = min(now() + life, self._certificate.not_valid_after_utc)
        builder = builder.not_valid_before(now() - _SKEW).not_valid_after(until)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return builder.add_extension(issuer, critical=False)

    def _sign(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        return builder.sign(self._key, hashes.SHA256())


def write_private(path: Path, data: bytes) -> None:
    """Writes a file, mode 0600, whole or not at all; one that is there is replaced. Raises OSError."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise ConfigError(f"{name!r} is neither a host name nor an address") from None


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
