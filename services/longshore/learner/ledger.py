"""The learner's ledger: which tickets are out, what came home, and how each ended.

The authority on "issued = trained + accounted". Pure bookkeeping: knows no broker, no clock and no tensors; the
checkpoint carries `state()`, and `restore` brings back exactly what it held.

Groups are numbered in the order of issue. A group is open until it is settled (trained or accounted); members whose
verdicts are awaited then stay in the books as late ones, and each is settled by itself.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from longshore.learner.credit.group import Baseline
from longshore.learner.groups import Ending, Group, LateMember, Origin, as_int, as_list, as_mapping
from longshore.learner.statistics import rewards_of
from longshore.types import Purpose, Rollout, Task

# Outcomes of this many settled groups are remembered, to answer repeated deliveries with what really happened. A
# broker that loses its tail loses seconds, not thousands of groups.
REMEMBERED_GROUPS = 4096
TRAINED = "trained"
NO_VERDICT = "no_verdict"


class Ledger:
    """All groups from issue to the end of their last ticket, and the counts of everything that ended."""

    def __init__(self) -> None:
        self.next_group = 0
        self.issued = 0
        # (site, outcome) of every ticket that ended.
        self.ends: Counter[tuple[str, str]] = Counter()
        # The same, as far as the broker has been told or has told us: what its own counts should say.
        self.known_at_broker: Counter[tuple[str, str]] = Counter()
        # Insertion order is the order of issue.
        self.open: dict[int, Group] = {}
        # Groups that were settled without some of their members.
        self.late: dict[int, Group] = {}
        # Training groups in the order in which they became trainable: what the next batch is taken from.
        self._ready: deque[int] = deque()
        self._late_ready: deque[tuple[int, int]] = deque()
        self._empty: list[int] = []
        self._settled: dict[int, dict[int, str]] = {}
        # Keys of tickets that ended, and that no durable checkpoint says so of yet.
        self._undurable: set[str] = set()
        # Entries of theirs that came again: to be acknowledged with their ends.
        self._repeated: list[Ending] = []

    # -- issue -------------------------------------------------------------------------------------------------------

    def issue(self, task: Task, purpose: Purpose, size: int, pin: int | None = None) -> Group:
        """Opens the next group."""
        group = Group(self.next_group, purpose, task, size, pin)
        self.next_group += 1
        self.issued += size
        self.open[group.group_id] = group
        return group

    def open_groups(self, purpose: Purpose) -> list[Group]:
        return [group for group in self.open.values() if group.purpose is purpose]

    def group(self, group_id: int) -> Group | None:
        """The group, while one of its tickets has not ended."""
        return self.open.get(group_id) or self.late.get(group_id)

    @property
    def unsettled(self) -> list[Group]:
        """Every group that has a ticket which has not ended."""
        return [*self.late.values(), *self.open.values()]

    # -- what comes home ---------------------------------------------------------------------------------------------

    def receive(self, rollout: Rollout, origin: Origin) -> str | None:
        """Takes a scored rollout in, or one that awaited its verdict and has it now.

        Returns None, or how its ticket had ended when it is a repeat.
        """
        group, index = self.group(rollout.ref.group_id), rollout.ref.index
        if group is None or index in group.ended:
            return self.how_ended(rollout.ref.group_id, index)
        if group.is_missing(index) or index in group.awaiting:
            group.awaiting.pop(index, None)
            group.join(index, rollout)
            _note(group, index, origin)
            self._place(group, index)
        else:
            # The same entry read twice, or one delivered again after the broker lost its tail: first delivery wins,
            # and the newest entry is the one to acknowledge.
            group.entry_ids[index] = origin.entry_id
        return None

    def receive_unscored(self, group_id: int, index: int, payload: bytes, origin: Origin) -> str | None:
        """Takes a serialised rollout in that awaits its verdict. Returns as `receive`."""
        group = self.group(group_id)
        if group is None or index in group.ended:
            return self.how_ended(group_id, index)
        if group.is_missing(index):
            group.awaiting[index] = payload
            _note(group, index, origin)
            self._place(group, index)
        else:
            group.entry_ids[index] = origin.entry_id
        return None

    def end_ticket(self, group_id: int, index: int, reason: str, origin: Origin) -> str | None:
        """Takes in that the broker ended a ticket without a rollout to train on. Returns as `receive`."""
        group = self.group(group_id)
        if group is None or index in group.ended:
            return self.how_ended(group_id, index)
        if group.is_missing(index) or index in group.awaiting:
            group.awaiting.pop(index, None)
            group.final_reasons[index] = reason
            _note(group, index, origin)
            self.known_at_broker[origin.site, reason] += 1
            self._place(group, index)
        else:
            group.entry_ids[index] = origin.entry_id
        return None

    def how_ended(self, group_id: int, index: int) -> str:
        """How a ticket ended; `trained` where it was so long ago that nobody remembers."""
        late = self.late.get(group_id)
        ended = late.ended if late is not None else self._settled.get(group_id, {})
        return ended.get(index, TRAINED)

    def hold_repeat(self, key: str, outcome: str, origin: Origin) -> bool:
        """Keeps an entry that came again of a ticket whose end is not durable yet, for `take_repeats`. False: the end
        is, and the entry may be acknowledged at once."""
        if key in self._undurable:
            self._repeated.append(Ending(key, outcome, origin.entry_id, origin.site, origin.num_bytes, noticed=True))
        return key in self._undurable

    def take_repeats(self) -> list[Ending]:
        """What was held, to be acknowledged after the next durable checkpoint."""
        taken, self._repeated = self._repeated, []
        return taken

    @property
    def repeated_bytes(self) -> int:
        return sum(ending.num_bytes for ending in self._repeated)

    def _place(self, group: Group, index: int) -> None:
        """Puts what has become ready in line."""
        if group.baseline is not None:
            # Also one without a rollout: it has to be accounted for.
            if index not in group.awaiting:
                self._late_ready.append((group.group_id, index))
        elif group.purpose is Purpose.TRAIN and group.closed and not group.in_line:
            if group.trainable:
                group.in_line = True
                self._ready.append(group.group_id)
            elif not group.awaiting:
                group.in_line = True
                self._empty.append(group.group_id)

    # -- what is taken out -------------------------------------------------------------------------------------------

    @property
    def num_ready(self) -> int:
        """Training groups that wait to be trained on."""
        return len(self._ready)

    def take_ready(self, count: int) -> list[Group]:
        """Takes the `count` groups that came first. They stay open until settled."""
        taken = [self.open[self._ready.popleft()] for _ in range(count)]
        for group in taken:
            group.taken = True
        return taken

    def take_ready_where(self, wanted: Callable[[Group], bool], count: int) -> list[Group]:
        """Takes up to `count` of the groups that are `wanted`, wherever they stand in line, first come first."""
        taken = [self.open[group_id] for group_id in self._ready if wanted(self.open[group_id])][: max(0, count)]
        gone = {group.group_id for group in taken}
        self._ready = deque(group_id for group_id in self._ready if group_id not in gone)
        return taken

    def take_late(self, count: int) -> tuple[list[LateMember], list[Ending]]:
        """Takes up to `count` late members, first come first, and the endings of late tickets that got no rollout."""
        members: list[LateMember] = []
        endings: list[Ending] = []
        while self._late_ready and len(members) < count:
            group_id, index = self._late_ready.popleft()
            group = self.late[group_id]
            if index in group.final_reasons:
                endings.append(self.settle_late(group_id, index, group.final_reasons[index]))
            else:
                members.append(self._late_member(group, index))
        return members, endings

    def take_recorded(
        self, groups: Sequence[int], members: Sequence[tuple[int, int]], late: Sequence[tuple[int, int]]
    ) -> tuple[list[Group], list[LateMember]] | None:
        """Takes a recorded batch exactly as it was; None while a part of it has not come home.

        Args:
            groups: in the order of the record.
            members: (group, index) of their rollouts that were trained on.
            late: (group, index) of the late members.

        Raises:
            LookupError: it cannot be taken again: one of its tickets has ended otherwise, or has lost its verdict.
        """
        whole = True
        for group_id, index in [*members, *late]:
            group = self.group(group_id)
            if group is None or index in group.ended or index in group.final_reasons:
                raise LookupError(f"ticket {group_id}.{index} has ended otherwise")
            if index in group.awaiting:
                # The broker lost its verdict, which may not be given again for days.
                raise LookupError(f"ticket {group_id}.{index} awaits its verdict again")
            whole = whole and index in group.rollouts
        if not all(group_id in self.open for group_id in groups) or not all(pair[0] in self.late for pair in late):
            raise LookupError("one of its groups was trained on otherwise")
        if not whole:
            return None
        taken = []
        for group_id in groups:
            group = self.open[group_id]
            group.hold_back_all_but({index for of_group, index in members if of_group == group_id})
            if group_id in self._ready:
                self._ready.remove(group_id)
            group.in_line = group.taken = True
            taken.append(group)
        for pair in late:
            self._late_ready.remove(pair)
        return taken, [self._late_member(self.late[group_id], index) for group_id, index in late]

    def take_empty(self) -> list[Group]:
        """Takes the training groups that closed without a single rollout: there is nothing to train on."""
        empty, self._empty = self._empty, []
        return [self.open[group_id] for group_id in empty]

    def _late_member(self, group: Group, index: int) -> LateMember:
        assert group.baseline is not None
        site = group.sites.get(index, "home")
        return LateMember(group.group_id, index, group.rollouts[index], group.baseline, site)

    # -- settlement --------------------------------------------------------------------------------------------------

    def settle(self, group: Group, outcome: str, rewards_G: Sequence[float] | None = None) -> list[Ending]:
        """Ends a group's rollouts with `outcome`, and its tickets without one with their own reasons. What still
        awaits its verdict stays as late, to be compared with `rewards_G` (absent: the rollouts' rewards)."""
        rewards = rewards_of(group) if rewards_G is None else rewards_G
        reasons = {**dict.fromkeys(group.rollouts, outcome), **group.final_reasons}
        endings = [self._end(group, index, reasons[index]) for index in sorted(reasons)]
        del self.open[group.group_id]
        if group.live:
            group.baseline = Baseline(tuple(rewards))
            self.late[group.group_id] = group
            group.rollouts, group.held_back, group.taken = group.held_back, {}, False
            self._late_ready.extend((group.group_id, index) for index in sorted(group.rollouts))
        else:
            self._remember(group)
        return endings

    def settle_late(self, group_id: int, index: int, outcome: str) -> Ending:
        """Ends one late ticket."""
        group = self.late[group_id]
        ending = self._end(group, index, outcome)
        if not group.live and not group.final_reasons:
            del self.late[group_id]
            self._remember(group)
        return ending

    def abandon(self, group: Group, outcome: str) -> list[Ending]:
        """Ends whatever has not ended of a group: what awaits its verdict as `no_verdict`, the rest with `outcome`."""
        left = [index for index in range(group.size) if index not in group.ended]
        reasons = {**dict.fromkeys(left, outcome), **dict.fromkeys(group.awaiting, NO_VERDICT), **group.final_reasons}
        endings = [self._end(group, index, reasons[index]) for index in left]
        self.open.pop(group.group_id, None)
        self.late.pop(group.group_id, None)
        self._remember(group)
        return endings

    def settle_all(self, outcome: str) -> list[Ending]:
        """Ends everything that is still out, for the end of a job."""
        for line in (self._ready, self._late_ready, self._empty):
            line.clear()
        return [ending for group in self.unsettled for ending in self.abandon(group, outcome)]

    def _end(self, group: Group, index: int, outcome: str) -> Ending:
        ending = group.ending(index, outcome)
        self.ends[ending.site, outcome] += 1
        self._undurable.add(ending.key)
        return ending

    def _remember(self, group: Group) -> None:
        self._settled[group.group_id] = group.ended
        if len(self._settled) > REMEMBERED_GROUPS:
            self._settled.pop(next(iter(self._settled)))

    def acknowledged(self, endings: Iterable[Ending]) -> None:
        """Notes that these are durable, and that the broker has been told of them."""
        endings = list(endings)
        self._undurable.difference_update(ending.key for ending in endings)
        self.known_at_broker.update((ending.site, ending.outcome) for ending in endings if not ending.noticed)

    # -- accounts ----------------------------------------------------------------------------------------------------

    @property
    def outcomes(self) -> Counter[str]:
        """Ended tickets by outcome."""
        total: Counter[str] = Counter()
        for (_, outcome), count in self.ends.items():
            total[outcome] += count
        return total

    @property
    def trained(self) -> int:
        return self.outcomes[TRAINED]

    @property
    def accounted(self) -> dict[str, int]:
        """Final reasons other than trained, with their counts."""
        return {reason: count for reason, count in sorted(self.outcomes.items()) if reason != TRAINED and count}

    @property
    def by_site(self) -> dict[str, dict[str, int]]:
        """Ended tickets by site and outcome."""
        found: dict[str, dict[str, int]] = {}
        for (site, outcome), count in sorted(self.ends.items()):
            found.setdefault(site, {})[outcome] = count
        return found

    @property
    def num_awaiting(self) -> int:
        """Rollouts that await their verdict."""
        return sum(len(group.awaiting) for group in self.unsettled)

    @property
    def num_active(self) -> int:
        """Open training groups that take a place in admission."""
        return sum(group.purpose is Purpose.TRAIN and not group.parked for group in self.open.values())

    @property
    def num_out(self) -> int:
        """Tickets that have not ended."""
        return sum(group.size - len(group.ended) for group in self.unsettled)

    @property
    def balanced(self) -> bool:
        """The equation: issued = trained + accounted + still out."""
        return self.issued == self.ends.total() + self.num_out

    # -- checkpoint --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """JSON-compatible. Rollouts are left out: the broker holds them until they are acknowledged."""
        return {
            "next_group": self.next_group,
            "issued": self.issued,
            "ends": [[site, outcome, count] for (site, outcome), count in self.ends.items()],
            "open": [group.state() for group in self.open.values()],
            "late": [group.state() for group in self.late.values()],
            "settled": [[group_id, list(ends.items())] for group_id, ends in self._settled.items()],
        }

    @staticmethod
    def restore(state: dict[str, object]) -> Ledger:
        """The ledger that `state` was taken of, without the rollouts that had come home."""
        ledger = Ledger()
        ledger.next_group = as_int(state["next_group"])
        ledger.issued = as_int(state["issued"])
        for site, outcome, count in map(as_list, as_list(state["ends"])):
            ledger.ends[str(site), str(outcome)] = as_int(count)
        # What a checkpoint says has ended is acknowledged again when it is loaded.
        ledger.known_at_broker = Counter(ledger.ends)
        for groups, items in ((ledger.open, state["open"]), (ledger.late, state["late"])):
            for item in as_list(items):
                group = Group.restore(as_mapping(item))
                groups[group.group_id] = group
        for group_id, ends in map(as_list, as_list(state["settled"])):
            pairs = [as_list(pair) for pair in as_list(ends)]
            ledger._settled[as_int(group_id)] = {as_int(index): str(outcome) for index, outcome in pairs}
        return ledger


def _note(group: Group, index: int, origin: Origin) -> None:
    group.entry_ids[index] = origin.entry_id
    group.sites[index] = origin.site
    group.num_bytes[index] = origin.num_bytes
