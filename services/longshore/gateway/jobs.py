"""What can be asked of jobs: submit, look, cancel. The REST routes translate to this, and the tests call it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import structlog

from longshore.config import JobSpec
from longshore.errors import Conflict, Unavailable
from longshore.gateway.states import JobState
from longshore.gateway.store import Job, JobStore, NewJob

log = structlog.get_logger()

CHECK_TIMEOUT_S = 60.0
# Checks run plug-ins and read data sets; more at once would only make each slower.
_MAX_CHECKS = 2

# Parses and checks a document; raises InvalidJobSpec with every fault.
Check = Callable[[object], JobSpec]
# Makes a job's next signing key and hands over to it; returns the key's id.
Rotate = Callable[[Job], Awaitable[str]]


class Jobs:
    """Job control over the store. Starting and stopping is the reconciler's, which reads the same store."""

    def __init__(self, store: JobStore, check: Check, rotate: Rotate) -> None:
        self.store = store
        self._check = check
        self._rotate = rotate
        self._checks = asyncio.Semaphore(_MAX_CHECKS)

    async def submit(self, document: object, given_up: Callable[[], Awaitable[bool]]) -> Job:
        """Validates a parsed JobSpec and queues the job.

        Args:
            given_up: whether whoever asked has gone meanwhile: a check may take seconds, and nobody would know the id
                of a job that is queued then, nor expect it.

        Raises:
            InvalidJobSpec: with every fault that was found; nothing is stored.
            Unavailable: the check did not end in time, or nobody waits for its answer any more.
        """
        spec = await self._checked(document)
        if await given_up():
            raise Unavailable("whoever submitted this has gone; nothing is stored")
        job = await self._create(spec)
        log.info("job queued", job=job.id, project=job.project)
        return job

    async def rotate_key(self, job_id: str) -> str:
        """Has the job's versions signed by a new key from now on; its id.

        Raises:
            NotFound: there is no such job.
            Conflict: it was never started.
            Unavailable: the weight store does not answer.
        """
        key_id = await self._rotate(await self.store.get(job_id))
        log.info("key rotated", job=job_id, key_id=key_id)
        return key_id

    async def cancel(self, job_id: str) -> Job:
        """Asks for a job's end. A job that is being cancelled, or was, is answered as it is.

        Raises:
            NotFound: there is no such job.
            Conflict: it has succeeded or failed.
        """
        job = await self.store.get(job_id)
        if job.state in (JobState.CANCELLING, JobState.CANCELLED):
            return job
        return await self.store.move(job_id, JobState.CANCELLING, "cancelled on request")

    async def _checked(self, document: object) -> JobSpec:
        async with self._checks:
            try:
                return await asyncio.wait_for(asyncio.to_thread(self._check, document), CHECK_TIMEOUT_S)
            except TimeoutError:
                raise Unavailable(f"the job could not be checked within {CHECK_TIMEOUT_S:.0f} s") from None

    async def _create(self, spec: JobSpec) -> Job:
        document = spec.model_dump(mode="json")
        while True:
            job_id = f"{spec.name}-{secrets.token_hex(3)}"
            try:
                return await self.store.create(NewJob(job_id, spec.project, spec.name, document))
            except Conflict:
                log.warning("job id taken", job=job_id)
