"""A gateway in the test's own process: real HTTP, SQLite and broker, and a launcher that is a fake at the edge."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
from redis.asyncio import Redis

from longshore.client import ApiClient
from longshore.config import JobSpec, parse_job
from longshore.errors import Conflict, Fault, InvalidJobSpec
from longshore.gateway.api_keys import ApiKeys
from longshore.gateway.app import Services, make_app
from longshore.gateway.audit import AuditLog
from longshore.gateway.auth import CALLER_RATE, Authenticator
from longshore.gateway.books import Books
from longshore.gateway.database import Database
from longshore.gateway.driver import Parts
from longshore.gateway.jobs import Jobs, Places
from longshore.gateway.places import Limits
from longshore.gateway.prepare import job_paths
from longshore.gateway.projects import Projects
from longshore.gateway.reconcile import Reconciler
from longshore.gateway.rollout_views import Rollouts
from longshore.gateway.site_access import SiteAccess, SiteSettings
from longshore.gateway.site_certificates import SiteCertificates
from longshore.gateway.states import JobState
from longshore.gateway.store import Job, JobStore
from longshore.gateway.units import Units
from longshore.gateway.versions import Versions
from longshore.launcher.spec import ProcessSpec, ProcessState, ProcessStatus, Ready, ReadyKind, UnitState, UnitStatus
from longshore.rollout_queue.channel import JobChannel
from longshore.rollout_queue.site_users import SiteUsers
from longshore.rpc.http_server import serve_http
from longshore.types import JobRef

KEY = "sesame"
DEADLINE_S = 20.0
PROCESSES = ("learner", "actor-0")


class FakeLauncher:
    """Keeps units in memory; the test says what becomes of them."""

    def __init__(self) -> None:
        self.units: dict[str, UnitStatus] = {}
        self.applied: list[str] = []
        self.removed: list[str] = []
        self.refuses: Exception | None = None
        self._changed = asyncio.Event()

    async def apply(self, unit: str, specs: Sequence[ProcessSpec]) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.applied.append(unit)
        if unit not in self.units:
            states = tuple(ProcessStatus(spec.name, ProcessState.STARTING, 1, 0, None, "x.log") for spec in specs)
            self.set(UnitStatus(unit, UnitState.RUNNING, "", states))

    async def remove(self, unit: str, reason: str) -> None:
        self.removed.append(unit)
        self.units.pop(unit, None)
        self._tell()

    async def watch(self) -> AsyncIterator[dict[str, UnitStatus]]:
        while True:
            changed = self._changed
            yield dict(self.units)
            await changed.wait()

    def set(self, status: UnitStatus) -> None:
        self.units[status.unit] = status
        self._tell()

    def becomes(self, unit: str, state: UnitState, message: str = "") -> None:
        self.set(replace(self.units[unit], state=state, message=message))

    def process(self, unit: str, state: ProcessState, **more: int) -> None:
        """Sets every process of a unit."""
        states = tuple(replace(process, state=state, **more) for process in self.units[unit].processes)
        self.set(replace(self.units[unit], processes=states))

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class GatewayBench:
    """A gateway in this process that can be stopped and started again on its database and launcher."""

    def __init__(self, folder: Path, redis: Redis) -> None:
        self.folder = folder
        self.redis = redis
        self.launcher = FakeLauncher()
        self.faults: list[Fault] = []
        # A check lasts until this is set.
        self.may_pass = threading.Event()
        self.may_pass.set()
        self.checks = 0
        self.prepared: list[str] = []
        self.jobs_since = 0.0
        self.room = Limits()
        self.rate = CALLER_RATE
        # Address of a weight store, where a test has one.
        self.weights = "127.0.0.1:1"
        # Where sites reach this home, where a test lets some in.
        self.site_settings: SiteSettings | None = None
        self.store: JobStore
        self.url = ""

    async def start(self) -> None:
        self._stop = asyncio.Event()
        self.books = Books(self.redis, self.folder / "runs")
        self.database = Database(f"sqlite+aiosqlite:///{self.folder / 'jobs.db'}")
        await self.database.open()
        self.store = JobStore(self.database)
        runs, parts = self.folder / "runs", self._parts()
        projects, self.keys = Projects(self.database), ApiKeys(self.database)
        self.sites = SiteAccess(self.site_settings, SiteCertificates(self.database), self.keys, SiteUsers(self.redis))
        services = Services(
            jobs=Jobs(self.store, projects, self._check, runs, Places(self.room, self.folder / "data")),
            books=self.books,
            rollouts=Rollouts(self.redis, runs),
            versions=Versions(self.weights, lambda job_id: job_paths(runs, self.folder, job_id)),
            units=parts.units,
            keys=self.keys,
            projects=projects,
            audit=AuditLog(self.database),
            sites=self.sites,
            authenticate=Authenticator(self.keys, KEY, self.rate),
            rotate=self._rotate,
            runs_dir=runs,
        )
        self.app = make_app(services, self._stop)
        reconciler = Reconciler(parts, projects, self.room, self.jobs_since)
        self._reconciling = asyncio.create_task(reconciler.run(self._stop))
        self._telling = asyncio.create_task(self.sites.run(self._stop))
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def on_listening(address: str) -> None:
            listening.set_result(address)

        listen = self.url.removeprefix("http://") or "127.0.0.1:0"
        self._serving = asyncio.create_task(serve_http(self.app, listen, 1.0, self._stop, on_listening))
        self.url = f"http://{await listening}"

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.gather(self._serving, self._reconciling, self._telling)
        await self.database.close()

    async def kill(self) -> None:
        """Ends it as SIGKILL would: nothing is drained, nothing is finished."""
        tasks = {self._serving, self._reconciling, self._telling}
        driving = {task for task in asyncio.all_tasks() if task.get_name().startswith("job-")}
        for task in tasks | driving:
            task.cancel()
        await asyncio.wait(tasks | driving)
        await self.database.close()

    def _check(self, document: object) -> JobSpec:
        """As tasks.check does, with the faults that a test wants found."""
        spec = parse_job(document)
        self.checks += 1
        assert self.may_pass.wait(DEADLINE_S)
        if self.faults:
            raise InvalidJobSpec(self.faults)
        return spec

    async def _rotate(self, job: Job) -> str:
        """As gateway.keys does for a job that has been started."""
        if job.id not in self.prepared:
            raise Conflict("the job has not been started: it has no key to rotate")
        return "0123456789abcdef"

    def _parts(self) -> Parts:
        async def prepare(job: Job) -> Sequence[ProcessSpec]:
            self.prepared.append(job.id)
            ready = Ready(ReadyKind.GRPC, "x")
            return [ProcessSpec(name, name, ("x",), {}, Path("x.log"), ready) for name in PROCESSES]

        return Parts(
            store=self.store,
            launcher=self.launcher,
            units=Units(self.launcher),
            prepare=prepare,
            channel=lambda job: self.channel(job.id),
            forget=self.books.close,
        )

    def channel(self, job_id: str) -> JobChannel:
        return JobChannel(self.redis, JobRef("default", job_id))

    def http(self, key: str | None = KEY) -> httpx.AsyncClient:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # Without TLS there is nothing to verify, and reading certificates takes longer than a request.
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=DEADLINE_S, trust_env=False, verify=False)

    async def submit(self) -> str:
        async with ApiClient(self.url, KEY) as client:
            job = await client.submit(document())
        return str(job["id"])

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not await condition():  # noqa: ASYNC110 - what is waited for is in a database
                await asyncio.sleep(0.02)

    async def until_state(self, job_id: str, state: str) -> Job:
        async def reached() -> bool:
            return (await self.store.get(job_id)).state is JobState(state)

        await self.until(reached)
        return await self.store.get(job_id)

    async def running(self) -> str:
        """A job all of whose processes are ready."""
        job_id = await self.submit()
        await self.until_state(job_id, "starting")
        self.launcher.process(job_id, ProcessState.READY)
        await self.until_state(job_id, "running")
        return job_id


def document(**more: object) -> dict[str, object]:
    name = f"t-{uuid.uuid4().hex[:6]}"
    parts = {"tasks": {"source": "jsonl"}, "verifier": {"name": "exact-match"}, "train": {"steps": 3}}
    return {"name": name, **parts, **more}


async def all_events(bench: GatewayBench, job_id: str) -> list[dict[str, object]]:
    async with ApiClient(bench.url, KEY) as client, asyncio.timeout(DEADLINE_S):
        return [event async for event in client.events(job_id)]
