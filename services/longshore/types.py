"""What the services pass around, as plain frozen values.

Knows nothing of protobuf, redis or torch: `rpc/convert.py` turns these into wire messages and back. Suffixes name
the ragged axes of lists: `_G` one a group member, `_L` one a token of a segment, `_S` one a sampled token.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class JobRef:
    """A job of a project. Example: JobRef("default", "first-light-4f7c1a")"""

    project: str
    job: str

    def __str__(self) -> str:
        return f"{self.project}/{self.job}"


@dataclass(frozen=True, order=True)
class TicketRef:
    """Names a ticket, and so its rollout.

    Example: TicketRef(JobRef("default", "j1"), group_id=12, index=3); its key is "12.3"
    """

    job: JobRef
    group_id: int
    index: int

    @property
    def key(self) -> str:
        """The ticket's name within its job, as used in broker keys and in batch records."""
        return f"{self.group_id}.{self.index}"

    @staticmethod
    def parse(job: JobRef, key: str) -> TicketRef:
        """Reads a key. Raises ValueError for anything but two non-negative integers joined by a dot."""
        group, _, index = key.partition(".")
        if not (group.isascii() and group.isdigit() and index.isascii() and index.isdigit()):
            raise ValueError(f"not a ticket key: {key!r}")
        return TicketRef(job, int(group), int(index))


class Purpose(enum.Enum):
    """What a ticket's rollout is for."""

    TRAIN = "train"
    EVALUATION = "evaluation"


class FinishReason(enum.Enum):
    """Why a reply or a rollout ended."""

    STOP = "stop"
    LENGTH = "length"
    ENVIRONMENT = "environment"
    ABORTED = "aborted"
    TURNS = "turns"


class KvMark(enum.Enum):
    """What the engine did with its KV cache when weights changed under a request (law 2)."""

    RECOMPUTED = "recomputed"
    CARRIED = "carried"


@dataclass(frozen=True)
class Message:
    """One chat message. Example: Message("user", "Spell this word backward: sun")"""

    role: str
    content: str


@dataclass(frozen=True)
class Task:
    """One problem to attempt.

    Example: Task("spell_backward-17", (Message("user", "Spell ... sun"),), answer="nus", info={"word": "sun"})
    """

    task_id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    # JSON-compatible; the task source and the verifier agree on what is in it.
    info: dict[str, object] = field(default_factory=dict)
    environment: str = "single-turn"
    # Messages, from the first on, that are solved examples and no part of the problem.
    num_example_messages: int = 0

    @property
    def problem(self) -> tuple[Message, ...]:
        """The messages without the examples."""
        return self.messages[self.num_example_messages :]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature > 0 over the whole distribution, at most max_new_tokens a turn."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class VersionConstraint:
    """Inclusive bounds of the policy versions that may answer; None: no bound. min == max pins one version."""

    min_version: int | None = None
    max_version: int | None = None


@dataclass(frozen=True)
class Ticket:
    """Permission to make one attempt at a task."""

    ref: TicketRef
    group_size: int
    purpose: Purpose
    task: Task
    sampling: Sampling
    learner_epoch: int
    # Unix seconds.
    issued_at: float
    version: VersionConstraint | None = None
    # Of the prompt's token ids, by rpc.token_columns.prompt_digest; empty: rollouts carry their prompt.
    prompt_digest: bytes = b""


@dataclass(frozen=True)
class EngineFingerprint:
    """What made the tokens. Example: EngineFingerprint("torch-slots", "0.1.0", "float32", "cpu-sdpa")"""

    engine: str
    engine_version: str
    dtype: str
    config_digest: str


@dataclass(frozen=True)
class GivenSpan:
    """`length` tokens of prompt or environment text: context, no loss."""

    length: int


@dataclass(frozen=True)
class SampledSpan:
    """Tokens that one policy version drew.

    Example: SampledSpan(version=41, logprobs=(-0.1, -2.3)) covers two tokens.
    """

    version: int
    # [length] natural-log behaviour probabilities, <= 0.
    logprobs: tuple[float, ...]
    sampling_index: int = 0
    engine_index: int = 0
    kv: KvMark = KvMark.RECOMPUTED
    kv_min_version: int | None = None

    @property
    def length(self) -> int:
        return len(self.logprobs)


Span = GivenSpan | SampledSpan


@dataclass(frozen=True)
class Segment:
    """A token sequence of alternating given and sampled spans; may extend a parent's first `prefix_len` tokens.

    Example: Segment("0", token_ids=(5, 6, 7, 8), spans=(GivenSpan(2), SampledSpan(3, (-0.5, -0.1))))
    """

    segment_id: str
    # [L] ids of this segment alone.
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    parent_segment_id: str | None = None
    prefix_len: int = 0


@dataclass(frozen=True)
class Turn:
    """One model reply: `length` tokens from `start` in the segment, and what the environment said of it."""

    segment_id: str
    start: int
    length: int
    finish: FinishReason
    info: dict[str, object] = field(default_factory=dict)


class VerdictRole(enum.Enum):
    """What a verdict is used for."""

    TRAIN = "train"
    HELDOUT = "heldout"


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of a rollout.

    Example: Verdict(reward=1.0, verifier="reasoning-gym@0.1.25", breakdown={"exact": 1.0})
    """

    reward: float
    verifier: str
    breakdown: dict[str, float] = field(default_factory=dict)
    turn_rewards: tuple[float, ...] = ()
    token_rewards: tuple[float, ...] = ()
    reason: str = ""
    revision: int = 1
    role: VerdictRole = VerdictRole.TRAIN


@dataclass(frozen=True)
class Rollout:
    """One attempt at a task: segments, then a verdict. Its id is its ticket's."""

    ref: TicketRef
    attempt: int
    purpose: Purpose
    task_id: str
    segments: tuple[Segment, ...]
    turns: tuple[Turn, ...]
    sampling: tuple[Sampling, ...]
    engines: tuple[EngineFingerprint, ...]
    finish: FinishReason
    # Unix seconds.
    started_at: float
    finished_at: float
    site: str
    actor: str
    verdicts: tuple[Verdict, ...] = ()

    @property
    def sampled_spans(self) -> list[SampledSpan]:
        return [span for segment in self.segments for span in segment.spans if isinstance(span, SampledSpan)]

    @property
    def min_version(self) -> int:
        """Oldest version among the sampled tokens. Raises ValueError for a rollout without any."""
        return min(span.version for span in self.sampled_spans)

    @property
    def max_version(self) -> int:
        """Newest version among the sampled tokens. Raises ValueError for a rollout without any."""
        return max(span.version for span in self.sampled_spans)

    @property
    def num_sampled(self) -> int:
        return sum(span.length for span in self.sampled_spans)

    @property
    def verdict(self) -> Verdict | None:
        """The newest training verdict, or None while one is awaited."""
        train = [verdict for verdict in self.verdicts if verdict.role is VerdictRole.TRAIN]
        return max(train, key=lambda verdict: verdict.revision) if train else None
