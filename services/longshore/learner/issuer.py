"""Issues tickets: what admission allows (law 6), what an evaluation needs, what people want attempted again.

Every group is on record before its first ticket is sent, so that a later incarnation knows what is out. A broker that
is full takes tickets later: they are in the books, and said again with the next issue or `resend`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import google.protobuf.message
import structlog

from longshore.errors import Rejected
from longshore.learner.admission import Admission
from longshore.learner.disk import when_there_is_room
from longshore.learner.groups import Group
from longshore.learner.issue_log import IssueLog, IssueRecord
from longshore.learner.parts import Parts
from longshore.learner.progress import Evaluating
from longshore.proto.v1 import task_pb2
from longshore.rollout_queue.broker import BrokerFull
from longshore.rpc import convert
from longshore.tasks.source import is_heldout
from longshore.types import Purpose, Sampling, Task, Ticket, TicketRef, VersionConstraint

log = structlog.get_logger()

WISHES_EVERY_S = 1.0


class Issuer:
    """The tickets of one learner incarnation."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger, self._spec, self._link = parts.ledger, parts.spec, parts.link
        train = parts.spec.train
        self._admission = Admission(train.groups_per_step, train.target_staleness, train.group_size)
        self._log = IssueLog(parts.run_dir / "learner" / "issued.jsonl")
        # Groups that the broker had no room for.
        self._unsent: list[Group] = []
        self._asked = 0.0

    def restore(self) -> None:
        """Opens the groups again that were issued after the checkpoint that this incarnation started from."""
        for record in self._log.after(self._ledger.next_group):
            if record.first_group != self._ledger.next_group:
                log.error("issue record does not fit", expected=self._ledger.next_group, found=record.first_group)
                return
            self._open(record)

    async def issue(self) -> None:
        """Issues what admission allows: dead letters that people want attempted again, then the source's next tasks."""
        await self._fulfil_wishes()
        if count := self._allowance():
            record = self._record(Purpose.TRAIN, count, self._spec.train.group_size)
            if self._parts.curriculum is not None:
                chosen = tuple([self._parts.curriculum.next() for _ in range(count)])
                record = dataclasses.replace(record, positions=chosen)
            await self._issue(record)

    async def issue_evaluation(self, evaluating: Evaluating) -> None:
        """Issues one ticket for every held-out task, to be answered by one version alone."""
        record = self._record(Purpose.EVALUATION, len(self._parts.heldout), 1, pin=evaluating.version)
        await self._issue(dataclasses.replace(record, when=evaluating.when, step=evaluating.step))

    async def say_again(self) -> None:
        """Says every ticket again that has not ended; the broker leaves those alone that it knows."""
        self._unsent.clear()
        await self._send(self._ledger.unsettled)

    @property
    def all_sent(self) -> bool:
        """Whether the broker has been told of every ticket."""
        return not self._unsent

    async def resend(self) -> None:
        """Sends what the broker had no room for."""
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            await self._send(unsent)

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _fulfil_wishes(self) -> None:
        """Each becomes a new group, as far as there is room; the old ticket keeps its reason."""
        now = time.monotonic()
        if now - self._asked < WISHES_EVERY_S:
            return
        self._asked = now
        wishes = await self._link.wishes()
        done = [wish for wish, _ in wishes if _order(wish) <= self._newest_wish]
        tasks: list[str] = []
        room = self._allowance()
        for wish, data in wishes[len(done) :]:
            fault = self._fault(data)
            if fault is None and len(tasks) == room:
                break
            done.append(wish)
            if fault is None:
                tasks.append(data.hex())
            else:
                await self._parts.reporter.warn(f"dead letter not requeued: {fault}")
        if tasks:
            await self._issue(
                self._record(Purpose.TRAIN, len(tasks), self._spec.train.group_size, tasks=tasks, wish=done[-1])
            )
        await self._link.drop_wishes(done)

    @property
    def _newest_wish(self) -> tuple[int, int]:
        return _order(self._parts.progress.newest_wish or "0-0")

    def _allowance(self) -> int:
        steps_left = self._spec.train.steps - self._parts.progress.step
        return self._admission.allowance(steps_left, self._ledger.num_active, self._ledger.num_awaiting)

    def _record(
        self,
        purpose: Purpose,
        groups: int,
        size: int,
        pin: int | None = None,
        tasks: Sequence[str] = (),
        wish: str = "",
    ) -> IssueRecord:
        first = self._ledger.next_group
        return IssueRecord(self._link.epoch, first, groups, size, purpose.value, pin, tuple(tasks), wish)

    async def _issue(self, record: IssueRecord) -> None:
        await when_there_is_room(lambda: self._log.append(record), "an issue record")
        await self._send(self._open(record))

    def _open(self, record: IssueRecord) -> list[Group]:
        progress, cursor = self._parts.progress, self._parts.cursor
        if record.kind is Purpose.EVALUATION:
            tasks = self._parts.heldout[: record.groups]
            assert record.pin is not None
            progress.evaluating.append(Evaluating(record.when, record.step, record.pin))
        elif record.tasks:
            tasks = [_task(bytes.fromhex(text)) for text in record.tasks]
        elif record.positions:
            tasks = [cursor.at(position) for position in record.positions]
            cursor.state = record.positions[-1] + 1
        else:
            tasks = [cursor.next() for _ in range(record.groups)]
        progress.cursor = cursor.state
        progress.newest_wish = record.wish or progress.newest_wish
        return [self._ledger.issue(task, record.kind, record.size, record.pin) for task in tasks]

    async def _send(self, groups: Sequence[Group]) -> None:
        tickets = [ticket for group in groups for ticket in self._tickets(group)]
        if not tickets:
            return
        try:
            await self._link.issue(tickets)
        except BrokerFull as error:
            log.warning("tickets wait", tickets=len(tickets), reason=str(error))
            self._unsent.extend(groups)

    def _tickets(self, group: Group) -> list[Ticket]:
        """Those that have not ended."""
        live = group.live
        prompts = self._parts.prompts
        digest = prompts.digest(group.task) if prompts is not None and live else b""
        return [self._ticket(group, index, digest) for index in live]

    def _ticket(self, group: Group, index: int, prompt_digest: bytes) -> Ticket:
        sampling = self._spec.sampling
        return Ticket(
            ref=TicketRef(self._parts.job, group.group_id, index),
            group_size=group.size,
            purpose=group.purpose,
            task=group.task,
            sampling=Sampling(sampling.temperature, sampling.max_new_tokens),
            learner_epoch=self._link.epoch,
            issued_at=time.time(),
            version=None if group.pin is None else VersionConstraint(group.pin, group.pin),
            prompt_digest=prompt_digest,
        )

    def _fault(self, data: bytes) -> str | None:
        try:
            task = _task(data)
        except Rejected as error:
            return str(error)
        if is_heldout(task, self._spec.tasks.heldout_fraction):
            return f"task {task.task_id} is held out from training"
        return None


def _task(data: bytes) -> Task:
    try:
        return convert.task_from_proto(task_pb2.Task.FromString(data))
    except google.protobuf.message.DecodeError:
        raise Rejected("malformed", "not a serialised task") from None


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)
