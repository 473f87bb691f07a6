"""Checkpoints, and what may be forgotten because of them (law 5).

A rollout is acknowledged only when a durable checkpoint contains its effect. Checkpoints are written beside the
training, one at a time; what a checkpoint covers is part of it, so that an incarnation that starts from it
acknowledges again what the one before may not have come to.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable

from longshore.learner import metrics
from longshore.learner.checkpoint import Snapshot, take_snapshot, write_checkpoint
from longshore.learner.disk import when_there_is_room
from longshore.learner.groups import Ending, as_list
from longshore.learner.intake import ends_of
from longshore.learner.parts import Parts
from longshore.learner.replay.buffer import Files
from longshore.rollout_queue.rollouts import End

# A broker writes its file every second; a replica may be some seconds behind.
RECENT_S = 30.0
RECENT_ENDINGS = 20_000


class Durability:
    """The checkpoints of one learner incarnation."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._folder = parts.run_dir / "learner" / "checkpoints"
        self._labels = (parts.job.project, parts.job.job)
        # Endings whose effect no durable checkpoint contains yet.
        self._waiting: list[Ending] = []
        # Endings that were acknowledged a moment ago: (when, what), oldest first. A broker that loses its tail has
        # forgotten them; so may one that does while this learner is killed, therefore checkpoints hold them too.
        self._recent: deque[tuple[float, Ending]] = deque(maxlen=RECENT_ENDINGS)
        self._writing: asyncio.Task[None] | None = None

    def add(self, endings: Iterable[Ending]) -> None:
        """Notes endings, to be acknowledged when the next checkpoint is durable."""
        self._waiting.extend(endings)
        metrics.UNACKNOWLEDGED.labels(*self._labels).set(self.waiting_bytes)

    @property
    def waiting_bytes(self) -> int:
        """Of rollouts that ended, or came again, since the last checkpoint was begun."""
        return sum(ending.num_bytes for ending in self._waiting) + self._parts.ledger.repeated_bytes

    @property
    def overdue(self) -> bool:
        """Whether so many bytes wait for a checkpoint that it should not wait for its turn."""
        return self.waiting_bytes > self._parts.max_unacknowledged

    @property
    def anything_waits(self) -> bool:
        return bool(self._waiting)

    async def checkpoint(self, told: str = "") -> None:
        """Starts a checkpoint of this moment; what it covers is acknowledged once it is durable.

        With `told`, the incarnation of the broker that everything that is out has been said to, its counts are made
        anew after that, and sites may forget what the checkpoint covers.
        """
        await self.settled()
        parts = self._parts
        covered, self._waiting = [*self._waiting, *parts.ledger.take_repeats()], []
        state: dict[str, object] = {
            "ledger": parts.ledger.state(),
            "progress": parts.progress.state(),
            "epoch": parts.link.epoch,
            "tasks": parts.tasks_known.state(),
            "covered": [[end.entry_id, end.ticket_key, end.outcome] for end in ends_of([*self._lately(), *covered])],
        }
        files = Files()
        if parts.replay is not None:
            state["replay"], files = parts.replay.state(), parts.replay.begin_checkpoint()
        # Seconds with a real model. No train step is taken meanwhile: whoever asks for a checkpoint waits for this.
        snapshot = await asyncio.to_thread(take_snapshot, parts.trainer, parts.progress.step, state)
        self._writing = asyncio.create_task(self._write(snapshot, covered, told, files))

    async def settled(self) -> None:
        """Until the checkpoint before is durable and acknowledged. Raises what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            await writing

    async def reconcile(self, told: str) -> None:
        """Makes the broker's counts anew, where nothing waits for a checkpoint."""
        await self._parts.link.reconcile(told, self._parts.ledger.known_at_broker)
        metrics.RECONCILED.labels(*self._labels).inc()

    async def _write(self, snapshot: Snapshot, covered: list[Ending], told: str, files: Files) -> None:
        # Else it would only be found out at the acknowledgement, with a checkpoint of the past on the disk.
        await self._parts.link.confirm()
        buffer = self._parts.replay
        if buffer is not None:
            # Before the broker may forget what the files hold.
            await when_there_is_room(lambda: buffer.make_durable(files), "groups to be replayed")
        await when_there_is_room(lambda: write_checkpoint(self._folder, snapshot), "a checkpoint")
        again = self._lately() if told else []
        await self._parts.link.acknowledge(ends_of([*again, *covered]))
        self._parts.ledger.acknowledged(covered)
        now = time.monotonic()
        self._recent.extend((now, ending) for ending in covered)
        if buffer is not None:
            # The broker has just confirmed that no other learner has taken over, who may need them.
            await asyncio.to_thread(buffer.remove, files)
        if told:
            await self.reconcile(told)

    def _lately(self) -> list[Ending]:
        """What was acknowledged so lately that a broker may lose it."""
        while self._recent and time.monotonic() - self._recent[0][0] > RECENT_S:
            self._recent.popleft()
        return [ending for _, ending in self._recent]


def covered_by(snapshot: Snapshot) -> list[End]:
    """What a loaded checkpoint covers and its incarnation may not have acknowledged."""
    found = []
    for item in as_list(snapshot.state.get("covered", [])):
        entry_id, key, outcome = as_list(item)
        found.append(End(None if entry_id is None else str(entry_id), str(key), str(outcome)))
    return found
