"""The REST API over a full database: p99 of list and get against the bare query.

A gateway's application serves jobs of many projects, in a SQLite file with as many jobs and events as a large
installation has (100,000 and 10 million, some 6 GB; --quick: 10,000 and 200,000). Each request goes through all of it:
HTTP over loopback, the API key, the project's filter, JSON. It is compared with the same query, as SQL text over the
standard library's sqlite3, in the same run, request by request. Goals: at most 5 times the bare query, below 50 ms.

    python benchmarks/api.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Report, percentile, run
from longshore.gateway.api_keys import ApiKeys
from longshore.gateway.app import Services, make_app
from longshore.gateway.audit import AuditLog
from longshore.gateway.auth import Authenticator
from longshore.gateway.books import Books
from longshore.gateway.database import Database
from longshore.gateway.jobs import Jobs
from longshore.gateway.principal import Role
from longshore.gateway.projects import Projects
from longshore.gateway.rate_limit import Rate
from longshore.gateway.rollout_views import Rollouts
from longshore.gateway.site_access import SiteAccess
from longshore.gateway.site_certificates import SiteCertificates
from longshore.gateway.store import Job, JobStore
from longshore.gateway.units import Units
from longshore.gateway.versions import Versions
from longshore.launcher.client import SupervisorClient
from longshore.launcher.plan import JobPaths
from longshore.rollout_queue import broker
from longshore.rollout_queue.site_users import SiteUsers
from longshore.rpc.http_server import serve_http
from longshore.tasks.check import check_document

PROJECTS = 20
PAGE = 50
GOAL_RATIO, GOAL_MS = 5.0, 50.0
STATES = ("succeeded", "failed", "cancelled")
_BATCH = 50_000
# Requests before those that are counted: connections, caches, compiled statements.
_WARM_UP = 30


@dataclass(frozen=True)
class Load:
    """How much there is, and how often it is asked for."""

    jobs: int
    events: int
    requests: int


FULL = Load(100_000, 10_000_000, 1000)
QUICK = Load(10_000, 200_000, 200)


@dataclass(frozen=True)
class Question:
    """One kind of request and the bare query that answers it. Both are given a job of the asking project."""

    name: str
    path: Callable[[str], str]
    sql: str
    values: Callable[[str], tuple[object, ...]]


LISTED = "id, project, name, state, error, created_at, updated_at, progress, revision, parent_job, parent_version"
QUESTIONS = (
    Question(
        f"list, first {PAGE}",
        lambda job: f"/v1/jobs?limit={PAGE}",
        f"SELECT {LISTED} FROM jobs WHERE project = 'p0' ORDER BY created_at DESC, id DESC LIMIT {PAGE}",
        lambda job: (),
    ),
    Question(
        f"list, {PAGE} that failed",
        lambda job: f"/v1/jobs?limit={PAGE}&state=failed",
        f"SELECT {LISTED} FROM jobs WHERE project = 'p0' AND state = 'failed' "
        f"ORDER BY created_at DESC, id DESC LIMIT {PAGE}",
        lambda job: (),
    ),
    Question(
        "get, with its spec",
        lambda job: f"/v1/jobs/{job}",
        f"SELECT {LISTED}, spec FROM jobs WHERE id = ? AND project = 'p0'",
        lambda job: (job,),
    ),
    Question(
        "events, all of a job",
        lambda job: f"/v1/jobs/{job}/events",
        "SELECT id, time, type, body FROM job_events WHERE job = ? AND id > 0 ORDER BY id LIMIT 500",
        lambda job: (job,),
    ),
)


async def measure(report: Report, args: argparse.Namespace) -> None:
    load = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="ls-api-") as folder:
        path = Path(folder) / "jobs.db"
        report.note(f"writing {load.jobs:,} jobs and {load.events:,} events")
        began = time.monotonic()
        await fill(path, load)
        report.add("database", path.stat().st_size / 1e6, "MB")
        report.note(f"written in {time.monotonic() - began:.0f} s")
        async with serving(path) as http:
            for question in QUESTIONS:
                await compare(report, question, http, path, load)


async def compare(report: Report, question: Question, http: httpx.AsyncClient, path: Path, load: Load) -> None:
    """Adds the figures of one question: asked in turns, so that both sides meet the same machine."""
    generator = random.Random(7)
    served: list[float] = []
    bare: list[float] = []
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for number in range(load.requests + _WARM_UP):
            job = job_id(generator.randrange(load.jobs // PROJECTS) * PROJECTS)
            began = time.perf_counter()
            rows = connection.execute(question.sql, question.values(job)).fetchall()
            # What is JSON in a column is read by either side.
            read = [[json.loads(value) if _is_json(value) else value for value in row] for row in rows]
            middle = time.perf_counter()
            answer = await http.get(question.path(job))
            ended = time.perf_counter()
            assert answer.status_code == 200, answer.text
            assert read
            if number >= _WARM_UP:
                bare.append(middle - began)
                served.append(ended - middle)
    p99, bare_p99 = percentile(served, 0.99), percentile(bare, 0.99)
    against = f"bare query, p99 {1000 * bare_p99:.2f} ms, median {1000 * percentile(bare, 0.5):.2f} ms"
    report.add(f"{question.name}: p99 of it", p99 / bare_p99, "x", against=against, at_most=GOAL_RATIO)
    report.add(f"{question.name}: p99", 1000 * p99, "ms", at_most=GOAL_MS)
    report.add(f"{question.name}: median", 1000 * percentile(served, 0.5), "ms")


def job_id(number: int) -> str:
    return f"job-{number:06d}"


def _is_json(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("{", "["))


async def fill(path: Path, load: Load) -> None:
    """Makes the tables by the gateway's own migrations, and fills them past its routes."""
    database = Database(f"sqlite+aiosqlite:///{path}")
    await database.open()
    await database.close()
    await asyncio.to_thread(_fill, path, load)


def _fill(path: Path, load: Load) -> None:
    spec = json.dumps({"name": "job", "train": {"steps": 400}, "tasks": {"options": {"text": "x" * 3000}}})
    progress = json.dumps({"phase": "train", "step": 400, "steps": 400, "reward/mean": 0.93, "policy_version": 400})
    body = json.dumps({"step": 17, "steps": 400, "metrics": {f"metric/{n}": n / 7 for n in range(12)}})
    ended = json.dumps({"state": "succeeded", "message": ""})
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        rows = (
            (job_id(n), f"p{n % PROJECTS}", STATES[n // PROJECTS % 3], spec, 1.7e9 + n, 1.7e9 + n, progress)
            for n in range(load.jobs)
        )
        connection.executemany(
            "INSERT INTO jobs (id, project, name, state, spec, error, created_at, updated_at, progress, cursor) "
            "VALUES (?, ?, 'job', ?, ?, '', ?, ?, ?, '0')",
            rows,
        )
        each = load.events // load.jobs
        for first in range(0, load.events, _BATCH):
            # Interleaved, as jobs that run at one time write them; each job's last one is its end.
            events = (
                (
                    job_id(n % load.jobs),
                    1.7e9 + n,
                    *(("state", ended) if n // load.jobs == each - 1 else ("step", body)),
                )
                for n in range(first, min(first + _BATCH, load.events))
            )
            connection.executemany("INSERT INTO job_events (job, time, type, body) VALUES (?, ?, ?, ?)", events)
        connection.commit()


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The gateway's application on loopback, without jobs to run, and a client with a key of one project."""
    stop = asyncio.Event()
    database = Database(f"sqlite+aiosqlite:///{path}")
    store, projects, keys = JobStore(database), Projects(database), ApiKeys(database)
    redis, launcher = broker.connect("unix:///nonexistent"), SupervisorClient("unix:///nonexistent")
    runs = path.parent / "runs"
    services = Services(
        jobs=Jobs(store, projects, check_document, runs),
        books=Books(redis, runs),
        rollouts=Rollouts(redis, runs),
        versions=Versions("unix:///nonexistent", lambda name: JobPaths(runs / name, runs / name / "key")),
        units=Units(launcher),
        keys=keys,
        projects=projects,
        audit=AuditLog(database),
        sites=SiteAccess(None, SiteCertificates(database), keys, SiteUsers(redis)),
        authenticate=Authenticator(keys, "root", Rate(1e9, 10**9)),
        rotate=_rotate,
        runs_dir=runs,
    )
    _, key = await keys.create("p0", Role.VIEWER, "benchmark", None)
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def on_listening(address: str) -> None:
        listening.set_result(address)

    task: Awaitable[None] = asyncio.create_task(
        serve_http(make_app(services, stop), "127.0.0.1:0", 1.0, stop, on_listening)
    )
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=f"http://{await listening}", headers=headers, timeout=30) as http:
        yield http
    stop.set()
    await task
    await launcher.close()
    await redis.aclose()
    await database.close()


async def _rotate(job: Job) -> str:
    raise AssertionError("nothing is rotated here")


if __name__ == "__main__":
    sys.exit(run(__doc__ or "", measure))
