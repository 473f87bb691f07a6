"""A job's events and commands on the real broker."""

import asyncio

import pytest

from longshore.errors import Rejected
from longshore.rollout_queue import channel
from longshore.rollout_queue.channel import JobChannel


@pytest.fixture
def events(bench):
    return JobChannel(bench.redis, bench.job)


async def test_events_are_read_in_order_from_any_place(events):
    ids = [await events.publish({"type": "step", "step": step, "text": "ä"}) for step in range(5)]
    assert await events.read("0", 2, 0) == [
        (ids[0], {"type": "step", "step": 0, "text": "ä"}),
        (ids[1], {"type": "step", "step": 1, "text": "ä"}),
    ]
    assert [event["step"] for _, event in await events.read(ids[1], 100, 0)] == [2, 3, 4]
    assert await events.read(ids[4], 100, 20) == []


async def test_a_waiting_reader_gets_the_next_event(events):
    waiting = asyncio.create_task(events.read("0", 10, 5_000))
    await asyncio.sleep(0.05)
    await events.publish({"type": "state"})
    assert [event for _, event in await asyncio.wait_for(waiting, 4)] == [{"type": "state"}]


async def test_old_events_are_let_go(events, bench, monkeypatch):
    monkeypatch.setattr(channel, "MAX_EVENTS", 100)
    for number in range(500):
        await events.publish({"number": number})
    assert 100 <= await bench.redis.xlen(bench.keys.events) < 300
    assert (await events.read("0", 1000, 0))[-1][1] == {"number": 499}


async def test_events_are_bounded_and_plain_json(events):
    with pytest.raises(Rejected, match="oversized"):
        await events.publish({"text": "x" * 300_000})
    with pytest.raises(ValueError):
        await events.publish({"reward": float("nan")})
    assert await events.read("0", 10, 0) == []


async def test_the_newest_command_waits(events, bench):
    assert await events.pending_command() is None
    await events.command("pause")
    await events.command("cancel")
    assert await JobChannel(bench.redis, bench.job).pending_command() == "cancel"
