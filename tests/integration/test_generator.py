"""The generator process over gRPC, following the real weight store."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import signal
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import torch
from generator_store import CONTEXT, PROMPT, SERVICE, SLOTS, WAIT_S, Caller, Code, ReplyFailed, Store, tokens_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import Service
from tiny_llama import VOCABULARY, reference_logprobs

from longshore.errors import ConfigError
from longshore.generator.config import GeneratorSettings
from longshore.generator.paged_decoder import PagedDecoder
from longshore.generator.service import serve
from longshore.proto.v1 import generator_pb2, rollout_pb2

# Takes seconds to draw: time enough for things to happen under a stream.
LONG = 1500
# A version that nobody publishes: who asks for it waits.
NEVER = 10**6


class Site:
    """A weight store process, and a generator process that follows a job on it. Lasts for all tests of this file."""

    def __init__(self, folder: Path) -> None:
        self.store_process = Service("weights", folder, store_url=(folder / "store").as_uri()).start()
        self.store = Store(folder, self.store_process.address)
        settings = {"job_file": self.store.job_file, "weights": self.store.weights}
        self.generator = Service("generator", folder, **settings, max_waiting=4, drain_s=WAIT_S).start()

    async def ready(self) -> None:
        """A test may run alone, or after one that ended the processes: whatever is missing is started."""
        for service in (self.store_process, self.generator):
            assert service.process is not None
            if service.process.poll() is not None:
                service.start()
        if not self.store.models:
            await self.store.publish()
        await asyncio.to_thread(self.generator.wait_serving, SERVICE)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://{self.generator.metrics_address}/metrics", timeout=WAIT_S) as page:
            found = re.search(rf"^{name}{{[^}}]*}} (\S+)$", page.read().decode(), re.M)
        return float(found[1]) if found else 0.0

    def stop(self) -> None:
        self.generator.stop()
        self.store_process.stop()


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("generator"))
    try:
        yield site
    finally:
        site.stop()


@pytest.fixture
async def site(whole_site: Site) -> Site:
    await whole_site.ready()
    return whole_site


@pytest.fixture
async def caller(site: Site) -> AsyncIterator[Caller]:
    caller = Caller(site.store.job, site.generator.address)
    yield caller
    await caller.channel.close()


async def test_a_short_reply_is_one_message_with_all_that_it_needs(site: Site, caller: Caller) -> None:
    (event,) = await caller.reply(temperature=0.7)
    assert len(event.token_ids) == 6
    assert (event.kv, event.HasField("kv_min_version")) == (rollout_pb2.KV_MARK_RECOMPUTED, False)
    assert event.finish == rollout_pb2.FINISH_REASON_LENGTH
    assert (event.engine.engine, event.engine.dtype) == ("torch-slots", "float32")
    expected = reference_logprobs(site.store.models[event.policy_version], PROMPT, list(event.token_ids), 0.7)
    torch.testing.assert_close(torch.tensor(list(event.logprobs)), expected, atol=1e-4, rtol=0)


async def test_a_stop_token_ends_the_reply(caller: Caller) -> None:
    events = await caller.reply(tokens=LONG, stop_token_ids=list(range(0, VOCABULARY, 2)))
    assert events[-1].finish == rollout_pb2.FINISH_REASON_STOP
    assert tokens_of(events)[-1] % 2 == 0


async def test_many_callers_at_once_are_all_answered(caller: Caller) -> None:
    # Slots and waiting places together.
    replies = await asyncio.gather(*(caller.reply((1 + number,)) for number in range(SLOTS + 4)))
    assert [len(tokens_of(events)) for events in replies] == [6] * (SLOTS + 4)


async def test_bad_requests_are_refused_and_good_ones_answered_after(caller: Caller) -> None:
    foreign, truncated, attached = caller.message(caller.request()), caller.request(), caller.request()
    foreign.job.job = "another"
    truncated.sampling.top_k = 5
    attached.attachments.add()
    bad = [
        caller.request(()),
        caller.request((1, VOCABULARY)),
        caller.request((1,) * CONTEXT),
        caller.request(tokens=0),
        caller.request(temperature=0.0),
        caller.request(temperature=float("nan")),
        caller.request(temperature=1e-30),
        caller.request(name=""),
        caller.request(version=(3, 2)),
        foreign,
        truncated,
        attached,
        caller.request(stop_token_ids=[1] * 1025),
        caller.request(name="n" * 257),
        caller.request(timeout=math.nan),
        # More than the context by far: refused by its length alone.
        caller.request((1,) * 3_000_000),
    ]
    assert [await caller.refusal(request) for request in bad] == [Code.INVALID_ARGUMENT] * len(bad)
    assert len(tokens_of(await caller.reply())) == 6


async def test_more_tokens_are_asked_for_than_there_can_be(caller: Caller) -> None:
    events = await caller.reply((1,) * (CONTEXT - 3), tokens=2**32 - 1)
    assert (len(tokens_of(events)), events[-1].finish) == (3, rollout_pb2.FINISH_REASON_LENGTH)


def peak_mb(service: Service) -> float:
    """The most memory that a process has had."""
    assert service.process is not None
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{service.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_huge_message_is_refused_unread(site: Site, caller: Caller, compression: grpc.Compression) -> None:
    """A quarter of a gigabyte: as it is, and as a quarter of a megabyte that unpacks to it."""
    before = peak_mb(site.generator)
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(site.generator.address, options=options) as channel:
        generate = channel.stream_stream("/longshore.proto.v1.GeneratorService/Generate")
        call = generate(once(bytes(256 * 1024 * 1024)), timeout=WAIT_S, compression=compression)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    assert peak_mb(site.generator) < before + 64
    assert len(tokens_of(await caller.reply())) == 6


@pytest.mark.parametrize(
    "metadata",
    [
        [("longshore-junk-bin", bytes(range(256)))],
        [("x-large", "a" * 100_000)],
        [(f"x-{number}", "many") for number in range(2000)],
        [("grpc-trace-bin", b"\xff" * 64), ("authorization", "Bearer ../../etc/passwd")],
    ],
)
async def test_hostile_metadata_harms_nobody(caller: Caller, metadata: list[tuple[str, str | bytes]]) -> None:
    call = caller.send(caller.message(caller.request()), metadata=metadata)
    with contextlib.suppress(ReplyFailed):
        async for _ in call:
            pass
    # Taken for nothing, or beyond gRPC's own bound.
    assert await call.stream.code() in (Code.OK, Code.RESOURCE_EXHAUSTED)
    assert len(tokens_of(await caller.reply())) == 6


async def test_bytes_that_are_no_request(site: Site, caller: Caller) -> None:
    generate = caller.channel.stream_stream("/longshore.proto.v1.GeneratorService/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in generate(once(b"\xff" * 1000), timeout=WAIT_S):
            pass
    assert caught.value.code() is Code.INTERNAL
    reader, writer = await asyncio.open_connection(*site.generator.address.split(":"))
    writer.write(b"GET / HTTP/1.1\r\n\r\n" + bytes(100_000))
    await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()
    assert len(tokens_of(await caller.reply())) == 6


async def test_an_id_that_is_running_is_refused(caller: Caller) -> None:
    waiting = asyncio.create_task(caller.reply(name="twice", version=(NEVER, None)))
    await caller.until(lambda status: status.waiting_requests == 1)
    assert await caller.refusal(caller.request(name="twice")) is Code.ALREADY_EXISTS
    waiting.cancel()
    await caller.until(lambda status: status.waiting_requests == 0)
    assert len(tokens_of(await caller.reply(name="twice"))) == 6


async def test_a_full_queue_refuses(caller: Caller) -> None:
    waiting = [asyncio.create_task(caller.reply(version=(NEVER, None))) for _ in range(SLOTS + 4)]
    await caller.until(lambda status: status.waiting_requests == SLOTS + 4)
    assert await caller.refusal(caller.request()) is Code.RESOURCE_EXHAUSTED
    for task in waiting:
        task.cancel()
    await caller.until(lambda status: status.waiting_requests == 0)


async def test_a_deadline_ends_a_wait(caller: Caller) -> None:
    assert await caller.refusal(caller.request(version=(NEVER, None), timeout=0.2)) is Code.DEADLINE_EXCEEDED
    await caller.until(lambda status: status.waiting_requests == 0)


async def test_a_deadline_ends_a_running_reply(caller: Caller) -> None:
    assert await caller.refusal(caller.request((1,), tokens=LONG, timeout=0.2)) is Code.DEADLINE_EXCEEDED
    await caller.until(lambda status: status.running_requests == 0)


async def test_callers_that_go_away_in_mid_stream_leave_nothing_behind(site: Site, caller: Caller) -> None:
    for _ in range(5):
        calls = [caller.start((1,), tokens=LONG) for _ in range(SLOTS)]
        await calls[0].read()
        for call in calls:
            call.cancel()
        # A cancellation reaches the generator in its own time, and until then the request keeps its place.
        await caller.until(lambda status: status.running_requests == status.waiting_requests == 0)
    # A whole connection that vanishes, its requests running and waiting.
    other = Caller(site.store.job, site.generator.address)
    calls = [other.start((1,), tokens=LONG) for _ in range(SLOTS + 2)]
    await calls[0].read()
    await other.channel.close()
    await caller.until(lambda status: status.running_requests == status.waiting_requests == 0)
    assert len(tokens_of(await caller.reply())) == 6


async def test_requests_of_one_stream_end_each_in_its_own_way(caller: Caller) -> None:
    stream = caller.stub.Generate(timeout=WAIT_S)
    await stream.write(
        caller.message(
            caller.request((1,), call=1, tokens=LONG),
            caller.request((2,), call=2),
            caller.request((), call=3),
            caller.request(call=4, version=(NEVER, None), timeout=0.2),
            caller.request(call=5, name="twice", version=(NEVER, None)),
            caller.request(call=6, name="twice"),
        )
    )
    ended: dict[int, int] = {}
    drawn: dict[int, int] = dict.fromkeys(range(1, 7), 0)
    while len(ended) < 4:
        for event in (await stream.read()).events:
            drawn[event.call] += len(event.token_ids)
            if event.finish or event.HasField("failure"):
                assert event.call not in ended
                ended[event.call] = event.finish or -event.failure.code
    refused = {3: Code.INVALID_ARGUMENT, 4: Code.DEADLINE_EXCEEDED, 6: Code.ALREADY_EXISTS}
    codes = {number: -code.value[0] for number, code in refused.items()}
    assert ended == {2: rollout_pb2.FINISH_REASON_LENGTH, **codes}
    assert [drawn[number] for number in range(2, 7)] == [6, 0, 0, 0, 0]
    # One that is drawn and one that waits are cancelled; what was on its way may still come, and then the stream ends.
    await stream.write(generator_pb2.GenerateRequest(job=caller.job, cancelled=[1, 5, 77]))
    await caller.until(lambda status: status.running_requests == status.waiting_requests == 0)
    await stream.write(caller.message(caller.request(call=1)))
    await stream.done_writing()
    rest = await rest_of(stream)
    assert (rest[-1].call, len(rest[-1].token_ids)) == (1, 6)
    assert await stream.code() is Code.OK


async def test_a_number_that_is_in_use_ends_the_stream(caller: Caller) -> None:
    twice = caller.message(caller.request((1,), tokens=LONG), caller.request())
    assert await caller.refusal(twice) is Code.INVALID_ARGUMENT
    await caller.until(lambda status: status.running_requests == status.waiting_requests == 0)


async def test_metrics_count_tokens(site: Site, caller: Caller) -> None:
    await caller.until(lambda status: status.running_requests == 0)
    before = site.metric("longshore_generator_tokens_total")
    await caller.reply()
    assert site.metric("longshore_generator_tokens_total") == before + 6
    assert site.metric("longshore_generator_decode_step_seconds_count") >= 6
    assert site.metric("longshore_generator_swap_seconds_count") >= 1


async def test_a_swap_while_streaming_gives_two_spans(site: Site, caller: Caller) -> None:
    old = (await caller.status()).policy_version
    stream = aiter(caller.start((1,), tokens=LONG))
    events = [await anext(stream)]
    new = await site.store.publish()
    events += [event async for event in stream]
    spans = list(dict.fromkeys((event.policy_version, event.kv, event.kv_min_version) for event in events))
    assert spans == [(old, rollout_pb2.KV_MARK_RECOMPUTED, 0), (new, rollout_pb2.KV_MARK_CARRIED, old)]
    # Who asks for the old version by number is answered by it: it is brought back beside the new one.
    pinned = [event async for event in caller.start((1,), tokens=4, version=(old, old))]
    assert {(event.policy_version, event.kv) for event in pinned} == {(old, rollout_pb2.KV_MARK_RECOMPUTED)}
    assert list((await caller.status()).resident_versions) == [new, old]
    # One that is still to come, and one that cannot be.
    assert await caller.refusal(caller.request(version=(NEVER, NEVER), timeout=0.5)) is Code.DEADLINE_EXCEEDED
    assert await caller.refusal(caller.request(version=(2**64 - 1, 2**64 - 1))) is Code.INVALID_ARGUMENT


async def test_a_version_that_fails_its_canary_is_not_served(site: Site, caller: Caller) -> None:
    old = (await caller.status()).policy_version
    bad = await site.store.publish(canary=(-0.1, -0.2, -0.3))
    async with asyncio.timeout(WAIT_S):
        while site.metric("longshore_generator_refused_versions_total") == 0:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    assert (await caller.reply())[0].policy_version == old
    new = await site.store.publish()
    await caller.until(lambda status: status.policy_version == new)
    # Who is pinned to it may find another generator that can prove it.
    assert await caller.refusal(caller.request(version=(bad, bad))) is Code.ABORTED


async def test_survives_the_death_of_the_store_and_its_own(site: Site, caller: Caller) -> None:
    newest = (await caller.status()).policy_version
    site.store_process.kill()
    assert len(tokens_of(await caller.reply())) == 6
    site.generator.kill()
    assert await caller.refusal(caller.request()) is Code.UNAVAILABLE
    # The generator comes back first and has to wait for the store.
    site.generator.start()
    await asyncio.to_thread(site.generator.wait_serving)
    # Our channel may still be backing off from the time without a server: it is the server's refusal that we want.
    await asyncio.wait_for(caller.channel.channel_ready(), WAIT_S)
    assert await caller.refusal(caller.request()) is Code.UNAVAILABLE
    site.store_process.start()
    await asyncio.to_thread(site.generator.wait_serving, SERVICE)
    assert (await caller.reply())[0].policy_version == newest
    new = await site.store.publish()
    await caller.until(lambda status: status.policy_version == new)


async def test_sigterm_lets_running_replies_finish_and_refuses_new_ones(site: Site, caller: Caller) -> None:
    # A stream whose caller may ask for more at any time, as an actor may.
    stream = caller.stub.Generate(timeout=WAIT_S)
    await stream.write(caller.message(caller.request((1,), tokens=LONG)))
    events = list((await stream.read()).events)
    assert site.generator.process is not None
    site.generator.process.send_signal(signal.SIGTERM)
    await caller.until_refused()
    await stream.write(caller.message(caller.request(call=1)))
    events += await rest_of(stream)
    assert await stream.code() is Code.OK
    assert [event.failure.code for event in events if event.call == 1] == [Code.UNAVAILABLE.value[0]]
    drawn = [event for event in events if event.call == 0]
    assert (len(tokens_of(drawn)), drawn[-1].finish) == (LONG, rollout_pb2.FINISH_REASON_LENGTH)
    assert await caller.refusal(caller.request()) is Code.UNAVAILABLE
    assert await asyncio.to_thread(site.generator.wait, WAIT_S) == 0


async def test_nothing_is_served_before_a_version_is_proven(whole_site: Site, tmp_path: Path) -> None:
    """In this process, on a job of its own."""
    store, address = Store(tmp_path, whole_site.store.weights), f"unix:{tmp_path}/generator.sock"
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(settings(store, address), stop))
    caller = Caller(store.job, address)
    assert not (await caller.status()).HasField("policy_version")
    assert await caller.refusal(caller.request()) is Code.UNAVAILABLE
    health = health_pb2_grpc.HealthStub(caller.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=WAIT_S)
    assert (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING
    await store.publish()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    assert len(tokens_of(await caller.reply())) == 6
    watch.cancel()
    stop.set()
    await asyncio.wait_for(serving, WAIT_S)
    await caller.channel.close()


async def test_an_unknown_model_ends_the_process(whole_site: Site, tmp_path: Path) -> None:
    store = Store(tmp_path, whole_site.store.weights)
    await store.publish(architecture="MambaForCausalLM")
    with pytest.raises(ConfigError, match=r"this model is MambaForCausalLM: set generator\.engine to vllm"):
        await asyncio.wait_for(serve(settings(store, f"unix:{tmp_path}/generator.sock"), asyncio.Event()), WAIT_S)


async def test_a_decode_thread_that_dies_ends_the_process(
    whole_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, address = Store(tmp_path, whole_site.store.weights), f"unix:{tmp_path}/generator.sock"
    await store.publish()
    serving = asyncio.create_task(serve(settings(store, address), asyncio.Event()))
    caller = Caller(store.job, address)
    await caller.until(lambda status: status.HasField("policy_version"))

    def fail(decoder: PagedDecoder) -> None:
        raise RuntimeError("the decoder is broken")

    monkeypatch.setattr(PagedDecoder, "decode", fail)
    call = caller.start()
    with pytest.raises(RuntimeError, match="the decoder is broken"):
        await asyncio.wait_for(serving, WAIT_S)
    with pytest.raises(ReplyFailed):
        await call.read()
    await caller.channel.close()


async def rest_of(stream: grpc.aio.StreamStreamCall) -> list[generator_pb2.ReplyEvent]:
    events: list[generator_pb2.ReplyEvent] = []
    while (message := await stream.read()) is not grpc.aio.EOF:
        events += message.events
    return events


async def once(message: bytes) -> AsyncIterator[bytes]:
    """What a caller sends, who then asks for no more."""
    yield message


def settings(store: Store, address: str) -> GeneratorSettings:
    return GeneratorSettings(listen=address, job_file=store.job_file, weights=store.weights)
