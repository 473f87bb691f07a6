"""What an actor is told at its start."""

from __future__ import annotations

from pydantic import Field

from longshore.settings import BrokerSettings, JobProcessSettings


class ActorSettings(JobProcessSettings, BrokerSettings):
    """Settings of one actor process."""

    generator: str = Field(description="address of the generator")
    verifier: str = Field(description="address of the verifier")
    weights: str = Field(description="address of the weight store, for the tokenizer")
    generate_timeout_s: float = Field(3600.0, gt=0, description="seconds that one reply may take")
    environment_timeout_s: float = Field(60.0, gt=0, description="seconds that an environment may take for a turn")
    peer_patience_s: float = Field(600.0, gt=0, description="seconds that a generator or verifier may be away")
    broker_patience_s: float = Field(60.0, gt=0, description="seconds that the broker may be away")
