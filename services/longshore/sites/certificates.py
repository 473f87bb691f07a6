"""Who a certificate says that its owner is, and how its owner asks for one.

A rollout site's certificate bears the URI `longshore:site:NAME`; one of the home site's own processes bears
`longshore:home`. Knows nothing of connections.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from longshore.errors import ConfigError, Rejected

HOME_URI = "longshore:home"
_SITE_URI = "longshore:site:"
MAX_REQUEST_BYTES = 8 * 1024
_PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Certified:
    """What a certificate says. `site` is None for one that is no site's."""

    # In hex digits, which no JSON reader rounds.
    serial: str
    site: str | None
    is_home: bool
    # Unix seconds between which it is good.
    since: float
    expires_at: float
    pem: bytes


def read_certificate(pem: bytes) -> Certified:
    """The first certificate of a PEM file. Raises ConfigError: there is none, or it says that it is two sites'."""
    try:
        found = x509.load_pem_x509_certificate(pem)
        uris = _uris(found)
    except (ValueError, x509.DuplicateExtension) as error:
        raise ConfigError(f"not a certificate in PEM: {error}") from None
    sites = [uri.removeprefix(_SITE_URI) for uri in uris if uri.startswith(_SITE_URI)]
    if len(sites) > 1:
        raise ConfigError("the certificate names more than one site")
    since, expires_at = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
    site = sites[0] if sites else None
    is_home, data = HOME_URI in uris and site is None, found.public_bytes(_PEM)
    return Certified(f"{found.serial_number:040x}", site, is_home, since, expires_at, data)


def site_uri(site: str) -> str:
    return f"{_SITE_URI}{site}"


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8, unencrypted."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def make_request(site: str) -> tuple[bytes, bytes]:
    """A new private key and the request for its certificate, both PEM. The key never leaves whoever made it."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return private_pem(key), request.public_bytes(_PEM)


def requested_key(request_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request proves to be its sender's; what else it asks for is not looked at.

    Raises:
        Rejected: `request`: too large, not a request, of another kind of key than P-256, or not signed by it.
    """
    if len(request_pem) > MAX_REQUEST_BYTES:
        raise Rejected("request", f"a certificate request has at most {MAX_REQUEST_BYTES} bytes")
    try:
        request = x509.load_pem_x509_csr(request_pem)
        key, is_signed = request.public_key(), request.is_signature_valid
    except ValueError:
        raise Rejected("request", "the certificate request is not one in PEM (PKCS #10)") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Rejected("request", "a site's key is an elliptic one on the curve P-256")
    if not is_signed:
        raise Rejected("request", "the certificate request is not signed by its own key")
    return key


def now() -> datetime:
    return datetime.now(UTC)


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)
