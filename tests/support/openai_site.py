"""A generator process with the OpenAI-compatible interface, and a job's weight store that it follows."""

from __future__ import annotations

import re
import time
import urllib.request
import uuid
from pathlib import Path

import grpc
import grpc.aio
import openai
import torch
from processes import Service, free_port
from tiny_llama import canary_logprobs, config_json, published, tiny_model
from tiny_tokenizer import assets
from transformers import LlamaForCausalLM

from longshore.proto.v1 import generator_pb2, generator_pb2_grpc, job_pb2
from longshore.rpc.key_file import digest_line
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weights.client import CanaryProbe, VersionDraft, WeightsClient

SERVICE = "longshore.proto.v1.GeneratorService"
WAIT_S = 30.0
SLOTS = 4
MAX_WAITING = 12
CONTEXT = 2048
KEY = "test-key-of-alice"
CANARY = (1, 2, 3, 4)
# ChatML that teaches tools as Qwen's template does.
TOOL_CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    "{{- 'Answer with <tool_call>{...}</tool_call><|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{{- '</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


class OpenAiSite:
    """Weight store and generator as real processes; a job's models to publish."""

    def __init__(self, folder: Path, template: str | None = TOOL_CHATML) -> None:
        self.folder = folder
        self.template = template
        self.job = JobRef("default", f"first-light-{uuid.uuid4().hex[:6]}")
        self.key = SigningKey.generate()
        self.models: dict[int, LlamaForCausalLM] = {}
        spec = {
            "name": "first-light",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "resources": {"generator_slots": SLOTS},
        }
        document = {"project": "default", "job": self.job.job, "spec": spec}
        job_file = folder / "job.json"
        learner = {"learner_public_key": self.key.public_key.hex()}
        job_file.write_text(JobFile.model_validate({**document, **learner}).model_dump_json())
        self.keys_file = folder / "openai.keys"
        self.keys_file.write_text("# who may ask\n" + digest_line("alice", KEY))
        self.url = f"http://127.0.0.1:{free_port()}/v1"
        self.url_file = folder / "openai.url"
        self.store = Service("weights", folder, store_url=(folder / "store").as_uri()).start()
        self.settings: dict[str, object] = {
            "job_file": job_file,
            "weights": self.store.address,
            "max_waiting": MAX_WAITING,
            "drain_s": WAIT_S,
            "openai_listen": self.url.removeprefix("http://").removesuffix("/v1"),
            "openai_keys_file": self.keys_file,
            "openai_url_file": self.url_file,
            "openai_replies_per_key": 64,
        }
        self.generator = Service("generator", folder, **self.settings).start()

    async def publish(self) -> int:
        """Publishes the next version: other weights than every one before."""
        version = len(self.models)
        model = self.models[version] = tiny_model(version, context=CONTEXT, vocabulary=100)
        # Rounds the model's own weights, so it comes first.
        tensors = published(model, torch.bfloat16)
        probe = CanaryProbe(CANARY, canary_logprobs(model, CANARY))
        draft = VersionDraft(version, version, 1, None, (probe,), time.time())
        client = WeightsClient(self.store.address, self.job, self.key.public_key)
        try:
            await client.register_key(keep=8)
            files = {"config.json": config_json(model), **self.tokenizer()}
            await client.publish(self.key, draft, tensors, files)
        finally:
            await client.close()
        return version

    def tokenizer(self) -> dict[str, bytes]:
        """Without a token that ends replies: those of a model that draws at random would end at any moment."""
        return assets(self.template, eos_token=None)

    def client(self, key: str = KEY, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=WAIT_S, **options)  # type: ignore[arg-type]

    def async_client(self, key: str = KEY, **options: object) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=WAIT_S, **options)  # type: ignore[arg-type]

    async def status(self) -> generator_pb2.GetStatusResponse:
        job = job_pb2.JobRef(project=self.job.project, job=self.job.job)
        async with grpc.aio.insecure_channel(self.generator.address) as channel:
            stub = generator_pb2_grpc.GeneratorServiceStub(channel)
            return await stub.GetStatus(generator_pb2.GetStatusRequest(job=job), timeout=WAIT_S)

    def metric(self, name: str, **labels: str) -> float:
        with urllib.request.urlopen(f"http://{self.generator.metrics_address}/metrics", timeout=WAIT_S) as page:
            lines = page.read().decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        found = [line for line in lines if re.match(rf"{name}[{{ ]", line) and all(part in line for part in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def stop(self) -> None:
        self.generator.stop()
        self.store.stop()
