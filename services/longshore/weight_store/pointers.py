"""Names that move: which signed pointers are accepted, and where each stands."""

from __future__ import annotations

import threading
from collections.abc import Callable

from longshore.errors import Conflict, Fenced, NotFound, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store import layout
from longshore.weight_store.books import Books
from longshore.weight_store.hub import State
from longshore.weight_store.keychain import find_key
from longshore.weight_store.keys import JobKeys
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import Objects
from longshore.weight_store.records import Records
from longshore.weight_store.version import HEAD, PointerState, open_pointer, pointer_state

POLICY = weights_pb2.WEIGHT_SET_POLICY
# A serial only grows, by time or by one: a larger one is a mistake after which the name could never move again.
MAX_SERIAL = 2**62
# Manifests written within this time of the newest may be the one whose head a crash left undone: some object stores
# keep time in seconds.
_SAME_TIME_S = 1.0


class Pointers:
    """The pointers of every job in one store."""

    def __init__(self, objects: Objects, books: Books, keys: JobKeys, clock: Callable[[], float], mirror: bool) -> None:
        self._objects = objects
        self._records = Records(objects)
        self._books = books
        self._keys = keys
        self._clock = clock
        self._mirror = mirror
        # Jobs whose head was compared with their newest versions since this process began.
        self._repaired: set[JobRef] = set()
        self._repaired_guard = threading.Lock()

    def read(self, job: JobRef, name: str) -> State:
        """Where a pointer stands; None while there is none."""
        self.repair_head(job)
        return self._records.pointer(job, name)

    def read_all(self, job: JobRef) -> list[weights_pb2.SignedPointer]:
        """Every pointer of a job."""
        self.repair_head(job)
        return [signed for _, signed in self._records.pointers(job)]

    def move(self, signed: weights_pb2.SignedPointer) -> PointerState:
        """Moves a pointer, forth or back, and returns what it says; the very same pointer again changes nothing.

        Raises:
            Conflict: the serial does not grow.
            Fenced: the key that signed was handed over.
            NotFound: there is no such version.
            IntegrityError, Rejected: the pointer is not the job's, has expired, or makes no sense.
        """
        state = self.opened(signed)
        self.repair_head(state.job)
        with self._books.lock(state.job):
            if not self._books.catalog(state.job).has(VersionKey(POLICY, state.version)):
                raise NotFound(f"{state.job} has no version {state.version}, which {state.name} is to name")
            present = self._records.pointer(state.job, state.name)
            if present and present[1].pointer == signed.pointer:
                return state
            if present and present[0].serial >= state.serial:
                raise Conflict(
                    f"{state.name} of {state.job} has serial {present[0].serial}; {state.serial} is not above it"
                )
            self.check_signer(state, signed, present)
            self.advance(state, signed)
        return state

    def opened(self, signed: weights_pb2.SignedPointer) -> PointerState:
        """A pointer from outside, checked as far as it can be by itself. Raises IntegrityError, Rejected."""
        job = pointer_state(signed).job
        keys = self._keys.chain(job)
        state = open_pointer(keys[find_key(job, keys, signed.key_id)], signed, job)
        layout.pointer_path(job, state.name)
        if state.serial > MAX_SERIAL:
            raise Rejected("serial", f"the serial {state.serial} of {state.name} leaves no room above it")
        late = self._clock() - state.expires_at
        if late >= 0:
            raise Rejected("expired", f"the pointer {state.name} expired {late:.0f} s ago by the store's clock")
        return state

    def check_signer(self, state: PointerState, signed: weights_pb2.SignedPointer, present: State) -> None:
        """Raises Fenced: the key that signed may not move the pointer any more."""
        if not self._mirror:
            self._keys.check_newest(state.job, signed.key_id, f"the pointer {state.name}")
        elif self._is_older_key(state.job, signed, present):
            raise Fenced(f"{state.name} of {state.job} was moved by a newer key than {signed.key_id}")

    def advance(self, state: PointerState, signed: weights_pb2.SignedPointer) -> None:
        """Writes a pointer if its serial grows. The caller holds the job's lock, and has checked it."""
        present = self._records.pointer(state.job, state.name)
        if present is not None and present[0].serial >= state.serial:
            return
        if self._mirror and self._is_older_key(state.job, signed, present):
            return
        self._objects.put(layout.pointer_path(state.job, state.name), signed.SerializeToString())

    def repair_head(self, job: JobRef) -> None:
        """Finishes what a crash between a manifest and its head left undone."""
        with self._repaired_guard:
            if job in self._repaired:
                return
        with self._books.lock(job):
            manifests = [
                (item.modified_at, key)
                for item in self._objects.list(layout.versions_prefix(job, POLICY))
                if item.path.endswith("/manifest") and (key := layout.version_of(job, item.path))
            ]
            if not manifests:
                return
            newest = max(manifests)[0]
            for modified_at, key in manifests:
                if newest - modified_at > _SAME_TIME_S:
                    continue
                record = self._records.version(job, key)
                if record.HasField("head"):
                    self.advance(pointer_state(record.head), record.head)
            with self._repaired_guard:
                self._repaired.add(job)

    def named(self, job: JobRef) -> set[VersionKey]:
        """Versions that pointers hold: head and serving always, other names until they expire."""
        now = self._clock()
        return {
            VersionKey(POLICY, state.version)
            for state, _ in self._records.pointers(job)
            if state.name in (HEAD, "serving") or state.expires_at > now
        }

    def _is_older_key(self, job: JobRef, signed: weights_pb2.SignedPointer, present: State) -> bool:
        """Whether a key signed that is older than the one that signed what stands. A mirror knows no more."""
        if present is None:
            return False
        keys = self._keys.chain(job)
        return find_key(job, keys, signed.key_id) < find_key(job, keys, present[1].key_id)
