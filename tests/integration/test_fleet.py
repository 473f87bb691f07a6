"""The launcher over workers with real workers and real processes: what it gives out, takes back and gives again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest
from local_processes import alive, wait_until
from processes import free_port

from longshore.errors import Busy, Rejected
from longshore.gateway.units import Units
from longshore.launcher.client import SupervisorClient
from longshore.launcher.connect import connect_launcher
from longshore.launcher.fleet import Fleet
from longshore.launcher.kubernetes.scale import Demand
from longshore.launcher.plan import Endpoints, JobPaths, plan_job
from longshore.launcher.spec import ProcessSpec, UnitState, UnitStatus
from longshore.launcher.worker_sockets import find_workers
from longshore.settings import JobFile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

DEADLINE_S = 60.0


class Workers:
    """`longshore wait SERVICE` as subprocesses; each is a host of its own, as a container would be."""

    def __init__(self, folder: Path, sockets: Path) -> None:
        self.folder, self.sockets = folder, sockets
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.metrics: dict[str, int] = {}

    def start(self, service: str, places: int = 4) -> None:
        self.metrics[service] = free_port()
        env = {
            **os.environ,
            "LONGSHORE_SOCKETS_DIR": str(self.sockets),
            "LONGSHORE_PLACES": str(places),
            "LONGSHORE_METRICS_LISTEN": f"127.0.0.1:{self.metrics[service]}",
        }
        with (self.folder / f"{service}-worker.log").open("ab") as log:
            argv = [sys.executable, "-m", "longshore", "wait", service]
            self.running[service] = subprocess.Popen(argv, env=env, stdout=log, stderr=log)

    def kill(self, service: str) -> None:
        process = self.running.pop(service)
        process.kill()
        process.wait(timeout=10)

    def stop(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait(timeout=30)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    # A socket's path is short.
    with tempfile.TemporaryDirectory(prefix="ls-fleet-") as sockets:
        workers = Workers(tmp_path, Path(sockets))
        yield workers
        workers.stop()


async def _nothing_waits(job: str, project: str, site: str) -> Demand:
    return Demand(0, 0)


@contextlib.asynccontextmanager
async def followed(sockets: Path) -> AsyncIterator[tuple[Fleet, Units]]:
    fleet = connect_launcher(f"workers:{sockets}", _nothing_waits)
    assert isinstance(fleet, Fleet)
    units = Units(fleet)
    following = asyncio.create_task(units.run())
    await asyncio.wait_for(units.known.wait(), DEADLINE_S)
    try:
        yield fleet, units
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def until(units: Units, unit: str, condition: Callable[[UnitStatus | None], bool]) -> UnitStatus | None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition(units.get(unit)):  # noqa: ASYNC110 - what changes is in another task's hands
            await asyncio.sleep(0.05)
    return units.get(unit)


async def applied(fleet: Fleet, unit: str, specs: list[ProcessSpec]) -> None:
    """As a driver does it: again and again, until the workers are there."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await fleet.apply(unit, specs)
            except Busy:
                await asyncio.sleep(0.1)
            else:
                return


def is_ready(status: UnitStatus | None) -> bool:
    return status is not None and status.ready


def job(folder: Path, name: str, **resources: int) -> list[ProcessSpec]:
    """The plan of a job whose verifier and actors can be run without learner and generator."""
    document = {
        "name": "j",
        "tasks": {"source": "jsonl", "path": "x.jsonl"},
        "verifier": {"name": "exact-match"},
        "train": {"steps": 3},
        "resources": resources,
    }
    file = JobFile.model_validate({"project": "p", "job": name, "spec": document, "learner_public_key": "ab" * 32})
    paths = JobPaths(folder / name, folder / f"{name}.key")
    paths.run_dir.mkdir(exist_ok=True)
    paths.job_file.write_text(file.model_dump_json())
    plan = plan_job(file, Endpoints("redis://127.0.0.1:1", "unix:/nowhere"), paths)
    return [spec for spec in plan if spec.service in ("verifier", "actor")]


def pid(status: UnitStatus | None, name: str) -> int:
    assert status is not None
    return next(process.pid for process in status.processes if process.name == name)


async def test_a_job_is_shared_out_survives_the_death_of_a_worker_and_goes(workers: Workers, tmp_path: Path) -> None:
    workers.start("verifier")
    workers.start("actor")
    specs = job(tmp_path, "j-1", actors=2)
    async with followed(workers.sockets) as (fleet, units):
        await applied(fleet, "j-1", specs)
        await fleet.apply("j-1", specs)
        first = await until(units, "j-1", is_ready)
        assert first is not None
        assert [process.name for process in first.processes] == ["verifier-0", "actor-0", "actor-1"]
        others = [pid(first, name) for name in ("actor-0", "actor-1")]

        body = await asyncio.to_thread(scrape, workers.metrics["actor"])
        assert 'process="actor-0"' in body
        assert 'process="actor-1"' in body
        assert 'longshore_build_info{service="actor-worker"' in body

        workers.kill("verifier")
        await until(units, "j-1", lambda status: not is_ready(status))
        wait_until(lambda: not alive(pid(first, "verifier-0")), DEADLINE_S)
        workers.start("verifier")
        again = await until(units, "j-1", is_ready)
        assert again is not None
        assert pid(again, "verifier-0") != pid(first, "verifier-0")
        assert [pid(again, name) for name in ("actor-0", "actor-1")] == others, "they had nothing to do with it"
        assert next(process.restarts for process in again.processes if process.name == "verifier-0") == 1

    # Another gateway finds what runs, and changes nothing.
    async with followed(workers.sockets) as (fleet, units):
        assert units.get("j-1") is not None
        await fleet.apply("j-1", specs)
        found = await until(units, "j-1", is_ready)
        assert {process.pid for process in found.processes} == {process.pid for process in again.processes}
        await fleet.remove("j-1", "the test is over")
        assert await until(units, "j-1", lambda status: status is None) is None
    assert not any(alive(process.pid) for process in again.processes)


async def test_a_job_waits_for_room_and_a_process_given_up_ends_the_others(workers: Workers, tmp_path: Path) -> None:
    workers.start("verifier", places=1)
    workers.start("actor", places=1)
    async with followed(workers.sockets) as (fleet, units):
        await applied(fleet, "j-1", job(tmp_path, "j-1", actors=1))
        await until(units, "j-1", is_ready)
        with pytest.raises(Busy, match="each of the 1 places for verifier processes is taken"):
            await fleet.apply("j-2", job(tmp_path, "j-2", actors=1))
        assert set(units.current) == {"j-1"}
        # A verifier that cannot read its job dies again and again.
        (tmp_path / "j-1" / "job.json").write_text("{}")
        status = units.get("j-1")
        os.kill(pid(status, "verifier-0"), signal.SIGKILL)
        ended = await until(units, "j-1", lambda status: status is not None and status.state is not UnitState.RUNNING)
        assert ended is not None
        assert ended.state is UnitState.FAILED
        assert "verifier-0 died 3 times" in ended.message
        wait_until(lambda: not alive(pid(status, "actor-0")), DEADLINE_S)
        # Its places are free, although nobody has removed it yet.
        await fleet.apply("j-2", job(tmp_path, "j-2", actors=1))
        await until(units, "j-2", is_ready)


async def test_a_process_moves_when_its_worker_stays_away(workers: Workers, tmp_path: Path) -> None:
    workers.start("verifier")
    workers.start("actor")
    async with followed(workers.sockets) as (fleet, units):
        await applied(fleet, "j-1", job(tmp_path, "j-1", actors=1))
        await until(units, "j-1", is_ready)
        workers.kill("verifier")
        # Other places, so another name: another worker.
        workers.start("verifier", places=2)
        await until(units, "j-1", lambda status: not is_ready(status))
        await until(units, "j-1", is_ready)
        assert len(find_workers(workers.sockets)) == 3, "the dead one's socket is still there"


async def test_a_worker_runs_its_own_service_alone(workers: Workers, tmp_path: Path) -> None:
    workers.start("verifier")
    spec = next(spec for spec in job(tmp_path, "j-1") if spec.service == "verifier")
    (path,) = await asyncio.to_thread(await_sockets, workers.sockets)
    client = SupervisorClient(f"unix:{path}")
    try:
        other = ProcessSpec("x", "learner", spec.argv, spec.env, spec.log_path, spec.ready)
        with pytest.raises(Rejected, match="runs one verifier"):
            await client.apply("j/x", [other])
        armed = ProcessSpec("x", "verifier", spec.argv, {"LD_PRELOAD": "x.so"}, spec.log_path, spec.ready)
        with pytest.raises(Rejected, match="LD_PRELOAD"):
            await client.apply("j/x", [armed])
        # Whatever program is asked for, the worker's own runs.
        stranger = ProcessSpec("x", "verifier", ("sleep", "600"), spec.env, spec.log_path, spec.ready)
        await client.apply("j/x", [stranger])
        async with asyncio.timeout(DEADLINE_S):
            async for said in client.watch():
                if said["j/x"].processes[0].pid:
                    break
        line = await asyncio.to_thread(Path(f"/proc/{said['j/x'].processes[0].pid}/cmdline").read_bytes)
        assert b"sleep" not in line
    finally:
        await client.close()


def await_sockets(folder: Path) -> list[Path]:
    wait_until(lambda: bool(find_workers(folder)), DEADLINE_S)
    (path,) = find_workers(folder)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        grpc.channel_ready_future(channel).result(timeout=DEADLINE_S)
    return [path]


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()
