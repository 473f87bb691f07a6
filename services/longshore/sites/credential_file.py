"""The one file that a rollout site's relay needs to reach home: `longshore site join` writes it.

It holds secrets (a private key, a password, an API key), so it is its owner's alone: mode 0600, or a mounted secret
that only the process's group may read.
"""

from __future__ import annotations

import stat
from pathlib import Path

import pydantic
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from longshore.config import NAME_PATTERN
from longshore.errors import ConfigError
from longshore.sites.authority import write_private
from longshore.sites.certificates import read_certificate

_MAX_BYTES = 256 * 1024


class SiteCredential(BaseModel):
    """Everything about one site that its relay is told by home."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str = Field(pattern=NAME_PATTERN)
    # The only project whose jobs the site may take part in; None: every one.
    project: str | None
    # host:port of home's weight store.
    weights: str = Field(min_length=1)
    # URL of home's broker, with the site's own name and password.
    broker_url: SecretStr
    # URL of home's REST API, and the key that renews this credential and can do nothing else.
    gateway: str
    api_key: SecretStr
    # PEM: the authorities that home's servers are known by, our certificate, its private key.
    authority: str
    certificate: str
    private_key: SecretStr

    def save(self, path: Path) -> None:
        """Writes the file, mode 0600; one that is there is replaced as a whole. Raises ConfigError."""
        plain = {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value
            for name, value in ((name, getattr(self, name)) for name in type(self).model_fields)
        }
        text = pydantic.TypeAdapter(dict[str, str | None]).dump_json(plain, indent=2)
        try:
            write_private(path, text + b"\n")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None

    @staticmethod
    def load(path: Path) -> SiteCredential:
        """Reads a file. Raises ConfigError: it is missing, malformed, or open to every user of the machine."""
        try:
            if stat.S_IMODE(path.stat().st_mode) & 0o007:
                raise ConfigError(f"site file {path} is open to every user: chmod 600 it")
            with path.open("rb") as file:
                text = file.read(_MAX_BYTES)
        except OSError as error:
            raise ConfigError(f"site file {path}: {error.strerror}") from None
        try:
            found = SiteCredential.model_validate_json(text)
        except pydantic.ValidationError as error:
            # Its values are secrets: only names are told.
            faults = "; ".join(
                f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}"
                for entry in error.errors(include_url=False, include_input=False)
            )
            raise ConfigError(f"site file {path}: {faults}") from None
        certified = read_certificate(found.certificate.encode())
        if certified.site != found.site:
            raise ConfigError(f"site file {path}: it is of site {found.site}, its certificate of {certified.site}")
        return found
