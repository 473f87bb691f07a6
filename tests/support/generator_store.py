"""A job's learner as a generator sees it, and a client of the generator."""

from __future__ import annotations

import asyncio
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
        version: tuple[int | None, int | None] | None = None,
        **sampling: object,
    ) -> generator_pb2.GenerateRequest:
        parameters = {"temperature": 1.0, "max_new_tokens": tokens, **sampling}
        bounds = ticket_pb2.VersionConstraint(min_version=version[0], max_version=version[1]) if version else None
        return generator_pb2.GenerateRequest(
            job=self.job,
            request_id=uuid.uuid4().hex if name is None else name,
            token_ids=prompt,
            sampling=sampling_pb2.SamplingParams(**parameters),  # type: ignore[arg-type]
            version=bounds,
        )

    def start(self, *args: object, timeout: float = WAIT_S, **options: object) -> grpc.aio.UnaryStreamCall:
        return self.stub.Generate(self.request(*args, **options), timeout=timeout)  # type: ignore[arg-type, return-value]

    async def reply(self, *args: object, **options: object) -> list[generator_pb2.GenerateResponse]:
        return [event async for event in self.start(*args, **options)]

    async def status(self) -> generator_pb2.GetStatusResponse:
        return await self.stub.GetStatus(generator_pb2.GetStatusRequest(job=self.job), timeout=WAIT_S)

    async def refusal(self, request: generator_pb2.GenerateRequest, timeout: float = WAIT_S) -> Code:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in self.stub.Generate(request, timeout=timeout):
                pass
        return caught.value.code()

    async def until(self, condition: Callable[[generator_pb2.GetStatusResponse], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition(await self.status()):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)


def tokens_of(events: list[generator_pb2.GenerateResponse]) -> list[int]:
    return [token for event in events for token in event.token_ids]
