"""The seam between the service and whatever draws the tokens: token ids in, events out, no text and no wire.

An engine owns one thread. Requests and aborts go in by `submit` and `abort`; what comes of them goes out through one
callback, called on the engine's thread with all events of one turn of its loop. New weights arrive in two acts:

    engine.stage(7, tensors, proof)        # made ready, on the caller's thread
    engine.swap().result()                 # between two decode steps, with requests in flight

Nothing unproven is ever served: an engine scores the proof's canaries as soon as it can, at `stage` where it holds the
staged weights beside the resident ones, else at `swap`, before any token that they drew leaves it. Either then fails
with IntegrityError, and the version before serves on.

Where a swap keeps the KV cache of running requests, their later events say so (`KvMark.CARRIED`, law 2). Requests whose
`max_version` is below the staged version go on with the one that they have, which stays in memory beside the new one
until the last of them has ended. Where there is no room for that they hold the swap, at the longest until their
deadline, and from the call of `swap` on no further such request is taken. `keep` makes a staged version resident beside
the served one, for requests that ask for it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from longshore.errors import Rejected, Unavailable
from longshore.types import EngineFingerprint, FinishReason, KvMark, Sampling, VersionConstraint

if TYPE_CHECKING:
    import torch

    from longshore.generator.canary import Proof

# Outside of these the log-probs of float32 logits are no longer numbers that mean something.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3


class QueueFull(Unavailable):
    """As many requests wait as may wait; another generator may have room."""


@dataclass(frozen=True)
class EngineRequest:
    """One reply to draw.

    Example: EngineRequest("r1", (5, 6, 7), Sampling(1.0, 16, (1,)), deadline=time.monotonic() + 30)
    """

    # Unique among the requests in the engine.
    request_id: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    # On the clock of time.monotonic().
    deadline: float
    version: VersionConstraint = field(default_factory=VersionConstraint)
    # Somebody watches it grow, or may want no more of it at any moment: events come with the tokens, ungathered.
    watched: bool = False


@dataclass(frozen=True)
class TokensDrawn:
    """Tokens drawn for a request since its last event, all by one version; the last event has `finish`.

    Example: TokensDrawn("r1", (9, 1), (-0.5, -0.1), version=3, kv=KvMark.RECOMPUTED, finish=FinishReason.STOP)
    """

    request_id: str
    token_ids: tuple[int, ...]
    # One a token: log_softmax(logits / temperature)[token].
    logprobs: tuple[float, ...]
    version: int
    kv: KvMark
    # Oldest version in the request's cache; set when it was carried over a swap.
    kv_min_version: int | None = None
    finish: FinishReason | None = None


class Failure(enum.Enum):
    """Why a request ended without a finished reply."""

    VERSION = "version"
    DEADLINE = "deadline"
    # Fit for engines of its kind, and not for this one.
    REFUSED = "refused"


@dataclass(frozen=True)
class RequestFailed:
    """A request's last event when its reply could not be finished."""

    request_id: str
    failure: Failure
    message: str


EngineEvent = TokensDrawn | RequestFailed
Emit = Callable[[Sequence[EngineEvent]], None]


@dataclass(frozen=True)
class EngineLimits:
    """What an engine takes."""

    vocab_size: int
    # Prompt and reply together, in tokens.
    context: int
    # Requests decoded together.
    slots: int
    # Requests that may wait beyond them.
    max_waiting: int
    # Versions in memory at a time, the served one among them.
    residents: int = 1


@dataclass(frozen=True)
class EngineStatus:
    """What an engine holds at one moment."""

    # None until the first swap.
    version: int | None
    # Requests that are decoded, and those that are not: for want of a slot, of cache, or of a version.
    running: int
    waiting: int
    # Share of the cache in use, 0..1.
    kv_used_ratio: float
    # Versions in memory besides, which answer the requests that ask for them.
    beside: tuple[int, ...] = ()


class Engine(Protocol):
    """Draws tokens from the resident weights. `submit`, `abort`, `swap` and `status` return at once, on any thread."""

    fingerprint: EngineFingerprint
    limits: EngineLimits
    # Done when the engine's thread has ended; holds the exception that ended it, if one did.
    ended: Future[None]

    def submit(self, request: EngineRequest) -> None:
        """Takes a request; events follow until one has `finish` or is a RequestFailed.

        Raises:
            Rejected: the request can never be answered (see check_request).
            QueueFull: `limits.max_waiting` requests wait already.
            Unavailable: the engine has been closed.
            ValueError: the id is in use.
        """

    def abort(self, request_id: str) -> None:
        """Ends a request without a further event, except one already on its way. Unknown ids are ignored."""

    def stage(self, version: int, tensors: Mapping[str, torch.Tensor], proof: Proof) -> None:
        """Makes new weights ready, in the place of what was staged before; takes time: not for an event loop.

        Raises:
            IntegrityError: the tensors are not those of this engine's model, or the proof does not hold.
        """

    def swap(self) -> Future[None]:
        """Makes the staged version resident between two decode steps; done when it is.

        The future fails with IntegrityError when the loaded weights do not prove (the version before serves on), with
        Unavailable when the engine ends first.
        """

    def keep(self) -> Future[None]:
        """Makes the staged version resident beside the served one; done when requests for it may be submitted.

        The future fails with Unavailable when every place is taken by a version in use, the engine has but one, or it
        ends first.
        """

    def status(self) -> EngineStatus: ...

    def close(self) -> None:
        """Ends the engine's thread; requests in flight get no further event. Waits for the step in progress."""


def check_length(prompt: int, limits: EngineLimits) -> None:
    """Raises Rejected: `prompt`, for so many tokens."""
    if not prompt:
        raise Rejected("prompt", "token_ids must not be empty")
    if prompt + 1 > limits.context:
        raise Rejected("prompt", f"{prompt} prompt tokens leave no room in a context of {limits.context}")


def check_request(request: EngineRequest, limits: EngineLimits) -> None:
    """Raises Rejected for a request that can never be answered: reasons `prompt`, `sampling`, `version`."""
    prompt, sampling, version = request.token_ids, request.sampling, request.version
    check_length(len(prompt), limits)
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        raise Rejected("prompt", f"token ids must lie in 0..{limits.vocab_size - 1}")
    # A NaN fails this comparison too.
    if not MIN_TEMPERATURE <= sampling.temperature <= MAX_TEMPERATURE:
        raise Rejected(
            "sampling", f"temperature must lie in {MIN_TEMPERATURE}..{MAX_TEMPERATURE}, got {sampling.temperature}"
        )
    if sampling.max_new_tokens < 1:
        raise Rejected("sampling", "max_new_tokens must be at least 1")
    low, high = version.min_version, version.max_version
    if low is not None and high is not None and low > high:
        raise Rejected("version", f"min_version {low} is above max_version {high}")
