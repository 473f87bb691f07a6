"""Who waits, who holds a slot, and which version may answer whom. Pure logic: no torch, no thread, no clock of its own.

Requests are admitted in the order in which they came, except that one that waits for a newer version lets others pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from longshore.errors import Unavailable
from longshore.generator.engine import EngineRequest, Failure, RequestFailed, TokensDrawn
from longshore.generator.reply import Reply

# Prompt tokens that are computed between two decode steps, beyond which admission waits for the next turn: running
# requests stand still meanwhile. One prompt is always taken.
PREFILL_TOKENS = 8192


class Scheduler:
    """The requests of one engine with `slots` slots, each for prompt and reply of up to `context` tokens."""

    def __init__(
        self, slots: int, context: int, residents: int = 1, *, drain: bool = False, recompute: bool = False
    ) -> None:
        """
        Args:
            residents: versions that may be in memory at a time, the served one among them.
            drain: whether running requests hold a swap until they have ended; none is admitted then but who needs the
                served version.
            recompute: whether caches are computed anew after a swap.
        """
        self._drain = drain
        self._recompute = recompute
        # The version that is served; None until the first swap.
        self.version: int | None = None
        # The version of a swap that waits for requests which only the served version may answer.
        self.next_version: int | None = None
        self._residents = residents
        # Versions in memory besides, oldest first; True: kept for requests to come, False: until its last request ends.
        self._beside: dict[int, bool] = {}
        self._context = context
        self._free = list(range(slots - 1, -1, -1))
        self._running: dict[int, Reply] = {}
        self._waiting: dict[str, EngineRequest] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def beside(self) -> tuple[int, ...]:
        """Versions that are resident besides the served one."""
        return tuple(self._beside)

    def add_in_time(self, request: EngineRequest, now: float) -> RequestFailed | None:
        """As `add`, unless the request's deadline has passed on its way."""
        return _deadline_failure(request) if request.deadline <= now else self.add(request)

    def add(self, request: EngineRequest) -> RequestFailed | None:
        """Queues a request, or says why its version can no longer be served."""
        gone = self._place(request) is None and _outdated(request, self.version)
        if gone or (self._holds_swap(request) and (self._is_draining or not self._has_room_beside())):
            return _version_failure(request, self.version if self.next_version is None else self.next_version)
        self._waiting[request.request_id] = request
        return None

    def drop(self, request_id: str) -> int | None:
        """Forgets a request; returns the slot that it held, free from now on."""
        self._waiting.pop(request_id, None)
        held = [slot for slot, reply in self._running.items() if reply.request.request_id == request_id]
        self._end(held)
        return held[0] if held else None

    def slots_under(self, version: int | None) -> set[int]:
        """Slots of the requests that a version answers now."""
        return {slot for slot, reply in self._running.items() if reply.version == version}

    def slots_by_admission(self) -> list[int]:
        """Slots in use, of the request admitted first to the one admitted last."""
        return list(self._running)

    def reply(self, slot: int) -> Reply:
        return self._running[slot]

    def admit(self, has_room: Callable[[Reply], bool] = lambda reply: True) -> list[Reply]:
        """Gives free slots to waiting requests that a resident version may answer.

        Args:
            has_room: takes what else a request needs; where it says no, that one and those behind it go on waiting.
        """
        if self.version is None:
            return []
        admitted: list[Reply] = []
        tokens = 0
        for request in self._waiting.values():
            if len(admitted) == len(self._free) or (admitted and tokens + len(request.token_ids) > PREFILL_TOKENS):
                break
            version = self._place(request)
            if version is not None and not (self._is_draining and not self._holds_swap(request)):
                tokens += len(request.token_ids)
                reply = Reply(request, self._free[-1 - len(admitted)], version, self._context)
                if not has_room(reply):
                    break
                admitted.append(reply)
        for reply in admitted:
            self._free.pop()
            del self._waiting[reply.request.request_id]
            self._running[reply.slot] = reply
        return admitted

    def drawn(self, slot: int, token: int, logprob: float, now: float) -> TokensDrawn | None:
        """Takes the token that a slot drew; returns the event that is due. One with `finish` frees the slot."""
        event = self._running[slot].add(token, logprob, now)
        if event is not None and event.finish is not None:
            self._end([slot])
        return event

    def expire(self, now: float) -> tuple[list[RequestFailed], list[int]]:
        """Ends requests whose deadline has passed; their last events and the slots that they held."""
        late = [request for request in self._waiting.values() if request.deadline <= now]
        slots = [slot for slot, reply in self._running.items() if reply.request.deadline <= now]
        failures = [_deadline_failure(request) for request in late]
        failures += [_deadline_failure(self._running[slot].request) for slot in slots]
        for request in late:
            del self._waiting[request.request_id]
        self._end(slots)
        return failures, slots

    @property
    def swap_is_held(self) -> bool:
        """Whether requests in flight need the served version after the swap, and every place beside is in use; when
        draining, whether any are running."""
        if self._is_draining and self._running:
            return True
        return self._is_needed() and not self._has_room_beside()

    def swapped(self) -> tuple[list[TokensDrawn], list[RequestFailed], list[int]]:
        """Makes the next version the served one; nothing may hold the swap.

        Returns the events of tokens that the old version drew, the failures of waiting requests that ask for versions
        which are gone, and the slots that stay with the old version, which then is resident beside the new one: in the
        place of one that nobody uses, if there is no other.
        """
        assert self.next_version is not None
        assert not self.swap_is_held
        old, new = self.version, self.next_version
        staying = [
            slot for slot, reply in self._running.items() if reply.version == old and self._holds_swap(reply.request)
        ]
        if old is not None and self._is_needed():
            idle = self._idle() if self._is_full() else None
            if idle is not None:
                del self._beside[idle]
            self._beside[old] = False
        self._beside.pop(new, None)
        self.version, self.next_version = new, None
        moving = [reply for slot, reply in self._running.items() if reply.version == old and slot not in staying]
        events = [reply.swapped(new, self._recompute) for reply in moving]
        outdated = [item for item in self._waiting.values() if self._place(item) is None and _outdated(item, new)]
        for request in outdated:
            del self._waiting[request.request_id]
        failures = [_version_failure(request, new) for request in outdated]
        return [event for event in events if event is not None], failures, staying

    def keep(self, version: int) -> int | None:
        """Keeps a version resident beside the served one; returns the version that had to go for it.

        Raises:
            Unavailable: every place is taken by a version that requests run on.
        """
        if version == self.version:
            return None
        if version in self._beside:
            self._beside[version] = True
            return None
        gone = None
        if len(self._beside) + 2 > self._residents:
            gone = self._idle()
            if gone is None:
                raise Unavailable(f"no room for version {version} beside the {self._residents} that are in use")
            del self._beside[gone]
        self._beside[version] = True
        return gone

    def forget_unused(self) -> list[int]:
        """Lets versions go that were held for requests which have ended; returns them."""
        gone = [version for version, kept in self._beside.items() if not kept and not self._has_users(version)]
        for version in gone:
            del self._beside[version]
        return gone

    @property
    def _is_draining(self) -> bool:
        return self._drain and self.next_version is not None

    def _place(self, request: EngineRequest) -> int | None:
        """The resident version that may answer a request, the served one rather than another."""
        if self.version is not None and _accepts(request, self.version):
            return self.version
        return next((version for version in reversed(self._beside) if _accepts(request, version)), None)

    def _has_room_beside(self) -> bool:
        """Whether the served version can stay beside the next one."""
        return not self._is_full() or self._idle() is not None

    def _is_full(self) -> bool:
        """Whether there is no room for the served version beside the next one."""
        return len(self._beside.keys() - {self.next_version}) + 2 > self._residents

    def _idle(self) -> int | None:
        """The oldest version beside the served one that nobody uses."""
        return next((held for held in self._beside if held != self.next_version and not self._has_users(held)), None)

    def _has_users(self, version: int) -> bool:
        if any(reply.version == version for reply in self._running.values()):
            return True
        return any(self._place(request) == version for request in self._waiting.values())

    def _is_needed(self) -> bool:
        """Whether a request in flight accepts the served version and not the next one."""
        running = (reply.request for reply in self._running.values() if reply.version == self.version)
        return any(map(self._holds_swap, running)) or any(map(self._holds_swap, self._waiting.values()))

    def _holds_swap(self, request: EngineRequest) -> bool:
        if self.version is None or self.next_version is None:
            return False
        return _accepts(request, self.version) and not _accepts(request, self.next_version)

    def _end(self, slots: Iterable[int]) -> None:
        for slot in slots:
            del self._running[slot]
            self._free.append(slot)


def _accepts(request: EngineRequest, version: int) -> bool:
    low, high = request.version.min_version, request.version.max_version
    return (low is None or low <= version) and (high is None or version <= high)


def _outdated(request: EngineRequest, version: int | None) -> bool:
    high = request.version.max_version
    return version is not None and high is not None and high < version


def _version_failure(request: EngineRequest, version: int | None) -> RequestFailed:
    low, high = request.version.min_version, request.version.max_version
    message = f"version {version} is served; the request accepts {low}..{high}"
    return RequestFailed(request.request_id, Failure.VERSION, message)


def _deadline_failure(request: EngineRequest) -> RequestFailed:
    return RequestFailed(request.request_id, Failure.DEADLINE, "the deadline passed before the reply was finished")
