"""A job's learner as a generator sees it, and a client of the generator."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
import torch
from tiny_llama import canary_logprobs, config_json, published, tiny_model
from transformers import LlamaForCausalLM

from longshore.proto.v1 import generator_pb2, generator_pb2_grpc, job_pb2, sampling_pb2, ticket_pb2
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weights.client import CanaryProbe, VersionDraft, WeightsClient

SERVICE = "longshore.proto.v1.GeneratorService"
WAIT_S = 30.0
SLOTS = 4
CONTEXT = 2048
CANARY = (1, 2, 3, 4)
PROMPT = (3, 4, 5)
Code = grpc.StatusCode
CODES = {code.value[0]: code for code in Code}


class Store:
    """A job's weight store and its learner's part: a key, and models to publish."""

    def __init__(self, folder: Path, weights: str, **parts: object) -> None:
        """
        Args:
            parts: of the JobSpec.
        """
        self.folder = folder
        self.weights = weights
        self.job = JobRef("default", f"job-{uuid.uuid4().hex[:8]}")
        self.key = SigningKey.generate()
        self.models: dict[int, LlamaForCausalLM] = {}
        spec = {
            "name": self.job.job,
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "resources": {"generator_slots": SLOTS},
            **parts,
        }
        job_file = JobFile.model_validate(
            {"project": "default", "job": self.job.job, "spec": spec, "learner_public_key": self.key.public_key.hex()}
        )
        self.job_file = folder / f"{self.job.job}.json"
        self.job_file.write_text(job_file.model_dump_json())

    async def publish(self, *, canary: tuple[float, ...] | None = None, architecture: str = "LlamaForCausalLM") -> int:
        """Publishes the next version: other weights than every one before."""
        version = len(self.models)
        model = self.models[version] = tiny_model(version, context=CONTEXT)
        model.config.architectures = [architecture]
        tensors = published(model, torch.bfloat16)
        probe = CanaryProbe(CANARY, canary or canary_logprobs(model, CANARY))
        draft = VersionDraft(version, version, 1, None, (probe,), time.time())
        client = WeightsClient(self.weights, self.job, self.key.public_key)
        try:
            await client.register_key(keep=8)
            await client.publish(self.key, draft, tensors, {"config.json": config_json(model)})
        finally:
            await client.close()
        return version


class ReplyFailed(Exception):
    """A request ended with a failure, or its stream with a status."""

    def __init__(self, code: Code, message: str) -> None:
        self.code = code
        super().__init__(f"{code.name}: {message}")


class Started:
    """One request on a stream of its own. Raises ReplyFailed."""

    def __init__(self, stream: grpc.aio.StreamStreamCall, message: generator_pb2.GenerateRequest) -> None:
        self.stream = stream
        self._asking = asyncio.ensure_future(self._ask(message))
        self._events: list[generator_pb2.ReplyEvent] = []
        self._is_over = False

    async def _ask(self, message: generator_pb2.GenerateRequest) -> None:
        # What ends the stream early is seen where it is read.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self.stream.write(message)
            await self.stream.done_writing()

    def __aiter__(self) -> Started:
        return self

    async def __anext__(self) -> generator_pb2.ReplyEvent:
        if self._is_over:
            raise StopAsyncIteration
        event = await self.read()
        self._is_over = event.finish != 0
        return event

    async def read(self) -> generator_pb2.ReplyEvent:
        try:
            while not self._events:
                message = await self.stream.read()
                if message is grpc.aio.EOF:
                    raise ReplyFailed(await self.stream.code(), "the stream ended before the reply")
                self._events += message.events
        except grpc.aio.AioRpcError as error:
            raise ReplyFailed(error.code(), error.details() or "") from None
        event = self._events.pop(0)
        if event.HasField("failure"):
            raise ReplyFailed(CODES[event.failure.code], event.failure.message)
        return event

    def cancel(self) -> None:
        self.stream.cancel()


class Caller:
    """A client of the generator; built-in retries are off so that every status is seen."""

    def __init__(self, job: JobRef, address: str) -> None:
        self.job = job_pb2.JobRef(project=job.project, job=job.job)
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)])
        self.stub = generator_pb2_grpc.GeneratorServiceStub(self.channel)

    def request(
        self,
        prompt: tuple[int, ...] = PROMPT,
        *,
        tokens: int = 6,
        name: str | None = None,
        call: int = 0,
        version: tuple[int | None, int | None] | None = None,
        timeout: float | None = None,
        **sampling: object,
    ) -> generator_pb2.ReplyRequest:
        parameters = {"temperature": 1.0, "max_new_tokens": tokens, **sampling}
        bounds = ticket_pb2.VersionConstraint(min_version=version[0], max_version=version[1]) if version else None
        return generator_pb2.ReplyRequest(
            call=call,
            request_id=uuid.uuid4().hex if name is None else name,
            token_ids=prompt,
            sampling=sampling_pb2.SamplingParams(**parameters),  # type: ignore[arg-type]
            version=bounds,
            timeout_s=timeout,
        )

    def message(self, *requests: generator_pb2.ReplyRequest) -> generator_pb2.GenerateRequest:
        return generator_pb2.GenerateRequest(job=self.job, requests=requests)

    def start(self, *args: object, **options: object) -> Started:
        return self.send(self.message(self.request(*args, **options)))  # type: ignore[arg-type]

    def send(self, message: generator_pb2.GenerateRequest, **options: object) -> Started:
        return Started(self.stub.Generate(timeout=WAIT_S, **options), message)  # type: ignore[arg-type]

    async def reply(self, *args: object, **options: object) -> list[generator_pb2.ReplyEvent]:
        return [event async for event in self.start(*args, **options)]

    async def status(self) -> generator_pb2.GetStatusResponse:
        return await self.stub.GetStatus(generator_pb2.GetStatusRequest(job=self.job), timeout=WAIT_S)

    async def refusal(self, asked: generator_pb2.ReplyRequest | generator_pb2.GenerateRequest) -> Code:
        message = self.message(asked) if isinstance(asked, generator_pb2.ReplyRequest) else asked
        with pytest.raises(ReplyFailed) as caught:
            async for _ in self.send(message):
                pass
        return caught.value.code

    async def until_refused(self) -> None:
        """Until the generator takes no new call."""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while True:
                    await self.status()

    async def until(self, condition: Callable[[generator_pb2.GetStatusResponse], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition(await self.status()):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)


def tokens_of(events: list[generator_pb2.ReplyEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]
