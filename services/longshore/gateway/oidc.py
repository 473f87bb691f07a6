"""OIDC tokens in place of API keys: JWTs of one issuer, checked against the keys that it publishes (its JWKS).

Two claims say what the bearer may do: `longshore_role` (viewer, submitter, admin) and `longshore_project` (a project's
name, or `*` for every one). A token without them is nobody's.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

import jwt
import structlog
from jwt import PyJWK, PyJWKClient

from longshore.config import NAME_PATTERN
from longshore.errors import Unavailable
from longshore.gateway.principal import ROLES, Principal

log = structlog.get_logger()

ROLE_CLAIM, PROJECT_CLAIM = "longshore_role", "longshore_project"
EVERY_PROJECT = "*"
# Asymmetric ones alone: with others, the public key would be a secret that anybody knows.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
# Clocks that differ.
_LEEWAY_S = 30.0
_FETCH_TIMEOUT_S = 5.0
# Keys are asked for again after this, and sooner for an unknown one; but never more often than that.
_KEYS_S = 3600.0
_REFRESH_S = 30.0
MAX_TOKEN_CHARACTERS = 16 * 1024
_MAX_SUBJECT = 100


@dataclass(frozen=True)
class Issuer:
    """Whose tokens are taken. Example: Issuer("https://id.example.org/", "longshore", "https://id.example.org/jwks")"""

    issuer: str
    audience: str
    jwks_url: str


class Tokens:
    """The tokens of one issuer."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer
        self._client = PyJWKClient(issuer.jwks_url, cache_keys=False, cache_jwk_set=False, timeout=_FETCH_TIMEOUT_S)
        self._keys: dict[str, PyJWK] = {}
        # Monotonic seconds of the last try.
        self._asked_at = -_KEYS_S
        self._asking = asyncio.Lock()

    async def find(self, text: str) -> Principal | None:
        """Whose token a text is; None: it is none, or cannot be used (any more).

        Raises:
            Unavailable: the issuer's keys cannot be had, and none are known.
        """
        if text.count(".") != 2 or len(text) > MAX_TOKEN_CHARACTERS:
            return None
        try:
            key = await self._key(str(jwt.get_unverified_header(text).get("kid")))
            if key is None:
                return None
            claims = jwt.decode(
                text,
                key,
                algorithms=ALGORITHMS,
                audience=self._issuer.audience,
                issuer=self._issuer.issuer,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "sub"]},
            )
        except jwt.PyJWTError as error:
            log.info("token refused", reason=str(error))
            return None
        return _principal(claims)

    async def _key(self, key_id: str) -> PyJWK | None:
        async with self._asking:
            age = time.monotonic() - self._asked_at
            if age > _KEYS_S or (key_id not in self._keys and age > _REFRESH_S):
                self._asked_at = time.monotonic()
                await self._fetch()
            if not self._keys:
                raise Unavailable("the issuer's keys cannot be had now; an API key would do")
            return self._keys.get(key_id)

    async def _fetch(self) -> None:
        """Asks for the issuer's keys; those that are known stay in use while it does not answer."""
        try:
            found = await asyncio.to_thread(self._client.get_signing_keys)
        except (jwt.PyJWTError, ValueError, OSError) as error:
            # What is no JSON, and an answer that breaks off, pass through PyJWT's own errors.
            log.warning("keys of the issuer not had", url=self._issuer.jwks_url, reason=str(error))
            return
        self._keys = {key.key_id: key for key in found if key.key_id}


def _principal(claims: dict[str, object]) -> Principal | None:
    role, project = claims.get(ROLE_CLAIM), claims.get(PROJECT_CLAIM)
    subject = str(claims["sub"]).encode("ascii", "backslashreplace").decode()[:_MAX_SUBJECT]
    if not isinstance(role, str) or role not in ROLES or not isinstance(project, str):
        return None
    if project == EVERY_PROJECT:
        return Principal(f"oidc:{subject}", None, ROLES[role])
    if not re.fullmatch(NAME_PATTERN, project):
        return None
    return Principal(f"oidc:{subject}", project, ROLES[role])
