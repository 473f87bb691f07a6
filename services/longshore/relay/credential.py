"""Where a relay's home is, and what it shows there: from its settings, or from the file of `longshore site join`.

The file may be replaced while the relay runs, by a renewed one; what is connected anew from then on shows that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import structlog

from longshore.config import HOME_SITE
from longshore.errors import ConfigError
from longshore.relay.config import RelaySettings
from longshore.rpc.channel import ClientTls
from longshore.rpc.process import wait_or_stop
from longshore.sites.certificates import read_certificate
from longshore.sites.credential_file import SiteCredential

log = structlog.get_logger()

LOOK_S = 2.0
# With a third of its time left a credential should have been renewed.
_EXPIRING = 1 / 3
_WARN_S = 3600.0


@dataclass(frozen=True)
class Home:
    """The home site, as it is reached at a moment."""

    weights: str
    broker_url: str
    # Name and password at the broker; None: those of the URL.
    login: tuple[str, str] | None = None
    # What is shown to the weight store; None: what the environment says, as to everybody else.
    tls: ClientTls | None = None
    # Unix seconds between which the certificate is good; None: nobody says.
    since: float | None = None
    expires_at: float | None = None

    @property
    def authority(self) -> bytes | None:
        """PEM of who signed the certificate of home's broker; None: this machine's own list decides."""
        return self.tls.authority if self.tls is not None else None


class HomeAccess:
    """One relay's way home. `site`: the site's name."""

    def __init__(self, settings: RelaySettings) -> None:
        """Raises ConfigError: settings and file do not fit together, or the file cannot be used."""
        self._path = settings.site_file
        self._stamp: tuple[int, int] | None = None
        self._warned_at = 0.0
        if self._path is None:
            self.site, self.now = settings.site, _told(settings)
            return
        if settings.home_broker_url or settings.home_weights:
            raise ConfigError(
                "LONGSHORE_SITE_FILE says where home is: leave LONGSHORE_HOME_BROKER_URL and LONGSHORE_HOME_WEIGHTS out"
            )
        self._stamp = _stamp(self._path)
        credential = SiteCredential.load(self._path)
        if settings.site not in (HOME_SITE, credential.site):
            raise ConfigError(f"LONGSHORE_SITE {settings.site}: {self._path} is of site {credential.site}")
        self.site, self.now = credential.site, _home(credential)

    def login(self) -> tuple[str, str]:
        """Name and password for a connection to home's broker that is made now."""
        return self.now.login or ("", "")

    async def follow(
        self,
        stop: asyncio.Event,
        on_renewed: Callable[[], None],
        on_expiry: Callable[[float], None],
    ) -> None:
        """Looks for a renewed file until `stop`; one that cannot be used is passed over.

        Args:
            on_expiry: told again and again when the credential expires, in Unix seconds.
        """
        while not stop.is_set():
            if self._path is not None and await asyncio.to_thread(self._read_again, self._path):
                log.info("credential read again", site=self.site, expires_at=self.now.expires_at)
                on_renewed()
            if self.now.expires_at is not None:
                on_expiry(self.now.expires_at)
                self._warn_before(self.now.expires_at)
            await wait_or_stop(stop, LOOK_S)

    def _read_again(self, path: Path) -> bool:
        try:
            stamp = _stamp(path)
            if stamp == self._stamp:
                return False
            # Noted first: what cannot be used is said once.
            self._stamp = stamp
            credential = SiteCredential.load(path)
        except ConfigError as error:
            log.warning("credential not read again", reason=str(error))
            return False
        home = _home(credential)
        if credential.site != self.site or (home.weights, home.broker_url) != (self.now.weights, self.now.broker_url):
            log.error("credential not taken: it is of another site or home; start this relay anew", path=str(path))
            return False
        is_new, self.now = home != self.now, home
        return is_new

    def _warn_before(self, at: float) -> None:
        now = time.time()
        life = at - (self.now.since or now)
        if now >= self._warned_at and at - now < _EXPIRING * life:
            self._warned_at = now + _WARN_S
            hint = f"longshore site renew {self._path}"
            log.warning("credential expires soon", site=self.site, hours=round((at - now) / 3600.0, 1), renew=hint)


def _told(settings: RelaySettings) -> Home:
    names = ("home_broker_url", "home_weights")
    missing = [f"LONGSHORE_{name.upper()}" for name in names if not getattr(settings, name)]
    if missing:
        raise ConfigError(f"{' and '.join(missing)}: set them, or LONGSHORE_SITE_FILE to what `site join` wrote")
    return Home(settings.home_weights, settings.home_broker_url)


def _home(credential: SiteCredential) -> Home:
    certified = read_certificate(credential.certificate.encode())
    url = urlsplit(credential.broker_url.get_secret_value())
    # unix:// has no host, and its path must stay one.
    host = url.netloc.rpartition("@")[2]
    query = f"?{url.query}" if url.query else ""
    return Home(
        weights=credential.weights,
        broker_url=f"{url.scheme}://{host}{url.path}{query}",
        login=(unquote(url.username or ""), unquote(url.password or "")),
        tls=ClientTls(
            credential.authority.encode(),
            credential.certificate.encode(),
            credential.private_key.get_secret_value().encode(),
        ),
        since=certified.since,
        expires_at=certified.expires_at,
    )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"LONGSHORE_SITE_FILE {path}: {error.strerror}") from None
    return found.st_mtime_ns, found.st_ino
