"""What can be asked of jobs: submit, pause, resume, cancel. The REST routes translate to this."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from longshore.config import NAME_PATTERN, JobSpec
from longshore.errors import Conflict, Fault, Forbidden, InvalidJobSpec, NotFound, Unavailable
from longshore.gateway.places import NO_LIMITS, Limits, Use, needs_of
from longshore.gateway.principal import Principal
from longshore.gateway.projects import Projects
from longshore.gateway.states import JobState
from longshore.gateway.store import Job, JobStore, NewJob

log = structlog.get_logger()

CHECK_TIMEOUT_S = 60.0
# Checks run plug-ins and read data sets; more at once would only make each slower.
_MAX_CHECKS = 2
# Of one project: beyond that it is told to wait.
MAX_UNFINISHED = 1000
DEFAULT_PROJECT = JobSpec.model_fields["project"].default

# Parses and checks a document; raises InvalidJobSpec with every fault.
Check = Callable[[object], JobSpec]


@dataclass(frozen=True)
class Places:
    """What there is for all jobs together. `data_dir`: files that jobs of every project may read."""

    room: Limits = NO_LIMITS
    data_dir: Path | None = None


@dataclass(frozen=True)
class Submission:
    """Who sends a job, and how. `given_up`: whether whoever asked has gone meanwhile: a check may take seconds, and
    nobody would know the id of a job that is queued then, nor expect it."""

    caller: Principal
    given_up: Callable[[], Awaitable[bool]]
    idempotency_key: str | None = None
    # (job, policy version) that it is forked from.
    parent: tuple[str, int] | None = None
    # What is sent, where it is not the job's own document.
    request: object = None
    # The id that the job is to have; absent: any.
    job_id: str | None = None


class Jobs:
    """Job control over the store. Starting and stopping is the reconciler's, which reads the same store."""

    def __init__(
        self,
        store: JobStore,
        projects: Projects,
        check: Check,
        runs_dir: Path,
        places: Places = Places(),
    ) -> None:
        self.store = store
        self._projects = projects
        self._check = check
        self._runs_dir = runs_dir
        self._places = places
        self._checks = asyncio.Semaphore(_MAX_CHECKS)

    async def submit(self, document: object, sent: Submission) -> Job:
        """Validates a parsed JobSpec and queues the job; of one idempotency key in its project there is one job.

        Raises:
            InvalidJobSpec: with every fault that was found; nothing is stored.
            Forbidden: it is for another project than the caller's.
            Conflict: the key was used for something else, or too many jobs of the project wait.
            Unavailable: the check did not end in time, or nobody waits for its answer any more.
        """
        earlier = await self.earlier(document, sent)
        if earlier is not None:
            return earlier
        digest = _digest(document, sent)
        document = _in_project(document, sent.caller)
        await self._check_paths(document, sent)
        spec = await self._checked(document)
        needs = needs_of(spec)
        await self._check_quotas(spec.project, needs)
        if await sent.given_up():
            raise Unavailable("whoever submitted this has gone; nothing is stored")
        job = await self._create(spec, needs, sent, digest)
        log.info("job queued", job=job.id, project=job.project, principal=sent.caller.id)
        return job

    async def earlier(self, document: object, sent: Submission) -> Job | None:
        """The job that the same submission made before under its idempotency key.

        Raises:
            Forbidden, Conflict: as `submit`.
        """
        project = _project_of(_in_project(document, sent.caller))
        # Before anything is looked up: another project's keys are not this caller's to try.
        if project is not None and not sent.caller.sees(project):
            raise Forbidden(f"{sent.caller.id} may not submit to project {project}")
        return await self._earlier(project, sent.idempotency_key, _digest(document, sent))

    async def cancel(self, job: Job) -> Job:
        """Asks for a job's end. A job that is being cancelled, or was, is answered as it is.

        Raises:
            Conflict: it has succeeded or failed.
        """
        return await self._move(job, JobState.CANCELLING, JobState.CANCELLED, "cancelled on request")

    async def pause(self, job: Job) -> Job:
        """Has a job's processes stopped, after a checkpoint. A job that is paused is answered as it is.

        Raises:
            Conflict: it has ended, or is being cancelled.
        """
        return await self._move(job, JobState.PAUSING, JobState.PAUSED, "paused on request")

    async def resume(self, job: Job) -> Job:
        """Has a paused job wait for a place again; it goes on from its newest checkpoint.

        Raises:
            Conflict: it is not paused.
        """
        if job.state in (JobState.QUEUED, JobState.STARTING, JobState.RUNNING):
            return job
        return await self.store.move(job.id, JobState.QUEUED, "resumed on request")

    async def _move(self, job: Job, through: JobState, to: JobState, why: str) -> Job:
        if job.state in (through, to):
            return job
        return await self.store.move(job.id, through, why)

    async def _checked(self, document: object) -> JobSpec:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self._checks.acquire()
                work = asyncio.create_task(asyncio.to_thread(self._check, document))
                # One that was waited for too long goes on in its thread, and keeps its place until it is done: else a
                # few of them would take every thread that the gateway has.
                work.add_done_callback(self._check_done)
                return await asyncio.shield(work)
        except TimeoutError:
            raise Unavailable(f"the job could not be checked within {CHECK_TIMEOUT_S:.0f} s") from None

    def _check_done(self, work: asyncio.Task[JobSpec]) -> None:
        self._checks.release()
        if not work.cancelled():
            # Told to whoever waits; where nobody does any more, it is of no interest.
            work.exception()

    async def _check_paths(self, document: object, sent: Submission) -> None:
        """Raises InvalidJobSpec: a caller of one project names files that are not that project's to read."""
        if sent.caller.project is None:
            return
        faults = []
        for name, path in named_paths(document):
            # Links are followed: what counts is what would be read.
            if not await self._may_read(await asyncio.to_thread(_real, path), sent):
                faults.append(Fault(name, path, _FOREIGN))
        if faults:
            raise InvalidJobSpec(faults)

    async def _may_read(self, real: Path, sent: Submission) -> bool:
        data_dir = self._places.data_dir
        if data_dir is not None and real.is_relative_to(await asyncio.to_thread(_real, data_dir)):
            return True
        runs = await asyncio.to_thread(_real, self._runs_dir)
        if not real.is_relative_to(runs) or real == runs:
            return False
        job_id = real.relative_to(runs).parts[0]
        if job_id == sent.job_id:
            return True
        try:
            await self.store.get(job_id, sent.caller.project)
        except NotFound:
            return False
        return True

    async def _check_quotas(self, project: str, needs: Use) -> None:
        """Raises InvalidJobSpec: the job could never start. Conflict: too many wait."""
        quota = (await self._projects.quotas()).get(project, Limits())
        for whose, limits in ((f"project {project}", quota), ("this gateway", self._places.room)):
            breach = limits.breach(needs)
            if breach:
                shown = f"{needs.generators} generators, {needs.gpus} GPUs"
                raise InvalidJobSpec([Fault("resources", shown, f"needs {breach} to {whose}: it could never start")])
        if await self.store.count_unfinished(project) >= MAX_UNFINISHED:
            raise Conflict(f"project {project} has {MAX_UNFINISHED} unfinished jobs; wait for some to end")

    async def _earlier(self, project: str | None, key: str | None, digest: str) -> Job | None:
        if project is None or key is None:
            return None
        found = await self.store.submitted(project, key)
        if found is None:
            return None
        job, sent = found
        if sent != digest:
            raise Conflict(f"the Idempotency-Key {key!r} was used for another request, which made job {job.id}")
        return job

    async def _create(self, spec: JobSpec, needs: Use, sent: Submission, digest: str) -> Job:
        key = sent.idempotency_key
        while True:
            new = NewJob(
                sent.job_id or new_id(spec.name),
                spec.project,
                spec.name,
                spec.model_dump(mode="json"),
                generators=needs.generators,
                gpus=needs.gpus,
                parent_job=sent.parent[0] if sent.parent else None,
                parent_version=sent.parent[1] if sent.parent else None,
                idempotency_key=key,
                request_sha256=digest if key is not None else None,
            )
            try:
                return await self.store.create(new)
            except Conflict:
                # Another of the same key was quicker; or the id, of which there are 16 million a name, is taken.
                earlier = await self._earlier(spec.project, key, digest)
                if earlier is not None:
                    return earlier
                if sent.job_id is not None:
                    raise
                log.warning("job id taken", job=new.id)


def new_id(name: str) -> str:
    """An id for a job of this name."""
    return f"{name}-{secrets.token_hex(3)}"


def named_paths(document: object) -> list[tuple[str, str]]:
    """(setting, path) of the files on this machine that a job's document names, in plug-ins' options too: every text
    that is called `path` or `..._path`."""
    found: list[tuple[str, str]] = []
    waiting: list[tuple[str, object]] = [("", document)]
    while waiting:
        where, value = waiting.pop()
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, item in parts:
            inside = f"{where}.{name}" if where else str(name)
            waiting.append((inside, item))
            # A path that is none is the check's to refuse.
            named = isinstance(name, str) and (name == "path" or name.endswith("_path"))
            if named and isinstance(item, str) and "\0" not in item:
                found.append((inside, item))
    return sorted(found)


def _digest(document: object, sent: Submission) -> str:
    request = document if sent.request is None else sent.request
    return hashlib.sha256(repr(request).encode("utf-8", "replace")).hexdigest()


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


_FOREIGN = (
    "is not below the gateway's LONGSHORE_DATA_DIR, nor in a folder of a job of your project: put the files there, or "
    "have someone with a key of every project submit the job"
)


def _in_project(document: object, caller: Principal) -> object:
    """A caller of one project need not name it."""
    if isinstance(document, dict) and caller.project is not None and "project" not in document:
        return {**document, "project": caller.project}
    return document


def _project_of(document: object) -> str | None:
    """The project that a document is for; None when it cannot be one of any."""
    project = document.get("project", DEFAULT_PROJECT) if isinstance(document, dict) else None
    return project if isinstance(project, str) and re.fullmatch(NAME_PATTERN, project) else None
