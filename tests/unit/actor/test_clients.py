"""Verify over real gRPC against a scripted verifier: what is repeated, what is final."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from processes import free_port
from scripted_peers import Peers, ScriptedGenerator, ScriptedVerifier

from longshore.actor import retry
from longshore.actor.clients import VerifierClient
from longshore.errors import Rejected, Unavailable
from longshore.proto.v1 import verdict_pb2
from longshore.rpc.channel import channel
from longshore.tasks.verification import ScoreRequest
from longshore.types import (
    JobRef,
    Message,
    Purpose,
    Sampling,
    Task,
    Ticket,
    TicketRef,
    Verdict,
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
)
Code = grpc.StatusCode


class Bench:
    """Clients with short pauses, and what they talk to."""

    def __init__(self, to_peers: grpc.aio.Channel, peers: Peers) -> None:
        self.channel = to_peers
        self.peers = peers
        self.retries = 0

    def retried(self) -> None:
        self.retries += 1

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
    peers = Peers(ScriptedGenerator(()), ScriptedVerifier(1.0), free_port())
    await peers.start()
    async with channel(peers.address) as to_peers:
        yield Bench(to_peers, peers)
    await peers.stop()


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
