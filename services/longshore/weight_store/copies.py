"""Host copies: whole versions' tensors, proven against their manifests, in memory within a bound.

A delta decodes against such a copy, and engines are loaded from one. Versions that follow each other share the tensors
that did not change. Used by the store (keys are job and version), and by a client of one job (keys are versions).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from longshore.weight_store.payload import Tensor, TensorInfo

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class HostCopy:
    """Tensors that match their infos, which are those of a signed manifest, in its order."""

    infos: tuple[TensorInfo, ...]
    tensors: tuple[Tensor, ...]
    # It came as an adapter. The copy to hold is its base's, which the next version comes from too.
    beside: bool = False

    @property
    def num_bytes(self) -> int:
        return total_bytes(self.infos)


def total_bytes(infos: Sequence[TensorInfo]) -> int:
    """Bytes of these tensors as served."""
    return sum(info.num_bytes for info in infos)


class Copies(Generic[K]):
    """A set of host copies by key, at most `limit` of them and `max_bytes` in all; the least recently used go first.

    Thread-safe. Tensors that several copies have in common are held, and counted, once. A copy that alone has more
    than `max_bytes` is not held, nor is one that came as an adapter.
    """

    def __init__(self, limit: int, max_bytes: int) -> None:
        self._limit = limit
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        # The most recently used last.
        self._copies: dict[K, HostCopy] = {}
        self._used_at: dict[K, float] = {}
        self._tensors: dict[TensorInfo, Tensor] = {}
        self._users: Counter[TensorInfo] = Counter()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that are held."""
        return self._num_bytes

    def get(self, key: K) -> HostCopy | None:
        """The copy, which counts as used now; None when it is not held."""
        with self._lock:
            copy = self._copies.pop(key, None)
            if copy is not None:
                self._copies[key] = copy
                self._used_at[key] = time.monotonic()
            return copy

    def put(self, key: K, copy: HostCopy) -> None:
        """Holds a copy, as long as there is room."""
        with self._lock:
            self._discard(key)
            if copy.beside or copy.num_bytes > self.max_bytes:
                return
            for info, tensor in zip(copy.infos, copy.tensors, strict=True):
                if not self._users[info]:
                    self._tensors[info] = tensor
                    self._num_bytes += info.num_bytes
                self._users[info] += 1
            self._used_at[key] = time.monotonic()
            self._copies[key] = HostCopy(copy.infos, tuple(self._tensors[info] for info in copy.infos))
            while len(self._copies) > self._limit or self._num_bytes > self.max_bytes:
                self._discard(next(iter(self._copies)))

    def discard(self, key: K) -> None:
        """Lets a copy go, if it is held."""
        with self._lock:
            self._discard(key)

    def discard_unused(self, since: float) -> None:
        """Lets the copies go that were last put or got before `since` (by time.monotonic)."""
        with self._lock:
            for key in [key for key, used_at in self._used_at.items() if used_at < since]:
                self._discard(key)

    def keys(self) -> list[K]:
        """The keys of what is held, the least recently used first."""
        with self._lock:
            return list(self._copies)

    def _discard(self, key: K) -> None:
        copy = self._copies.pop(key, None)
        self._used_at.pop(key, None)
        for info in copy.infos if copy else ():
            self._users[info] -= 1
            if not self._users[info]:
                del self._users[info], self._tensors[info]
                self._num_bytes -= info.num_bytes
