"""What comes home: deliveries are read, checked against the ledger, and taken in or set aside.

Runs between train steps; what arrives during one waits in the broker, bounded by admission. Nothing that arrives can
stop the learner or reach a batch unchecked: what does not fit its ticket is a dead letter, with the reason.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import google.protobuf.message
import structlog

from longshore.errors import Rejected
from longshore.learner import metrics
from longshore.learner.broker_link import BrokerLink
from longshore.learner.groups import Ending, Group, Origin
from longshore.learner.ledger import Ledger
from longshore.learner.prompts import Prompts
from longshore.proto.v1 import verdict_pb2
from longshore.rollout_queue.rollouts import Delivery, End
from longshore.rollout_queue.tickets import check_reason
from longshore.rpc import convert
from longshore.rpc.convert_rollout import rollout_from_bytes
from longshore.rpc.rollout_checks import check_bounds
from longshore.types import JobRef, Rollout, TicketRef, Verdict

log = structlog.get_logger()

READ_COUNT = 256
REJECTED = "rejected"
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
# What a log line and a dead letter say of a fault; parts of it are the sender's.
_MAX_DETAIL = 300
_TELL_EVERY_S = 1.0
_TEMPERATURE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Limits:
    """What any honest rollout of a job keeps to."""

    vocab_size: int
    # Tokens of one sequence, prompt and replies together.
    max_context: int
    # Tokens that all replies of one rollout may have.
    max_sampled: int
    temperature: float


class Intake:
    """Reads deliveries into a ledger, for one job."""

    def __init__(
        self, link: BrokerLink, ledger: Ledger, job: JobRef, limits: Limits, prompts: Prompts | None = None
    ) -> None:
        self._link = link
        self._ledger = ledger
        self._job = job
        self._limits = limits
        self._prompts = prompts
        self._labels = (job.project, job.job)
        # Reason -> (when it was logged last, how often it was not logged since).
        self._told: dict[str, tuple[float, int]] = {}
        # Newest version that exists; a rollout that claims a later one is forged.
        self.newest_version = 0

    async def read(self, block_ms: int) -> int:
        """Takes in what has been delivered. Returns how many entries there were."""
        deliveries = await self._link.read(READ_COUNT, block_ms)
        await self._take(deliveries)
        return len(deliveries)

    async def read_again(self) -> None:
        """Takes in every unacknowledged entry once more, after a restart of the learner or of the broker."""
        after = "0"
        while page := await self._link.read_pending(after):
            after = page[-1].entry_id
            await self._take(page)

    async def _take(self, deliveries: list[Delivery]) -> None:
        repeats = []
        for delivery in deliveries:
            try:
                outcome = self._accept(delivery)
            except Rejected as error:
                await self._reject(delivery, error)
                continue
            if outcome is not None:
                metrics.REPEATS.labels(*self._labels).inc()
                if not self._ledger.hold_repeat(delivery.ticket_key, outcome, _origin(delivery)):
                    repeats.append(End(delivery.entry_id, delivery.ticket_key, outcome))
        if repeats:
            await self._link.acknowledge(repeats)

    def _accept(self, delivery: Delivery) -> str | None:
        """Takes one delivery in. Returns as Ledger.receive. Raises Rejected."""
        ref = self._ref(delivery)
        if not _SITE.fullmatch(delivery.site):
            raise Rejected("malformed", f"not a site's name: {delivery.site!r}")
        origin = _origin(delivery)
        if delivery.final_reason is not None:
            return self._ledger.end_ticket(ref.group_id, ref.index, _reason(delivery.final_reason), origin)
        if delivery.verdict is not None:
            return self._score(ref, delivery.verdict, origin)
        group = self._ledger.group(ref.group_id)
        if group is None or ref.index in group.ended:
            # Whatever is in it, nobody waits for it any more. A large one that the broker gives back after it lost our
            # acknowledgement is in the storage no longer.
            return self._ledger.how_ended(ref.group_id, ref.index)
        if not delivery.payload:
            raise Rejected("unreadable", delivery.detail or "its bytes are missing, damaged, or too many")
        if delivery.attempt < 1:
            raise Rejected("malformed", "attempts are counted from 1")
        rollout = self._read(delivery.payload, group)
        self._check(rollout, ref, group)
        if rollout.verdict is not None:
            return self._ledger.receive(rollout, origin)
        if not delivery.awaiting_verdict:
            raise Rejected("no_verdict", "a rollout must carry its verdict, or be delivered as awaiting one")
        return self._ledger.receive_unscored(ref.group_id, ref.index, delivery.payload, origin)

    def _ref(self, delivery: Delivery) -> TicketRef:
        try:
            ref = TicketRef.parse(self._job, delivery.ticket_key)
        except ValueError as error:
            raise Rejected("unknown_ticket", str(error)) from None
        group = self._ledger.group(ref.group_id)
        unknown = ref.group_id >= self._ledger.next_group or (group is not None and ref.index >= group.size)
        if unknown or ref.key != delivery.ticket_key:
            # What an earlier incarnation issued is in the ledger too: see the issue record.
            raise Rejected("unknown_ticket", f"ticket {delivery.ticket_key} was never issued")
        return ref

    def _score(self, ref: TicketRef, verdict: bytes, origin: Origin) -> str | None:
        """Takes in the verdict of a rollout that awaits it."""
        group = self._ledger.group(ref.group_id)
        if group is None or ref.index in group.ended:
            return self._ledger.how_ended(ref.group_id, ref.index)
        if ref.index not in group.awaiting:
            if group.is_missing(ref.index):
                raise Rejected("verdict", "a verdict on a rollout that has not come")
            # It has one already: the first counts.
            return None
        rollout = self._read(group.awaiting[ref.index], group)
        scored = replace(rollout, verdicts=(*rollout.verdicts, _verdict(verdict)))
        check_bounds(scored)
        if scored.verdict is None:
            raise Rejected("verdict", "a verdict that is held out from training ends no wait")
        # The rollout's entry stays the ticket's: the broker drops the verdict's with it.
        return self._ledger.receive(scored, replace(origin, entry_id=group.entry_ids[ref.index]))

    def _read(self, payload: bytes, group: Group) -> Rollout:
        prompts = self._prompts
        return rollout_from_bytes(payload, None if prompts is None else lambda: prompts.ids(group.task))

    def _check(self, rollout: Rollout, ref: TicketRef, group: Group) -> None:
        limits = self._limits
        if rollout.ref != ref:
            raise Rejected("unknown_ticket", f"delivered for {ref.key} but names another ticket")
        if rollout.max_version > self.newest_version:
            raise Rejected("versions", f"version {rollout.max_version} does not exist yet")
        if any(max(segment.token_ids, default=0) >= limits.vocab_size for segment in rollout.segments):
            raise Rejected("token_ids", f"token ids must be below {limits.vocab_size}")
        if rollout.num_sampled > limits.max_sampled:
            raise Rejected("oversized", f"{rollout.num_sampled} sampled tokens, at most {limits.max_sampled} allowed")
        if (longest := longest_sequence(rollout)) > limits.max_context:
            raise Rejected("oversized", f"a sequence of {longest} tokens, at most {limits.max_context} allowed")
        if any(not _close(sampling.temperature, limits.temperature) for sampling in rollout.sampling):
            raise Rejected("sampling", f"this job samples at temperature {limits.temperature}")
        if rollout.task_id != group.task.task_id or rollout.purpose is not group.purpose:
            raise Rejected("unknown_ticket", "task or purpose is not the ticket's")
        if group.pin is not None and (rollout.min_version, rollout.max_version) != (group.pin, group.pin):
            raise Rejected("versions", f"the ticket allows version {group.pin} only")

    async def _reject(self, delivery: Delivery, error: Rejected) -> None:
        """Sets a delivery aside. Where the broker ended its ticket with it, the ledger must too."""
        detail = error.detail[:_MAX_DETAIL]
        self._tell(delivery.ticket_key[:40], error.reason, detail)
        metrics.REJECTED.labels(*self._labels, error.reason).inc()
        group, index = self._find(delivery.ticket_key)
        task = b"" if group is None else convert.task_to_proto(group.task).SerializeToString()
        ended = await self._link.dead_letter(delivery, error.reason, detail, task)
        if ended and group is not None and (group.is_missing(index) or index in group.awaiting):
            site = delivery.site if _SITE.fullmatch(delivery.site) else "home"
            self._ledger.end_ticket(group.group_id, index, REJECTED, Origin(delivery.entry_id, site))

    def _tell(self, ticket: str, reason: str, detail: str) -> None:
        """Logs one rejection a second for each reason, and how many were left out: a flood must not fill the disk."""
        now = time.monotonic()
        told_at, left_out = self._told.get(reason, (0.0, 0))
        if now - told_at < _TELL_EVERY_S:
            self._told[reason] = (told_at, left_out + 1)
            return
        self._told[reason] = (now, 0)
        log.warning("rollout rejected", ticket=ticket, reason=reason, detail=detail, left_out_before=left_out)

    def _find(self, key: str) -> tuple[Group | None, int]:
        try:
            ref = TicketRef.parse(self._job, key)
        except ValueError:
            return None, 0
        group = self._ledger.group(ref.group_id)
        return (group, ref.index) if group is not None and ref.index < group.size and ref.key == key else (None, 0)


def longest_sequence(rollout: Rollout) -> int:
    """Tokens of the longest segment with what stands before it."""
    prefixes: dict[str, int] = {}
    longest = 0
    for segment in rollout.segments:
        before = 0
        if segment.parent_segment_id is not None:
            before = prefixes[segment.parent_segment_id] + segment.prefix_len
        prefixes[segment.segment_id] = before
        longest = max(longest, before + len(segment.token_ids))
    return longest


def ends_of(endings: Iterable[Ending]) -> list[End]:
    """Ledger endings as the broker takes them."""
    return [End(ending.entry_id, ending.key, ending.outcome) for ending in endings]


def _origin(delivery: Delivery) -> Origin:
    return Origin(delivery.entry_id, delivery.site, len(delivery.payload or delivery.verdict or b""))


def _verdict(data: bytes) -> Verdict:
    try:
        return convert.verdict_from_proto(verdict_pb2.Verdict.FromString(data))
    except google.protobuf.message.DecodeError:
        raise Rejected("verdict", "not a serialised verdict") from None


def _reason(text: str) -> str:
    try:
        check_reason(text)
    except ValueError:
        raise Rejected("malformed", "not a final reason") from None
    return text


def _close(value: float, expected: float) -> bool:
    return abs(value - expected) <= _TEMPERATURE_TOLERANCE * expected
