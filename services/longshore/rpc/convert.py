"""Values to wire messages and back: the only module that knows both.

`*_to_proto` cannot fail on a valid value. `*_from_proto` validates what came over a wire and raises Rejected with a
short stable reason ("malformed", "span_lengths", ...): nothing behind this line checks lengths or finiteness again.
"""

from __future__ import annotations

import json
import math
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from longshore import types as t
from longshore.errors import Rejected
from longshore.proto.v1 import job_pb2, rollout_pb2, sampling_pb2, task_pb2, ticket_pb2, verdict_pb2
from longshore.rpc.rollout_checks import MAX_TABLE_ENTRIES

MAX_INFO_BYTES = 256 * 1024
SCHEMA_VERSION = 1

PURPOSE = {
    t.Purpose.TRAIN: ticket_pb2.TICKET_PURPOSE_TRAIN,
    t.Purpose.EVALUATION: ticket_pb2.TICKET_PURPOSE_EVALUATION,
}
FINISH = {
    t.FinishReason.STOP: rollout_pb2.FINISH_REASON_STOP,
    t.FinishReason.LENGTH: rollout_pb2.FINISH_REASON_LENGTH,
    t.FinishReason.ENVIRONMENT: rollout_pb2.FINISH_REASON_ENVIRONMENT,
    t.FinishReason.ABORTED: rollout_pb2.FINISH_REASON_ABORTED,
    t.FinishReason.TURNS: rollout_pb2.FINISH_REASON_TURNS,
}
KV = {t.KvMark.RECOMPUTED: rollout_pb2.KV_MARK_RECOMPUTED, t.KvMark.CARRIED: rollout_pb2.KV_MARK_CARRIED}
_ROLE = {
    t.VerdictRole.TRAIN: verdict_pb2.VERDICT_ROLE_TRAIN,
    t.VerdictRole.HELDOUT: verdict_pb2.VERDICT_ROLE_HELDOUT,
}

K = TypeVar("K")


def enum_value(table: dict[K, int], number: int, what: str) -> K:
    for value, wire in table.items():
        if wire == number:
            return value
    raise Rejected("malformed", f"{what}: unknown value {number}")


def finish_from_proto(number: int) -> t.FinishReason:
    return enum_value(FINISH, number, "finish")  # type: ignore[arg-type]


def kv_from_proto(number: int) -> t.KvMark:
    return enum_value(KV, number, "kv")  # type: ignore[arg-type]


def timestamp(seconds: float) -> Timestamp:
    """Unix seconds as a protobuf timestamp, to the microsecond."""
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def seconds(stamp: Timestamp) -> float:
    return stamp.ToMicroseconds() / 1e6


def json_object(text: str, what: str) -> dict[str, object]:
    """Parses a JSON object from a peer; empty text is an empty object. Raises Rejected."""
    if not text:
        return {}
    if len(text) > MAX_INFO_BYTES:
        raise Rejected("oversized", f"{what} has {len(text)} characters, at most {MAX_INFO_BYTES} are allowed")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Rejected("malformed", f"{what} is not JSON") from None
    if not isinstance(value, dict):
        raise Rejected("malformed", f"{what} must be a JSON object")
    return value


def job_to_proto(job: t.JobRef) -> job_pb2.JobRef:
    return job_pb2.JobRef(project=job.project, job=job.job)


def job_from_proto(message: job_pb2.JobRef) -> t.JobRef:
    if not message.project or not message.job:
        raise Rejected("malformed", "job: project and job must not be empty")
    return t.JobRef(message.project, message.job)


def ref_to_proto(ref: t.TicketRef) -> ticket_pb2.TicketRef:
    return ticket_pb2.TicketRef(job=job_to_proto(ref.job), group_id=ref.group_id, index=ref.index)


def ref_from_proto(message: ticket_pb2.TicketRef) -> t.TicketRef:
    return t.TicketRef(job_from_proto(message.job), message.group_id, message.index)


def task_to_proto(task: t.Task) -> task_pb2.Task:
    return task_pb2.Task(
        task_id=task.task_id,
        messages=[message_to_proto(message) for message in task.messages],
        answer=task.answer,
        info_json=json.dumps(task.info) if task.info else "",
        environment=task.environment,
        num_example_messages=task.num_example_messages,
    )


def task_from_proto(message: task_pb2.Task) -> t.Task:
    return t.Task(
        task_id=message.task_id,
        messages=tuple(t.Message(item.role, item.content) for item in message.messages),
        answer=message.answer if message.HasField("answer") else None,
        info=json_object(message.info_json, "task.info_json"),
        environment=message.environment,
        num_example_messages=min(message.num_example_messages, len(message.messages)),
    )


def message_to_proto(message: t.Message) -> task_pb2.Message:
    return task_pb2.Message(role=message.role, content=message.content)


def sampling_to_proto(sampling: t.Sampling) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=sampling.stop_token_ids,
    )


def sampling_from_proto(message: sampling_pb2.SamplingParams) -> t.Sampling:
    """Raises Rejected: `sampling`."""
    if not (math.isfinite(message.temperature) and message.temperature > 0):
        raise Rejected("sampling", f"temperature must be a finite number above 0, got {message.temperature}")
    if message.max_new_tokens < 1:
        raise Rejected("sampling", "max_new_tokens must be at least 1")
    if (message.HasField("top_p") and message.top_p != 1.0) or message.top_k:
        raise Rejected("sampling", "top_p and top_k truncate the distribution, which this engine cannot account for")
    if len(message.stop_token_ids) > MAX_TABLE_ENTRIES:
        raise Rejected(
            "sampling", f"{len(message.stop_token_ids)} stop tokens are given, at most {MAX_TABLE_ENTRIES} are allowed"
        )
    return t.Sampling(message.temperature, message.max_new_tokens, tuple(message.stop_token_ids))


def version_to_proto(version: t.VersionConstraint) -> ticket_pb2.VersionConstraint:
    return ticket_pb2.VersionConstraint(min_version=version.min_version, max_version=version.max_version)


def version_from_proto(message: ticket_pb2.VersionConstraint) -> t.VersionConstraint:
    return t.VersionConstraint(
        message.min_version if message.HasField("min_version") else None,
        message.max_version if message.HasField("max_version") else None,
    )


def ticket_to_proto(ticket: t.Ticket) -> ticket_pb2.Ticket:
    return ticket_pb2.Ticket(
        ref=ref_to_proto(ticket.ref),
        group_size=ticket.group_size,
        purpose=PURPOSE[ticket.purpose],
        task=task_to_proto(ticket.task),
        sampling=sampling_to_proto(ticket.sampling),
        learner_epoch=ticket.learner_epoch,
        version=version_to_proto(ticket.version) if ticket.version else None,
        issued_at=timestamp(ticket.issued_at),
        prompt_digest=ticket.prompt_digest,
    )


def ticket_from_proto(message: ticket_pb2.Ticket) -> t.Ticket:
    return t.Ticket(
        ref=ref_from_proto(message.ref),
        group_size=message.group_size,
        purpose=enum_value(PURPOSE, message.purpose, "purpose"),  # type: ignore[arg-type]
        task=task_from_proto(message.task),
        sampling=sampling_from_proto(message.sampling),
        learner_epoch=message.learner_epoch,
        issued_at=seconds(message.issued_at),
        version=version_from_proto(message.version) if message.HasField("version") else None,
        prompt_digest=message.prompt_digest,
    )


def verdict_to_proto(verdict: t.Verdict) -> verdict_pb2.Verdict:
    return verdict_pb2.Verdict(
        reward=verdict.reward,
        breakdown=verdict.breakdown,
        turn_rewards=verdict.turn_rewards,
        token_rewards=verdict.token_rewards,
        reason=verdict.reason,
        verifier=verdict.verifier,
        revision=verdict.revision,
        role=_ROLE[verdict.role],
    )


def verdict_from_proto(message: verdict_pb2.Verdict) -> t.Verdict:
    numbers = [message.reward, *message.breakdown.values(), *message.turn_rewards, *message.token_rewards]
    if not all(math.isfinite(number) for number in numbers):
        raise Rejected("not_finite", "a verdict's rewards must be finite numbers")
    return t.Verdict(
        reward=message.reward,
        verifier=message.verifier,
        breakdown=dict(message.breakdown),
        turn_rewards=tuple(message.turn_rewards),
        token_rewards=tuple(message.token_rewards),
        reason=message.reason,
        revision=message.revision,
        role=enum_value(_ROLE, message.role, "role"),  # type: ignore[arg-type]
    )
