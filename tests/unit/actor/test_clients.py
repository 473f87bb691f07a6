"""Generate and Verify over real gRPC against scripted peers: what is repeated, what is final, what is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from processes import free_port
from scripted_peers import Peers, ScriptedGenerator, ScriptedVerifier, event

from longshore.actor import retry
from longshore.actor.clients import MAX_FAILED_REPLIES, GeneratorClient, VerifierClient
from longshore.actor.episode import AttemptFailed, Reply
from longshore.errors import Rejected, Unavailable
from longshore.proto.v1 import rollout_pb2, verdict_pb2
from longshore.rpc.channel import channel
from longshore.tasks.verification import ScoreRequest
from longshore.types import (
    EngineFingerprint,
    FinishReason,
    JobRef,
    KvMark,
    Message,
    Purpose,
    SampledSpan,
    Sampling,
    Task,
    Ticket,
    TicketRef,
    Verdict,
    VersionConstraint,
)

STOP, LENGTH, ABORTED = (
    rollout_pb2.FINISH_REASON_STOP,
    rollout_pb2.FINISH_REASON_LENGTH,
    rollout_pb2.FINISH_REASON_ABORTED,
)
TASK = Task("t", (Message("user", "3+4="),), answer="7", info={"level": 1})
TICKET = Ticket(
    TicketRef(JobRef("default", "j"), 3, 1),
    4,
    Purpose.TRAIN,
    TASK,
    Sampling(0.7, 8, (1,)),
    learner_epoch=1,
    issued_at=1.0,
    version=VersionConstraint(2, 5),
)
GOOD = (event([7, 1], 3, finish=STOP),)
Code = grpc.StatusCode


class Bench:
    """Clients with short pauses, and what they talk to."""

    def __init__(self, to_peers: grpc.aio.Channel, peers: Peers) -> None:
        self.channel = to_peers
        self.peers = peers
        self.retries = 0

    def retried(self) -> None:
        self.retries += 1

    async def generate(self, *scripts: object, patience_s: float = 20.0, timeout_s: float = 20.0) -> Reply:
        self.peers.generator.scripts = list(scripts)  # type: ignore[arg-type]
        client = GeneratorClient(self.channel, timeout_s, patience_s, self.retried)
        return await client.generate(TICKET, 2, [5, 6], TICKET.sampling, 4)

    async def verify(
        self, *answers: Code | float | None, patience_s: float = 20.0, timeout_s: float = 5.0
    ) -> Verdict | None:
        self.peers.verifier.answers = list(answers)
        client = VerifierClient(self.channel, timeout_s, patience_s, self.retried)
        conversation = [*TASK.messages, Message("assistant", "7")]
        return await client.verify(TICKET, 2, ScoreRequest(TASK, conversation, "7", [{"guess": 7}]))


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE_S", 0.05)
    peers = Peers(ScriptedGenerator(GOOD), ScriptedVerifier(1.0), free_port())
    await peers.start()
    async with channel(peers.address) as to_peers:
        yield Bench(to_peers, peers)
    await peers.stop()


async def test_a_request_says_what_the_ticket_says(bench: Bench) -> None:
    await bench.generate(GOOD)
    (request,) = bench.peers.generator.requests
    assert (request.job.project, request.job.job) == ("default", "j")
    assert list(request.token_ids) == [5, 6]
    assert (request.sampling.temperature, request.sampling.max_new_tokens) == (0.7, 8)
    assert list(request.sampling.stop_token_ids) == [1]
    assert (request.version.min_version, request.version.max_version) == (2, 5)
    assert request.prefix_key == "3"


async def test_neighbours_of_one_version_are_one_span(bench: Bench) -> None:
    carried = rollout_pb2.KV_MARK_CARRIED
    reply = await bench.generate(
        (
            event([7], 3),
            event([8, 9], 3, engine=False),
            event([10], 4, engine=False),
            event([11], 4, engine=False, kv=carried, oldest=3),
            event(finish=LENGTH, engine=False),
        )
    )
    assert reply.token_ids == [7, 8, 9, 10, 11]
    assert reply.spans == [
        SampledSpan(3, (-0.5, -0.5, -0.5)),
        SampledSpan(4, (-0.5,)),
        SampledSpan(4, (-0.5,), kv=KvMark.CARRIED, kv_min_version=3),
    ]
    assert (reply.finish, reply.engine) == (FinishReason.LENGTH, EngineFingerprint("scripted", "1", "float32", ""))


@pytest.mark.parametrize(
    "broken",
    [
        (Code.UNAVAILABLE,),
        (Code.RESOURCE_EXHAUSTED,),
        (event([7], 3), Code.UNAVAILABLE),
        (event([7], 3), Code.CANCELLED),
        (event([7], 3), Code.INTERNAL),
        (event([7], 3),),
        (event([7], 3, finish=ABORTED),),
        (event([7], 3, finish=STOP, engine=False),),
    ],
)
async def test_a_reply_that_breaks_off_is_drawn_anew(bench: Bench, broken: tuple[object, ...]) -> None:
    # Of a call that never began the channel itself repeats five.
    times = 6 if broken == (Code.UNAVAILABLE,) else 2
    reply = await bench.generate(*[broken] * times, GOOD)
    assert reply.token_ids == [7, 1]
    ids = [request.request_id for request in bench.peers.generator.requests]
    assert len(set(ids)) >= 2
    assert all(name.startswith("3.1/2/4/") for name in ids)
    assert bench.retries >= 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [(Code.INVALID_ARGUMENT, "prompt"), (Code.OUT_OF_RANGE, "prompt"), (Code.FAILED_PRECONDITION, "version")],
)
async def test_what_no_attempt_can_do_is_rejected(bench: Bench, code: Code, reason: str) -> None:
    with pytest.raises(Rejected, match=f"{reason}: scripted {code.name}"):
        await bench.generate((code,))
    assert len(bench.peers.generator.requests) == 1


async def test_a_generator_that_fails_on_a_request_is_not_asked_for_ever(bench: Bench) -> None:
    with pytest.raises(AttemptFailed, match="generator_failed: INTERNAL"):
        await bench.generate((Code.INTERNAL,))
    assert len(bench.peers.generator.requests) == MAX_FAILED_REPLIES


async def test_a_generator_that_stays_away(bench: Bench) -> None:
    await bench.peers.stop()
    with pytest.raises(Unavailable, match=r"away for .* generator: UNAVAILABLE"):
        await bench.generate(GOOD, patience_s=0.5)


async def test_a_generator_that_comes_back(bench: Bench) -> None:
    await bench.peers.stop()
    drawing = asyncio.create_task(bench.generate(GOOD))
    await asyncio.sleep(0.5)
    assert not drawing.done()
    await bench.peers.start()
    async with asyncio.timeout(20):
        assert (await drawing).token_ids == [7, 1]


async def test_a_reply_has_a_deadline(bench: Bench) -> None:
    with pytest.raises(Unavailable, match="DEADLINE_EXCEEDED"):
        await bench.generate((event([7], 3), 30.0), timeout_s=0.1, patience_s=0.3)


async def test_leaving_cancels_the_call(bench: Bench) -> None:
    drawing = asyncio.create_task(bench.generate((event([7], 3), 30.0)))
    async with asyncio.timeout(20):
        await bench.peers.generator.asked.wait()
        drawing.cancel()
        await bench.peers.generator.cancelled.wait()


async def test_a_verdict(bench: Bench) -> None:
    assert await bench.verify(0.5) == Verdict(0.5, "scripted@1")
    (request,) = bench.peers.verifier.requests
    assert (request.ref.group_id, request.ref.index, request.attempt) == (3, 1, 2)
    assert (request.task.answer, request.task.info_json, request.reply) == ("7", '{"level": 1}', "7")
    assert [(item.role, item.content) for item in request.conversation] == [("user", "3+4="), ("assistant", "7")]
    assert list(request.turn_info_json) == ['{"guess": 7}']
    assert request.role == verdict_pb2.VERDICT_ROLE_TRAIN


async def test_a_verdict_may_come_later(bench: Bench) -> None:
    assert await bench.verify(None) is None


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.INTERNAL])
async def test_one_failed_score_is_repeated(bench: Bench, code: Code) -> None:
    assert await bench.verify(code, 0.5) == Verdict(0.5, "scripted@1")


@pytest.mark.parametrize(
    ("code", "reason", "asked"),
    [
        (Code.INVALID_ARGUMENT, "verifier_refused", 1),
        (Code.DEADLINE_EXCEEDED, "verifier_timeout", 2),
        (Code.INTERNAL, "verifier_failed", 2),
    ],
)
async def test_a_reply_that_breaks_its_scorer_is_rejected(bench: Bench, code: Code, reason: str, asked: int) -> None:
    with pytest.raises(Rejected, match=f"{reason}: {code.name}: scripted"):
        await bench.verify(code)
    assert len(bench.peers.verifier.requests) == asked


async def test_a_verifier_that_does_not_answer_is_away_not_slow(bench: Bench) -> None:
    async def silence(request: object, context: object) -> None:
        await asyncio.sleep(30)

    bench.peers.verifier.Verify = silence  # type: ignore[method-assign, assignment]
    await bench.peers.stop()
    await bench.peers.start()
    # Our own deadline: the scorer was not at fault, so the rollout is not rejected.
    with pytest.raises(Unavailable, match="verifier: DEADLINE_EXCEEDED"):
        await bench.verify(1.0, patience_s=0.1, timeout_s=0.1)


async def test_a_verdict_that_is_no_number_is_rejected(bench: Bench) -> None:
    with pytest.raises(Rejected, match="not_finite"):
        await bench.verify(float("nan"))
