"""The replay buffer: groups that were trained on, kept on disk, of which some join later batches.

What it holds is part of each checkpoint (`state`), like the ledger; the rollouts are in files, each written once.

    a group is trained on for the first time   its file is written; a checkpoint makes it durable (`begin_checkpoint`)
                                               before it covers that training, so before the broker may forget the group
    it is drawn, and named by a batch record   (rollout_id, use) with use 2, 3, ...: counted when the step is taken
    it goes                                    its file is removed only when a durable checkpoint does not name it
    a crash                                    the checkpoint's buffer again, and the recorded batches draw the same
                                               groups: what came after the checkpoint comes from the broker once more

Choices depend on the checkpointed state and on the job's seed, not on time: the same batches come of the same rollouts.
Plain logic and files; knows neither broker nor tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from longshore.config_replay import ReplaySpec
from longshore.errors import IntegrityError
from longshore.learner.credit.group import deviation_of, mean_of
from longshore.learner.groups import as_float, as_list, as_mapping
from longshore.learner.replay.entry import Entry
from longshore.learner.replay.files import GroupFiles, packed
from longshore.learner.replay.reach import Reach
from longshore.learner.replay.strategies import ADMISSIONS, PRIORITIES, Moment, drawn, evictions
from longshore.types import Rollout

log = structlog.get_logger()

# Besides the bytes: each group takes some 250 bytes of every checkpoint's state, and its part in every draw.
MAX_GROUPS = 32_768

# (task_id, what its group says of it) -> estimated rate of success.
Success = Callable[[str, float], float]


@dataclass(frozen=True)
class Replayed:
    """A kept group that is part of a batch once more."""

    entry: Entry
    rollouts: list[Rollout]

    @property
    def use(self) -> int:
        """Which training on it this is."""
        return self.entry.uses + 1


@dataclass(frozen=True)
class Files:
    """What a checkpoint must make durable first, and what may be removed once it is durable itself."""

    written: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


class ReplayBuffer:
    """The buffer of one learner incarnation. `make_durable` and `remove` may run beside the others, in a thread of
    their own; the others, of which some read or write files, one at a time."""

    def __init__(self, folder: Path, spec: ReplaySpec, seed: int, epoch: int, success: Success) -> None:
        """
        Args:
            folder: for its files alone.
            spec: of the job.
            seed: of the job.
            epoch: of this learner: one that slept and wakes writes under other names.
            success: what is known of a task.
        """
        self._files = GroupFiles(folder)
        self._spec, self._seed, self._epoch, self._success = spec, seed, epoch, success
        self._order = evictions(spec.evict, spec.priority)
        self._limit = spec.size_mb * 2**20
        # Insertion order is the order of first use.
        self._entries: dict[int, Entry] = {}
        self._written: list[str] = []
        self._gone: list[str] = []
        # Groups that recorded batches name: they stay, whatever else would be decided now.
        self._held: frozenset[int] = frozenset()
        self.reach = Reach()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    # -- into a batch ------------------------------------------------------------------------------------------------

    def take(self, number: int, version: int, most: int) -> list[Replayed]:
        """Groups for train step `number`, at most `most` of them, fewer while the reach is narrow. Reads their files.

        A group whose file is damaged is let go, and another taken.
        """
        moment = self._moment(version)
        weight = PRIORITIES[self._spec.priority]
        fit = [entry for entry in self._entries.values() if entry.age(version) <= moment.max_age]
        taken: list[Replayed] = []
        count = self.reach.groups(most)
        for entry in drawn(fit, lambda entry: weight(entry, moment), f"{self._seed}/{number}"):
            if len(taken) == count:
                break
            try:
                taken.append(self._read(entry))
            except IntegrityError as error:
                log.warning("a group cannot be replayed", group=entry.group_id, reason=str(error))
                self._drop(entry)
        return taken

    def take_recorded(self, uses: Sequence[tuple[int, int]]) -> list[Replayed]:
        """Groups as a batch record names them, in its order. Reads their files.

        Args:
            uses: (group, use) of each.

        Raises:
            LookupError: one of them is not here, or has not been used just as often.
        """
        taken = []
        for group_id, use in uses:
            entry = self._entries.get(group_id)
            if entry is None or entry.uses + 1 != use:
                raise LookupError(f"group {group_id} is not kept for its use {use}")
            try:
                taken.append(self._read(entry))
            except IntegrityError as error:
                raise LookupError(f"group {group_id}: {error}") from None
        return taken

    def hold(self, groups: Iterable[int]) -> None:
        """Keeps these groups, whatever their age and use, until told otherwise."""
        self._held = frozenset(groups)

    def _read(self, entry: Entry) -> Replayed:
        return Replayed(entry, self._files.read(entry.file, entry.sha256))

    # -- after a step ------------------------------------------------------------------------------------------------

    def settle(self, version: int, replayed: Sequence[Replayed], ess: float | None, spoilt: bool = False) -> None:
        """Counts the uses of a step that was taken, adapts the reach, and lets go what has had its time.

        Args:
            version: of the weights before the step, as in `take`.
            replayed: what was in its batch.
            ess: effective share of its replayed tokens; None: there were none.
            spoilt: its gradient was no number: none of them is used again.
        """
        for item in replayed:
            self._entries[item.entry.group_id] = item.entry.used()
            if spoilt:
                self._drop(item.entry)
        self.reach = self.reach.after(ess, self._spec.ess_floor)
        for entry in list(self._entries.values()):
            if entry.uses >= self._spec.max_uses or entry.age(version) > self._spec.max_age:
                self._drop(entry)

    def offer(self, number: int, version: int, rollouts: Sequence[Rollout]) -> bool:
        """Takes in a group that train step `number` has used for the first time, if it is wanted and there is or can
        be made room for it. Writes its file. Returns whether it is kept.

        Raises:
            OSError: the file could not be written; then nothing has changed but what was let go for it.
        """
        data = packed(rollouts)
        entry = self._entry(number, rollouts, data)
        moment = self._moment(version)
        held = entry.group_id in self._held
        if not held and not ADMISSIONS[self._spec.admit](entry, moment):
            return False
        if not self._make_room(entry, moment) and not held:
            return False
        self._files.write(entry.file, data)
        self._written.append(entry.file)
        self._entries[entry.group_id] = entry
        self.num_bytes += entry.num_bytes
        return True

    def _entry(self, number: int, rollouts: Sequence[Rollout], data: bytes) -> Entry:
        rewards = [rollout.verdict.reward for rollout in rollouts if rollout.verdict is not None]
        group_id = rollouts[0].ref.group_id
        return Entry(
            group_id=group_id,
            task_id=rollouts[0].task_id,
            members=tuple(rollout.ref.index for rollout in rollouts),
            uses=1,
            file=f"group-{group_id}-{self._epoch}.bin",
            sha256=hashlib.sha256(data).hexdigest(),
            num_bytes=len(data),
            min_version=min(rollout.min_version for rollout in rollouts),
            admitted=number,
            success=min(1.0, max(0.0, mean_of(rewards))),
            magnitude=deviation_of(rewards),
        )

    def _make_room(self, entry: Entry, moment: Moment) -> bool:
        """Lets others go until an entry fits. False, and nobody has gone, where it would have to go first itself."""
        over = self.num_bytes + entry.num_bytes - self._limit
        many = len(self._entries) + 1 - MAX_GROUPS
        if over <= 0 and many <= 0:
            return True
        going: list[Entry] = []
        for other in sorted(self._entries.values(), key=lambda item: (self._order(item, moment), item.group_id)):
            if over <= 0 and many <= 0:
                break
            if self._order(other, moment) > self._order(entry, moment):
                return False
            if other.group_id not in self._held:
                going.append(other)
                over -= other.num_bytes
                many -= 1
        if over > 0 or many > 0:
            return False
        for other in going:
            self._drop(other)
        return True

    def _drop(self, entry: Entry) -> None:
        if entry.group_id not in self._held and self._entries.pop(entry.group_id, None) is not None:
            self.num_bytes -= entry.num_bytes
            self._gone.append(entry.file)

    def _moment(self, version: int) -> Moment:
        return Moment(
            version, self.reach.max_age(self._spec.max_age), lambda entry: self._success(entry.task_id, entry.success)
        )

    # -- checkpoint --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """JSON-compatible: everything but the files."""
        return {"reach": self.reach.value, "entries": [entry.state() for entry in self._entries.values()]}

    def restore(self, state: object) -> None:
        """Goes on from a loaded checkpoint's state, or from nothing (None), and removes every file that it does not
        name. A group whose file is missing is let go, with a warning."""
        told = {} if state is None else as_mapping(state)
        self.reach = Reach(as_float(told.get("reach", 1.0)))
        entries = [Entry.restore(item) for item in as_list(told.get("entries", []))]
        missing = self._files.keep_only(entry.file for entry in entries)
        if missing:
            log.warning("groups are missing in the replay buffer", groups=len(missing))
        self._entries = {entry.group_id: entry for entry in entries if entry.file not in missing}
        self.num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        self._written, self._gone = [], []

    def begin_checkpoint(self) -> Files:
        """What the checkpoint of this moment is about; for `make_durable` before, and `remove` after it is written."""
        files = Files(tuple(self._written), tuple(self._gone))
        self._written, self._gone = [], []
        return files

    def make_durable(self, files: Files) -> None:
        """Returns when what a checkpoint will name is on the disk. Raises OSError."""
        self._files.sync(files.written)

    def remove(self, files: Files) -> None:
        """Removes what no durable checkpoint names any more."""
        self._files.remove(files.gone)
