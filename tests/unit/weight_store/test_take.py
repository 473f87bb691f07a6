"""A mirror's publish: proven first, then confirmed, then written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from weight_parcels import JOB, KEY, Bench, full_parcel, history

from longshore.errors import IntegrityError, Unavailable
from longshore.weight_store import servicer as servicer_module
from longshore.weight_store.servicer import WeightsServicer

WAIT_S = 10.0
PARCEL = full_parcel(1, history(2)[1])


def bench() -> tuple[Bench, WeightsServicer]:
    made = Bench()
    store = made.restarted(mirror=True)
    store.register_key(JOB, KEY.public_key, keep=2)
    return made, WeightsServicer(store, None)


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_nothing_is_written_before_the_version_is_confirmed() -> None:
    made, servicer = bench()
    asked, confirmed = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        asked.set()
        await confirmed.wait()

    data = b"".join(PARCEL.parts)
    taking = asyncio.create_task(servicer.take(PARCEL.header, chunks(data), heads=True, confirmed=wait))
    await asyncio.wait_for(asked.wait(), WAIT_S)
    assert made.numbers() == []
    assert not [item for item in made.objects.list("") if "/blobs/" in item.path]
    confirmed.set()
    assert await asyncio.wait_for(taking, WAIT_S) is False
    assert made.numbers() == [1]


async def test_what_refuses_to_confirm_stops_the_publish() -> None:
    made, servicer = bench()

    async def refuse() -> None:
        raise Unavailable("home took it back")

    with pytest.raises(Unavailable, match="took it back"):
        await servicer.take(PARCEL.header, chunks(b"".join(PARCEL.parts)), heads=True, confirmed=refuse)
    assert made.numbers() == []


async def test_a_version_that_nobody_confirms_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer_module, "_CONFIRM_S", 0.02)
    made, servicer = bench()
    with pytest.raises(Unavailable, match="version 1 was not confirmed"):
        await servicer.take(
            PARCEL.header,
            chunks(b"".join(PARCEL.parts)),
            heads=True,
            confirmed=asyncio.Event().wait,  # type: ignore[arg-type]
        )
    assert made.numbers() == []


async def test_what_cannot_be_proven_is_not_asked_about() -> None:
    made, servicer = bench()
    data = bytearray(b"".join(PARCEL.parts))
    data[-1] ^= 1

    async def never() -> None:
        raise AssertionError("asked whether rubbish was published")

    with pytest.raises(IntegrityError):
        await servicer.take(PARCEL.header, chunks(bytes(data)), heads=True, confirmed=never)
    assert made.numbers() == []
