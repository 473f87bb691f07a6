"""Locks and catalogs by job: what the parts of a store share about each job while the process lives."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from longshore.types import JobRef
from longshore.weight_store.catalog import Catalog
from longshore.weight_store.objects import Objects

# Catalogs that are kept in memory; another job's is read again when it is asked for.
_MAX_CATALOGS = 256


class Books:
    """One lock and one catalog a job. Whoever writes or removes objects of a job does so within `changing`."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._guard = threading.Lock()
        self._locks: weakref.WeakValueDictionary[JobRef, _Lock] = weakref.WeakValueDictionary()
        # The most recently used last.
        self._catalogs: dict[JobRef, Catalog] = {}

    @contextlib.contextmanager
    def lock(self, job: JobRef) -> Iterator[None]:
        """Holds the job's lock; a thread may hold it twice."""
        with self._guard:
            lock = self._locks.setdefault(job, _Lock())
        with lock.inner:
            yield

    def catalog(self, job: JobRef) -> Catalog:
        """The job's catalog. Raises Unavailable when it has to be read and cannot be."""
        found = self._kept(job)
        if found is not None:
            return found
        with self.lock(job):
            found = self._kept(job) or Catalog.load(self._objects, job)
            with self._guard:
                self._catalogs[job] = found
                while len(self._catalogs) > _MAX_CATALOGS:
                    del self._catalogs[next(iter(self._catalogs))]
        return found

    @contextlib.contextmanager
    def changing(self, job: JobRef) -> Iterator[Catalog]:
        """Holds the job's lock. After an error the catalog is read anew: who knows what was written."""
        with self.lock(job):
            try:
                yield self.catalog(job)
            except BaseException:
                with self._guard:
                    self._catalogs.pop(job, None)
                raise

    def _kept(self, job: JobRef) -> Catalog | None:
        with self._guard:
            found = self._catalogs.pop(job, None)
            if found is not None:
                self._catalogs[job] = found
            return found


class _Lock:
    """Threading's own locks cannot be referred to weakly."""

    def __init__(self) -> None:
        self.inner = threading.RLock()
