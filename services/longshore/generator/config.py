"""What a generator is told at its start."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from longshore.settings import JobProcessSettings


class GeneratorSettings(JobProcessSettings):
    """Settings of one generator process. How wide it is (slots, threads) is the job's to say."""

    weights: str = Field(description="host:port of the weight store")
    follow: str = Field("head", description="pointer that is followed: head, serving, channel/<name>, pin/<name>")
    residents: int = Field(2, ge=1, description="versions in memory at a time; requests may ask for one by number")
    held_mb: int = Field(8192, ge=1, description="most memory of versions as published, in MiB: the bases of deltas")
    max_waiting: int = Field(4096, ge=0, description="requests that may wait for a slot; more are refused")
    cache_mb: int = Field(4096, ge=1, description="most memory of the KV cache, in MiB; bounds the context")
    gpu_memory: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory for weights and cache (vllm)")
    max_request_s: float = Field(600.0, gt=0, description="seconds after which any request ends, whatever it asked for")
    openai_listen: str = Field("", description="host:port of the OpenAI-compatible interface; empty: there is none")
    openai_keys_file: Path | None = Field(None, description="names and digests of the API keys that it lets in")
    openai_url_file: Path | None = Field(None, description="file that it writes its base URL to, while it listens")
    openai_tls_cert: Path | None = Field(None, description="PEM file of its certificate's chain")
    openai_tls_key: Path | None = Field(None, description="PEM file of its certificate's key")
    openai_replies_per_key: int = Field(256, ge=1, description="replies that each API key may have in the works")
