"""The rollout sites' users at the home broker: made, kept, and ended with their connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis.exceptions
from redis.asyncio import Redis

from longshore.errors import Conflict
from longshore.rollout_queue import broker
from longshore.rollout_queue.site_rules import USER_PREFIX, user_name, user_rules


class SiteUsers:
    """By site the rules of its user. Every method raises BrokerLost when the broker stays away."""

    def __init__(self, client: Redis) -> None:
        self._redis = client
        # What this process has told the broker; a broker that restarts has forgotten it.
        self._told: dict[str, list[str]] = {}

    async def check_closed(self) -> None:
        """Raises Conflict: the broker lets in whoever comes without a password, so that users would be no limit."""
        found = await self._acl("GETUSER", "default")
        flags = {broker.text(flag) for flag in _flags(found)}
        if "on" in flags and "nopass" in flags:
            raise Conflict("the broker lets in whoever comes: give its default user a password, and join the site then")

    async def keep(self, sites: Mapping[str, tuple[str | None, str]]) -> None:
        """Has the broker know these sites, each with its project and its password's SHA-256, and no others.

        Who is ended loses its connections at once.
        """
        present = {broker.text(name) for name in await self._acl("USERS")}
        wanted = {user_name(site): user_rules(project, sha256) for site, (project, sha256) in sites.items()}
        strays = [name for name in present if name.startswith(USER_PREFIX) and name not in wanted]
        if strays:
            await self._acl("DELUSER", *strays)
        for name, rules in wanted.items():
            if name not in present or self._told.get(name) != rules:
                await self._acl("SETUSER", name, *rules)
        self._told = wanted

    # Any: redis-py types the replies of all protocols at once.
    async def _acl(self, *words: str) -> list[Any]:
        try:
            with broker.reaching():
                reply = await self._redis.execute_command("ACL", *words)  # type: ignore[no-untyped-call]
        except redis.exceptions.ResponseError as error:
            # Managed brokers may not let anybody make users.
            raise Conflict(f"the broker does not take ACL {words[0]}: {error}") from None
        return reply if isinstance(reply, list) else [reply]


def _flags(user: list[Any]) -> list[bytes]:
    """The flags of ACL GETUSER's reply, a map to some clients and a flat list to others."""
    record = user[0] if user and isinstance(user[0], dict) else dict(zip(user[::2], user[1::2], strict=False))
    found = record.get(b"flags", record.get("flags", []))
    return list(found) if isinstance(found, list | set | tuple) else []
