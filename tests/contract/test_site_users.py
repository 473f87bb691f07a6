"""A rollout site's user at the home broker: what a relay does is allowed, and no more than docs/security.md says.

A real broker whose default user has a password, as one that others reach has.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from redis.asyncio import Redis

from longshore.errors import ConfigError, Conflict, Unavailable
from longshore.relay.brokers import HomeQueues
from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import JobKeys
from longshore.rollout_queue.site_rules import user_rules
from longshore.rollout_queue.site_users import SiteUsers
from longshore.types import JobRef

PASSWORDS = {"west": "west-password", "east": "east-password"}
HOME_PASSWORD = "home-password"


class Closed:
    """A broker with a password, its sites' users, and the queues of a job of project `default` that has tickets."""

    def __init__(self, server: Any, connect: Callable[..., Redis], make_bench: Any) -> None:
        self.server = server
        self.connect = connect
        self.home = connect(f"unix://:{HOME_PASSWORD}@{server.socket}")
        self.bench = make_bench(self.home)
        self.users = SiteUsers(self.home)

    def site(self, site: str) -> Redis:
        return self.connect(f"unix://longshore-site-{site}:{PASSWORDS[site]}@{self.server.socket}", patience_s=0)

    def queues(self, site: str, job: JobRef | None = None) -> HomeQueues:
        return HomeQueues(self.site(site), job or self.bench.job, site, max_attempts=5, lease_ms=3_600_000, blobs=None)

    async def let_in(self, **projects: str | None) -> None:
        known = {site: (project, sha256(PASSWORDS[site])) for site, project in projects.items()}
        await self.users.keep(known)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
async def closed(private_broker: Any, connect: Callable[..., Redis], make_bench: Any) -> AsyncIterator[Closed]:
    private_broker.stop()
    with tempfile.TemporaryDirectory(prefix="ls-broker-") as folder:
        server = type(private_broker)(Path(folder))
        server.start("--requirepass", HOME_PASSWORD)
        made = Closed(server, connect, make_bench)
        await made.bench.issued(6)
        yield made
        server.stop()


async def test_a_relay_does_all_that_it_has_to(closed: Closed) -> None:
    await closed.let_in(west="default")
    await closed.bench.rollouts.reconcile(1, await broker.incarnation(closed.home), {})
    west = closed.queues("west")
    assert await west.incarnation() == await broker.incarnation(closed.home)
    first, second, third = await west.lease(3)
    assert {claim.ticket.ref.key for claim in await west.held()} == {"0.0", "0.1", "0.2"}
    assert await west.renew([(first, True), (second, False)]) == []
    assert await west.deliver_many([(first, b"one", False), (second, b"two", True)]) == [True, True]
    await west.reject(third, "prompt", "too long")
    (adopted,) = await west.adopt(["0.3"])
    assert await west.covered(["0.0", "1.9"]) == {"1.9"}
    assert await closed.bench.states() == {
        "delivered": 1,
        "awaiting_verdict": 1,
        "prompt": 1,
        "running": 1,
        "queued": 2,
    }
    # A lease that ran out is another site's to take, and a ticket without attempts left ends: both by a site's call.
    await closed.let_in(west="default", east=None)
    east = HomeQueues(closed.site("east"), closed.bench.job, "east", max_attempts=1, lease_ms=0, blobs=None)
    assert len(await east.lease(8)) == 2
    assert [claim.ticket.ref.key for claim in await east.lease(8)] == [adopted.ticket.ref.key]
    assert await east.lease(8) == []
    assert (await closed.bench.states())["attempts_exhausted"] == 3


async def refused(client: Redis, *command: str | int) -> bool:
    try:
        await client.execute_command(*command)
    except redis.exceptions.NoPermissionError:
        return True
    except redis.exceptions.ResponseError as error:
        raise AssertionError(f"{command}: allowed, and then {error}") from None
    return False


async def test_a_site_can_do_nothing_else(closed: Closed) -> None:
    await closed.let_in(west="default")
    west, keys = closed.site("west"), closed.bench.keys
    forbidden: list[tuple[str | int, ...]] = [
        # What other sites have made, and what people see of it.
        ("XRANGE", keys.rollouts, "-", "+"),
        ("XREADGROUP", "GROUP", "learner", "x", "STREAMS", keys.rollouts, ">"),
        ("XREAD", "STREAMS", keys.rollouts, "0"),
        ("XDEL", keys.rollouts, "1-0"),
        ("XTRIM", keys.rollouts, "MAXLEN", 0),
        ("XRANGE", keys.dead, "-", "+"),
        # New tickets, and what is the learner's alone.
        ("XADD", keys.tickets, "*", "key", "x"),
        ("GET", keys.epoch),
        ("SET", keys.epoch, 9),
        ("SET", keys.reconciled, "x"),
        ("SET", keys.command, "cancel"),
        ("XADD", keys.events, "*", "a", "b"),
        ("HGETALL", keys.live),
        ("DEL", keys.live),
        ("DEL", keys.tickets),
        *(
            ("FCALL", f"longshore_{broker.VERSION}_{name}", 1, keys.tickets, "home", 99, "x", 1)
            for name in ("issue", "acknowledge", "close", "open_epoch", "raise_epoch", "dead_letter", "reconcile")
        ),
        # The broker itself.
        *(("FUNCTION", *words) for words in (("LOAD", "#!lua name=x"), ("FLUSH",), ("LIST",))),
        ("EVAL", "return 1", 0),
        ("KEYS", "*"),
        ("SCAN", 0),
        ("FLUSHALL",),
        ("CONFIG", "GET", "requirepass"),
        ("ACL", "LIST"),
        ("CLIENT", "LIST"),
        ("MONITOR",),
        ("INFO", "clients"),
        ("SHUTDOWN",),
        ("REPLICAOF", "example.com", 6379),
        ("DUMP", keys.live),
        ("PUBLISH", "x", "y"),
    ]
    for command in forbidden:
        assert await refused(west, *command), command


@pytest.mark.parametrize(
    ("job", "site"),
    [(JobRef("other", "job-1"), "home"), (JobRef("default-2", "job-1"), "home"), (JobRef("default", "job-1"), "east")],
)
async def test_another_projects_jobs_and_another_sites_queue_are_out_of_reach(
    closed: Closed, job: JobRef, site: str
) -> None:
    """Each key of theirs, by each command that a site has on its own."""
    await closed.let_in(west="default")
    west, keys = closed.site("west"), JobKeys(job, site)
    for key in (keys.tickets, keys.leased, keys.rollouts, keys.live, keys.dead):
        for command in (
            ("XADD", key, "*", "a", "b"),
            ("XRANGE", key, "-", "+"),
            ("XDEL", key, "1-0"),
            ("XREADGROUP", "GROUP", "sites", "west", "STREAMS", key, ">"),
            ("XACK", key, "sites", "1-0"),
            ("XAUTOCLAIM", key, "sites", "west", 0, "0"),
            ("HMGET", key, "a"),
            ("HSET", key, "a", "b"),
            ("HDEL", key, "a"),
            ("HINCRBY", key, "a", 1),
            ("GET", key),
            ("DEL", f"{keys.ticket_prefix}0.0:journal"),
            ("FCALL", f"longshore_{broker.VERSION}_lease", 1, key, site),
        ):
            assert await refused(west, *command), command
    if site == "home":
        with pytest.raises(Unavailable, match="does not let us"):
            await closed.queues("west", job).lease(1)


async def test_who_is_ended_is_out_at_once(closed: Closed) -> None:
    await closed.let_in(west="default", east="default")
    west, east = closed.queues("west"), closed.queues("east")
    assert len(await west.lease(1)) == len(await east.lease(1)) == 1
    client = closed.site("west")
    await client.ping()
    connected = await closed.home.client_list()
    assert [item["user"] for item in connected].count("longshore-site-west") == 2
    await closed.let_in(east="default")
    assert not [item for item in await closed.home.client_list() if item["user"] == "longshore-site-west"]
    # To a relay home is away, not a reason to end: it has a spool to keep.
    with pytest.raises(Unavailable, match="refuses our credentials"):
        await west.lease(1)
    assert len(await east.lease(1)) == 1
    # A wrong password, and one that was another site's.
    with pytest.raises(ConfigError, match="refuses our credentials"), broker.reaching():
        await closed.connect(f"unix://longshore-site-east:x@{closed.server.socket}", patience_s=0).ping()


async def test_a_broker_that_forgot_its_users_is_told_again(closed: Closed) -> None:
    await closed.let_in(west="default")
    await closed.home.execute_command("ACL", "DELUSER", "longshore-site-west")
    await closed.home.execute_command("ACL", "SETUSER", "somebody-else", "on", "nopass")
    await closed.let_in(west="default")
    assert len(await closed.queues("west").lease(1)) == 1
    # Of a version of Longshore whose functions home does not have.
    await closed.home.function_flush()
    with pytest.raises(Unavailable, match="is it of our version"):
        await closed.queues("west").lease(1)
    # Users that are not ours stay.
    assert b"somebody-else" in await closed.home.execute_command("ACL", "USERS")
    # Of another project now, and with another password.
    PASSWORDS["west"], before = "another", PASSWORDS["west"]
    try:
        await closed.let_in(west="other")
        with pytest.raises(Unavailable, match="does not let us"):
            await closed.queues("west").lease(1)
    finally:
        PASSWORDS["west"] = before


async def test_users_are_no_limit_where_everybody_comes_in(redis: Redis, closed: Closed) -> None:
    await closed.users.check_closed()
    with pytest.raises(Conflict, match="give its default user a password"):
        await SiteUsers(redis).check_closed()


@pytest.mark.parametrize("project", ["*", "a*", "a/b", "a}", "a b", "a[b]"])
def test_a_projects_name_is_no_pattern(project: str) -> None:
    with pytest.raises(ValueError, match="not a project's name"):
        user_rules(project, "0" * 64)
