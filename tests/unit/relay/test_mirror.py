"""A site's mirror against a home and a site that are made by hand: what is taken over, when, and what never is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from fake_weights import BROKEN, KEY, FakeHome, FakeSite, chunk, pointer, push, signed, step

from longshore.errors import Conflict, IntegrityError, NotFound, Rejected, Unavailable
from longshore.proto.v1 import weights_pb2
from longshore.relay import mirror as mirror_module
from longshore.relay.inflow import BUFFERED_CHUNKS
from longshore.relay.mirror import Mirror

WAIT_S = 10.0
DATA = b"the weights of one version"


class Bench:
    """A mirror that runs."""

    def __init__(self) -> None:
        self.home, self.site = FakeHome(), FakeSite()
        self.link: list[bool] = []
        self.faults = 0
        self.stop = asyncio.Event()
        self.mirror = Mirror(self.home, self.site, self.link.append, self._fault)
        self.task = asyncio.create_task(self.mirror.run(self.stop))

    def _fault(self) -> None:
        self.faults += 1

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """Lets everything happen that can happen by itself."""
        for _ in range(50):
            await asyncio.sleep(0)

    async def head(self, version: int) -> None:
        await self.until(lambda: self.site.pointers.get("head") == version)

    async def close(self) -> None:
        self.stop.set()
        await asyncio.wait_for(self.task, WAIT_S)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(mirror_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(mirror_module, "LONGEST_PAUSE_S", 0.002)
    monkeypatch.setattr(mirror_module, "COMMIT_S", 0.005)
    bench = Bench()
    yield bench
    await bench.close()


async def test_a_version_flows_through_while_it_comes_and_its_pointer_follows(bench: Bench) -> None:
    bench.home.say(push(signed(3), step(3, DATA)), chunk(DATA[:5]))
    await bench.until(lambda: bench.site.received.get(3) == DATA[:5])
    assert not bench.site.held
    bench.home.say(chunk(DATA[5:]), pointer(3))
    await bench.head(3)
    assert bench.site.held[3] == (signed(3), DATA)
    assert bench.home.fetched == []
    assert bench.site.ahead == [(3, True)]
    assert bench.faults == 0


async def test_home_is_told_what_the_site_has_and_asked_for_bytes_once(bench: Bench) -> None:
    bench.site.held = {1: (signed(1), b""), 2: (signed(2), b"")}
    bench.home.say(Unavailable("a restart"))
    await bench.until(lambda: len(bench.home.streams.get("head", ())) == 2)
    assert bench.home.streams["head"][1] == [2, 1]
    # One stream brings the bytes; the others tell of pointers alone.
    assert bench.home.streams["serving"] == [None]
    assert False in bench.link


async def test_a_version_whose_bytes_are_there_waits_for_homes_word(bench: Bench) -> None:
    bench.site.held[1] = (signed(1), b"")
    bench.home.say(push(signed(3), step(3, DATA)), chunk(DATA))
    await bench.until(lambda: bench.site.received.get(3) == DATA)
    # What the other streams say proves nothing.
    bench.home.say(pointer(1, name="serving"), pointer="serving")
    await bench.until(lambda: bench.site.pointers.get("serving") == 1)
    await bench.settle()
    assert 3 not in bench.site.held
    bench.home.say(BROKEN)
    await bench.until(lambda: bench.faults == 1)
    assert 3 not in bench.site.held
    # The number went to other weights.
    bench.home.say(push(signed(3, "other"), step(3, DATA[::-1])), chunk(DATA[::-1]), pointer(3))
    await bench.head(3)
    assert bench.site.held[3] == (signed(3, "other"), DATA[::-1])


async def test_the_next_version_confirms_the_one_before(bench: Bench) -> None:
    bench.home.say(push(signed(1), step(1, DATA)), chunk(DATA), push(signed(2), step(2, DATA[1:])))
    await bench.until(lambda: 1 in bench.site.held)
    assert 2 not in bench.site.held
    bench.home.say(chunk(DATA[1:]), pointer(2))
    await bench.head(2)


async def test_another_pointer_does_not_disturb_what_is_coming(bench: Bench) -> None:
    bench.site.held[1] = (signed(1), b"")
    bench.home.say(push(signed(3), step(3, DATA)), chunk(DATA[:5]))
    await bench.until(lambda: bench.site.received.get(3) == DATA[:5])
    bench.home.say(pointer(1, name="serving"), pointer="serving")
    await bench.until(lambda: bench.site.pointers.get("serving") == 1)
    # Nor is what comes already brought a second time.
    bench.home.put(signed(3), DATA)
    bench.home.say(pointer(3, 2, name="serving"), pointer="serving")
    await bench.settle()
    bench.home.say(chunk(DATA[5:]), pointer(3))
    await bench.head(3)
    await bench.until(lambda: bench.site.pointers.get("serving") == 3)
    assert bench.home.fetched == []


async def test_a_broken_stream_is_finished_from_where_it_broke(bench: Bench) -> None:
    bench.home.put(signed(3), DATA)
    bench.home.breaks_after = 8
    bench.home.say(push(signed(3), step(3, DATA)), chunk(DATA[:5]), Unavailable("cut"))
    await bench.until(lambda: 3 in bench.site.held)
    assert [offset for _, offset in bench.home.fetched] == [5, 13]
    assert bench.site.held[3] == (signed(3), DATA)
    assert bench.faults == 0


@pytest.mark.parametrize("received", [5, len(DATA)])
@pytest.mark.parametrize("published", ["nothing", "bytes alone", "another version"])
async def test_what_home_did_not_publish_is_given_up_when_the_stream_breaks(
    bench: Bench, received: int, published: str
) -> None:
    if published != "nothing":
        bench.home.put(signed(3, "other"), DATA)
    if published == "bytes alone":
        del bench.home.paths[3]
    bench.home.say(push(signed(3), step(3, DATA)), chunk(DATA[:received]), Unavailable("cut"))
    await bench.until(lambda: bench.faults == 1)
    await bench.until(lambda: len(bench.home.streams["head"]) == 2)
    assert not bench.site.held


async def test_home_may_still_commit_when_the_stream_breaks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "COMMIT_S", WAIT_S)
    bench.home.say(push(signed(3), step(3, DATA)), chunk(DATA), Unavailable("cut"))
    await bench.settle()
    bench.home.put(signed(3), DATA)
    await bench.until(lambda: 3 in bench.site.held)


async def test_a_site_that_cannot_take_a_version_holds_up_nothing(bench: Bench) -> None:
    """More chunks than are buffered: nobody takes them."""
    bench.site.refusals = [NotFound("the base cannot be read")]
    data = DATA * 20
    bench.home.put(signed(3), data)
    bench.home.say(push(signed(3), step(3, data, base=2)))
    bench.home.say(*(chunk(data[place : place + 10]) for place in range(0, len(data), 10)))
    assert len(data) / 10 > 2 * BUFFERED_CHUNKS
    bench.home.say(pointer(3))
    await bench.head(3)
    assert bench.site.held[3] == (signed(3), data)
    assert bench.faults == 1


async def test_a_wrong_byte_is_found_and_the_version_asked_for_anew(bench: Bench) -> None:
    bench.home.put(signed(3), DATA)
    bench.home.say(push(signed(3), step(3, DATA)), chunk(DATA[:-1] + b"\0"), pointer(3))
    await bench.head(3)
    assert bench.site.held[3] == (signed(3), DATA)
    assert bench.faults == 1


@pytest.mark.parametrize("sent", [DATA + b"more", DATA[:-1]])
async def test_too_many_or_too_few_bytes_are_a_fault(bench: Bench, sent: bytes) -> None:
    bench.home.put(signed(3), DATA)
    bench.home.say(push(signed(3), step(3, DATA)), chunk(sent), pointer(3))
    await bench.head(3)
    assert bench.site.held[3] == (signed(3), DATA)
    assert bench.faults == 1


async def test_a_delta_that_does_not_decode_is_replaced_by_an_anchor(bench: Bench) -> None:
    bench.site.held[2] = (signed(2), b"")
    delta, full = b"a delta", DATA
    path = bench.home.put(signed(3), full)
    told: list[list[int]] = []

    def way(have: object) -> weights_pb2.GetVersionResponse:
        told.append(list(have))  # type: ignore[call-overload]
        chosen = [step(3, delta, base=2)] if have else path
        return weights_pb2.GetVersionResponse(manifest=signed(3), path=chosen)

    bench.home.paths[3] = way
    bench.home.blobs[step(3, delta).encoding.sha256] = b"x delta"
    bench.home.say(pointer(3))
    await bench.head(3)
    assert told == [[2], []]
    assert bench.site.held[3] == (signed(3), full)
    assert bench.faults == 1


async def test_bytes_of_another_size_at_home_end_the_attempt(bench: Bench) -> None:
    bench.home.put(signed(3), DATA)
    bench.home.blobs[step(3, DATA).encoding.sha256] = DATA[:9]
    with pytest.raises(IntegrityError, match="another size"):
        await asyncio.wait_for(bench.mirror.bring(3), WAIT_S)
    assert not bench.site.held


async def test_a_path_of_several_encodings_crosses_the_link_once(bench: Bench) -> None:
    bench.site.held[1] = (signed(1), b"")
    path = bench.home.put(signed(3), b"first delta", b"second delta")
    bench.home.say(push(signed(3), *path), chunk(b"first delta"), chunk(b"second delta"))
    await bench.settle()
    assert bench.site.rebuilt == []
    bench.home.say(pointer(3))
    await bench.head(3)
    assert bench.site.rebuilt == [3]
    assert bench.home.fetched == []


async def test_a_path_of_several_encodings_is_finished_where_it_broke(bench: Bench) -> None:
    path = bench.home.put(signed(3), b"first delta", b"second delta")
    bench.home.say(push(signed(3), *path), chunk(b"first delta"), chunk(b"sec"), Unavailable("cut"))
    await bench.until(lambda: 3 in bench.site.held)
    assert bench.home.fetched == [(path[1].encoding.sha256[:4], 3)]
    assert bench.site.held[3] == (signed(3), b"first deltasecond delta")


async def test_who_asks_for_a_version_gets_it_and_several_cause_one_transfer(bench: Bench) -> None:
    bench.home.put(signed(7), DATA)
    await asyncio.wait_for(asyncio.gather(*(bench.mirror.bring(7) for _ in range(3))), WAIT_S)
    assert bench.site.held[7] == (signed(7), DATA)
    assert len(bench.home.fetched) == 1
    # Head does not name it: nobody is sent its bytes.
    assert bench.site.ahead == [(7, False)]
    with pytest.raises(NotFound):
        await asyncio.wait_for(bench.mirror.bring(8), WAIT_S)
    assert bench.faults == 0


async def test_before_an_adapter_its_base_is_brought_as_a_version_of_its_own(bench: Bench) -> None:
    (base,) = bench.home.put(signed(0), b"base")
    adapter = step(7, b"adapter", 0)
    adapter.encoding.kind = weights_pb2.ENCODING_KIND_ADAPTER
    bench.home.put(signed(7), b"adapter")
    told = weights_pb2.GetVersionResponse
    bench.home.paths[7] = lambda have: told(manifest=signed(7), path=[adapter] if 0 in have else [base, adapter])
    await asyncio.wait_for(bench.mirror.bring(7), WAIT_S)
    assert [version for version, _ in bench.site.ahead] == [0, 7]
    assert bench.site.held == {0: (signed(0), b"base"), 7: (signed(7), b"adapter")}
    assert bench.site.rebuilt == []


async def test_home_answers_with_another_version(bench: Bench) -> None:
    bench.home.put(signed(7), DATA)
    bench.home.paths[8] = bench.home.paths[7]
    with pytest.raises(IntegrityError, match="version 7, 8 was asked for"):
        await asyncio.wait_for(bench.mirror.bring(8), WAIT_S)
    assert not bench.site.held


async def test_a_home_that_stays_away_is_an_error_of_the_caller_and_no_end_of_the_mirror(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "BRING_S", 0.05)
    bench.home.put(signed(7), DATA)

    async def never(sha256: bytes, offset: int) -> AsyncIterator[bytes]:
        raise Unavailable("away")
        yield b""

    monkeypatch.setattr(bench.home, "fetch", never)
    with pytest.raises(Unavailable, match="version 7"):
        await asyncio.wait_for(bench.mirror.bring(7), WAIT_S)
    bench.home.say(pointer(7))
    await bench.until(lambda: len(bench.home.streams["head"]) >= 2)
    assert not bench.task.done()


async def test_stopping_waits_for_no_transfer(bench: Bench) -> None:
    bench.home.say(push(signed(3), step(3, DATA)), chunk(DATA[:5]))
    await bench.until(lambda: bench.site.received.get(3) == DATA[:5])
    bench.home.away = True
    bench.stop.set()
    await asyncio.wait_for(bench.task, 2.0)
    assert not bench.site.held


async def test_pointers_that_are_not_believed_are_passed_over(bench: Bench) -> None:
    bench.site.held[1] = (signed(1), b"")
    bench.home.say(pointer(1, key_id="stranger"))
    await bench.until(lambda: bench.faults == 1)
    for error in (Conflict("an old serial"), Rejected("expired", "an hour ago")):
        bench.site.point_error = error
        bench.home.say(pointer(1))
        await bench.until(lambda: bench.site.point_error is None)
    assert bench.site.pointers == {}
    bench.home.say(pointer(1))
    await bench.head(1)
    assert bench.faults == 3
    assert len(bench.home.streams["head"]) == 1


async def test_rubbish_for_a_pointer_ends_nothing(bench: Bench) -> None:
    rubbish = weights_pb2.WatchResponse(pointer=weights_pb2.SignedPointer(pointer=b"\xff\xff\xff", key_id=KEY))
    bench.home.say(rubbish)
    await bench.until(lambda: bench.faults == 1)
    bench.site.held[1] = (signed(1), b"")
    bench.home.say(pointer(1))
    await bench.head(1)


async def test_a_version_that_a_stranger_signed_is_not_taken(bench: Bench) -> None:
    bench.home.put(signed(3, key_id="stranger"), DATA)
    bench.home.say(push(signed(3, key_id="stranger"), step(3, DATA)), chunk(DATA), pointer(3))
    await bench.until(lambda: bench.faults >= 2)
    assert not bench.site.held
    assert bench.site.ahead == []
    # Tried again, because home may yet have the right one.
    bench.home.put(signed(3), DATA)
    bench.home.say(pointer(3))
    await bench.head(3)


async def test_a_new_key_is_asked_for_in_the_middle_of_a_stream(bench: Bench) -> None:
    await bench.until(lambda: bench.home.keys_asked == len(mirror_module.POINTERS))
    bench.home.keys_told.rotations.add(key_id="second")
    bench.home.say(push(signed(3, key_id="second"), step(3, DATA)), chunk(DATA), pointer(3, key_id="second"))
    await bench.head(3)
    # By a pointer as well, when nothing else bears the key.
    bench.home.keys_told.rotations.add(key_id="third")
    bench.home.say(pointer(3, 2, name="serving", key_id="third"), pointer="serving")
    await bench.until(lambda: bench.site.pointers.get("serving") == 3)
    assert bench.faults == 0
    assert len(bench.home.streams["head"]) == 1


async def test_assets_that_the_site_lacks_come_along(bench: Bench) -> None:
    bench.site.lacks = b"digest"
    bench.home.say(push(signed(3), step(3, DATA)), chunk(DATA), pointer(3))
    await bench.head(3)
    assert bench.site.assets[3] == b"assets of digest"


async def test_pointers_are_followed_once_and_not_without_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "MAX_POINTERS", 5)
    for name in ("head", "channel/a", "channel/a", "channel/b", "channel/c"):
        bench.mirror.follow(name)
    await bench.until(lambda: len(bench.home.streams) == 5)
    await bench.settle()
    assert {name: len(streams) for name, streams in bench.home.streams.items()} == dict.fromkeys(
        ("head", "serving", "pin/evaluated", "channel/a", "channel/b"), 1
    )


async def test_the_link_is_down_while_home_is_away(bench: Bench) -> None:
    bench.home.away = True
    bench.home.say(Unavailable("cut"))
    bench.home.say(Unavailable("cut"), pointer="serving")
    await bench.until(lambda: len(bench.link) > 2)
    assert set(bench.link) == {False}
    bench.home.away = False
    bench.home.say(weights_pb2.WatchResponse())
    await bench.until(lambda: bench.link[-1])
