"""What a gRPC server shows its callers and asks of them, read anew when its files change.

Certificates are short-lived, and a home's first site may join at any time: no server is started again for either.
"""

from __future__ import annotations

from typing import Any

import grpc
import structlog

from longshore.errors import ConfigError
from longshore.rpc.channel import tls_file
from longshore.sites.book import SiteBook

log = structlog.get_logger()

# Certificate, key, and the authorities of callers; None: callers show nothing.
_Shown = tuple[bytes, bytes, bytes | None]


class ServerTls:
    """LONGSHORE_TLS_CERT, _KEY and _CA of this process, with the authority of its sites."""

    def __init__(self, shown: _Shown, sites: SiteBook | None) -> None:
        self._shown = shown
        self._sites = sites

    @staticmethod
    def from_environment(sites: SiteBook | None) -> ServerTls | None:
        """None: no certificate is set, so that there is no TLS. Raises ConfigError: a file cannot be read."""
        shown = _look(sites)
        return None if shown is None else ServerTls(shown, sites)

    @property
    def is_mutual(self) -> bool:
        """Whether callers must show a certificate."""
        return self._shown[2] is not None

    def credentials(self) -> grpc.ServerCredentials:
        """For add_secure_port; looks at the files with each handshake."""
        return grpc.dynamic_ssl_server_credentials(_configuration(self._shown), self._changed, self.is_mutual)

    # Any: gRPC's types leave out that None means: as before.
    def _changed(self) -> Any:
        """Called in gRPC's own threads."""
        try:
            shown = _look(self._sites)
        except ConfigError as error:
            # A secret that is just being replaced: what was right stays so.
            log.warning("certificates not read again", reason=str(error))
            return None
        if shown is None or shown == self._shown or (shown[2] is None and self.is_mutual):
            return None
        self._shown = shown
        log.info("certificates read")
        return _configuration(shown)


def _look(sites: SiteBook | None) -> _Shown | None:
    certificate, key = tls_file("LONGSHORE_TLS_CERT"), tls_file("LONGSHORE_TLS_KEY")
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("LONGSHORE_TLS_CERT and LONGSHORE_TLS_KEY are set together, or neither")
    ca = tls_file("LONGSHORE_TLS_CA")
    if ca is not None and sites is not None and sites.authority:
        ca += b"\n" + sites.authority
    return certificate, key, ca


def _configuration(shown: _Shown) -> grpc.ServerCertificateConfiguration:
    certificate, key, ca = shown
    return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)
