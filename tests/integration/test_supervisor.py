"""The supervisor with real processes: tiny programs that listen on the port they were given."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from local_processes import alive, wait_until

from longshore.errors import Conflict, Rejected, Unavailable
from longshore.launcher.client import SupervisorClient
from longshore.launcher.deaths import Rules
from longshore.launcher.plan import STACK_UNIT
from longshore.launcher.service import SupervisorService
from longshore.launcher.spec import ProcessSpec, ProcessState, ProcessStatus, Ready, ReadyKind, UnitState, UnitStatus
from longshore.launcher.supervisor import Supervisor
from longshore.proto.v1.supervisor_pb2_grpc import add_SupervisorServiceServicer_to_server
from longshore.rpc.server import RpcServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

LISTEN = """
import os, socket, time
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
server.bind(("127.0.0.1", int(os.environ["PORT"])))
server.listen()
"""
SERVE = LISTEN + "time.sleep(600)\n"
DIE = "import sys; print('cannot: no such dragon'); sys.exit(3)\n"
RULES = Rules(first_backoff=0.02, max_backoff=0.1, grace=5.0, probe_every=0.01)
DEADLINE_S = 20.0


async def port_open(ready: Ready) -> bool:
    host, _, port = ready.address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(port_open, RULES)
    yield supervisor
    supervisor.hurry()
    await supervisor.close(STACK_UNIT)


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., ProcessSpec]:
    def make(name: str, program: str, **more: bool) -> ProcessSpec:
        return ProcessSpec(
            name=name,
            service="test",
            argv=(sys.executable, "-I", "-S", "-u", "-c", program),
            env={"PORT": f"${{PORT:{name}}}"},
            log_path=tmp_path / "logs" / f"{name}.log",
            ready=Ready(ReadyKind.GRPC, f"127.0.0.1:${{PORT:{name}}}"),
            **more,
        )

    return make


async def until(supervisor: Supervisor, unit: str, condition: Callable[[UnitStatus], bool]) -> UnitStatus:
    async with asyncio.timeout(DEADLINE_S):
        async for units in supervisor.watch():
            for status in units:
                if status.unit == unit and condition(status):
                    return status
    raise AssertionError("a watch does not end")


def log_of(process: ProcessStatus) -> str:
    return Path(process.log_path).read_text()


def is_ready(status: UnitStatus) -> bool:
    return status.ready


async def test_a_killed_process_is_started_again_on_its_port(supervisor, process) -> None:
    await supervisor.apply("job", [process("a", "import os; print(os.environ['PORT'])\n" + SERVE)])
    before = (await until(supervisor, "job", is_ready)).processes[0]
    os.kill(before.pid, signal.SIGKILL)
    status = await until(supervisor, "job", lambda status: status.ready and status.processes[0].restarts == 1)
    after = status.processes[0]
    assert after.pid != before.pid
    assert after.exit_code == -signal.SIGKILL
    ports = log_of(after).split()
    assert len(ports) == 2
    assert ports[0] == ports[1]


async def answers(ready: Ready) -> bool:
    """As the real probe does: whether the process itself says something, within a time."""
    host, _, port = ready.address.rpartition(":")
    try:
        async with asyncio.timeout(0.2):
            reader, writer = await asyncio.open_connection(host, int(port))
            said = await reader.read(2)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return said == b"ok"


ANSWER = LISTEN + "while True:\n    client, _ = server.accept()\n    client.sendall(b'ok')\n    client.close()\n"


async def test_a_process_that_stops_answering_is_killed_and_started_again(process) -> None:
    supervisor = Supervisor(answers, replace(RULES, look_every=0.02, max_silent_looks=3))
    await supervisor.apply("job", [process("a", ANSWER), process("b", ANSWER)])
    stopped = (await until(supervisor, "job", is_ready)).processes[0]
    os.kill(stopped.pid, signal.SIGSTOP)
    status = await until(supervisor, "job", lambda status: status.ready and status.processes[0].restarts == 1)
    assert status.processes[0].exit_code == -signal.SIGKILL
    assert not alive(stopped.pid)
    assert status.processes[1].restarts == 0, "it answered all the time"
    assert "a did not answer 3 times in a row" in log_of(status.processes[0])
    await supervisor.close(STACK_UNIT)


WORK = LISTEN + "while True:\n    sum(range(10_000))\n"


@pytest.mark.parametrize("most", [5, 10_000])
async def test_a_process_that_works_and_does_not_answer_gets_longer(process, most: int) -> None:
    looks, many = 0, asyncio.Event()

    async def once(ready: Ready) -> bool:
        nonlocal looks
        looks += 1
        if looks == 50:
            many.set()
        return looks == 1

    # Apart enough for a tick of processor time between two looks, whatever else runs.
    rules = replace(RULES, look_every=0.05, max_silent_looks=25, max_busy_looks=most)
    supervisor = Supervisor(once, rules)
    await supervisor.apply("job", [process("a", WORK)])
    if most == 5:
        await until(supervisor, "job", lambda status: status.processes[0].restarts == 1)
    else:
        await asyncio.wait_for(many.wait(), DEADLINE_S)
        assert supervisor.snapshot()[0].processes[0].restarts == 0
    supervisor.hurry()
    await supervisor.close(STACK_UNIT)


async def test_silence_now_and_then_is_forgiven(process) -> None:
    looks, many = 0, asyncio.Event()

    async def two_of_three(ready: Ready) -> bool:
        nonlocal looks
        looks += 1
        if looks == 100:
            many.set()
        return looks % 3 == 1

    supervisor = Supervisor(two_of_three, replace(RULES, look_every=0.001, max_silent_looks=3))
    await supervisor.apply("job", [process("a", SERVE)])
    await asyncio.wait_for(many.wait(), DEADLINE_S)
    assert supervisor.snapshot()[0].processes[0].restarts == 0
    await supervisor.close(STACK_UNIT)


async def test_a_process_that_drains_need_not_answer(process, tmp_path: Path) -> None:
    """It says that it does not serve, from SIGTERM to its end."""
    draining = tmp_path / "draining"

    async def until_draining(ready: Ready) -> bool:
        return await port_open(ready) and not draining.exists()

    supervisor = Supervisor(until_draining, replace(RULES, look_every=0.001, max_silent_looks=1))
    end = f"def end(*_):\n    open({str(draining)!r}, 'w'); time.sleep(0.5); print('drained'); sys.exit(0)\n"
    await supervisor.apply(
        "job", [process("a", f"import signal, sys\n{end}signal.signal(signal.SIGTERM, end)\n" + SERVE)]
    )
    status = (await until(supervisor, "job", is_ready)).processes[0]
    await supervisor.remove("job", "test")
    assert "drained" in log_of(status)


async def test_three_deaths_fail_the_unit_and_stop_the_rest(supervisor, process) -> None:
    await supervisor.apply("other", [process("c", SERVE)])
    await supervisor.apply("job", [process("a", SERVE), process("b", DIE)])
    failed = await until(supervisor, "job", lambda status: status.state is UnitState.FAILED)
    assert "b died 3 times in a row without becoming ready (exit code 3)" in failed.message
    assert "cannot: no such dragon" in failed.message
    assert failed.processes[1].log_path in failed.message
    assert log_of(failed.processes[1]).count("dragon") == 3
    pid = failed.processes[0].pid
    await until(supervisor, "job", lambda status: status.processes[0].state is ProcessState.EXITED)
    assert not alive(pid)
    # No unit's end touches another.
    assert (await until(supervisor, "other", is_ready)).state is UnitState.RUNNING


async def test_becoming_ready_forgives_earlier_deaths(process) -> None:
    supervisor = Supervisor(port_open, replace(RULES, max_short_failures=100))
    await supervisor.apply("job", [process("a", LISTEN + "time.sleep(0.2)\n")])
    status = await until(supervisor, "job", lambda status: status.processes[0].restarts >= 4)
    assert status.state is UnitState.RUNNING
    await supervisor.close(STACK_UNIT)


async def test_wrong_settings_are_a_failed_start_whatever_came_before(supervisor, process) -> None:
    await supervisor.apply("job", [process("a", LISTEN + "time.sleep(0.2); raise SystemExit(2)\n")])
    failed = await until(supervisor, "job", lambda status: status.state is UnitState.FAILED)
    assert "died 3 times in a row" in failed.message
    assert "exit code 2" in failed.message


@pytest.mark.parametrize(
    ("program", "limit"),
    [("raise SystemExit(1)", {"max_short_failures": 4}), ("os.kill(os.getpid(), 9)", {"max_short_lives": 4})],
)
async def test_the_same_death_again_and_again_ends_at_last(process, program: str, limit: dict[str, int]) -> None:
    supervisor = Supervisor(port_open, replace(RULES, **limit))
    await supervisor.apply("job", [process("a", LISTEN + f"time.sleep(0.2); {program}\n")])
    failed = await until(supervisor, "job", lambda status: status.state is UnitState.FAILED)
    assert "died 4 times in a row, each time within" in failed.message


async def test_a_process_that_is_killed_now_and_then_is_kept(supervisor, process) -> None:
    """Signals are not its own failures: five of those would have been too many."""
    await supervisor.apply("job", [process("a", SERVE)])
    for restarts in range(RULES.max_short_failures + 1):
        status = await until(
            supervisor, "job", lambda status, n=restarts: status.ready and status.processes[0].restarts == n
        )
        os.kill(status.processes[0].pid, signal.SIGKILL)
    await until(supervisor, "job", lambda status: status.ready and status.processes[0].restarts == restarts + 1)


async def test_never_becoming_ready_counts_as_a_death(process) -> None:
    supervisor = Supervisor(port_open, Rules(first_backoff=0.01, start_timeout=0.2, probe_every=0.01))
    await supervisor.apply("job", [process("a", "import time; time.sleep(600)")])
    failed = await until(supervisor, "job", lambda status: status.state is UnitState.FAILED)
    assert "without becoming ready (SIGKILL)" in failed.message


async def test_the_completing_process_ends_the_unit(supervisor, process) -> None:
    learner = process("learner", LISTEN + "time.sleep(0.2)\n", completes_unit=True)
    await supervisor.apply("job", [learner, process("actor", SERVE)])
    pid = (await until(supervisor, "job", lambda status: status.processes[1].pid > 0)).processes[1].pid
    await until(supervisor, "job", lambda status: status.state is UnitState.SUCCEEDED)
    await supervisor.remove("job", "over")
    assert not alive(pid)
    assert supervisor.snapshot() == []


async def test_helpers_of_a_dead_process_go_with_it(supervisor, process, tmp_path: Path) -> None:
    helper = tmp_path / "helper.pid"
    fork = "import os, time\npid = os.fork()\nif not pid:\n    time.sleep(600)\n"
    start = fork + f"open({str(helper)!r}, 'w').write(str(pid))\n"
    await supervisor.apply("job", [process("a", start + SERVE)])
    status = await until(supervisor, "job", is_ready)
    pid = int(helper.read_text())
    assert alive(pid)
    os.kill(status.processes[0].pid, signal.SIGKILL)
    await until(supervisor, "job", lambda status: status.processes[0].restarts == 1)
    assert not alive(pid)


STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: print('not yet'))\n" + SERVE.replace(
    "time.sleep(600)", "[time.sleep(1) for _ in range(600)]"
)


async def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(process) -> None:
    supervisor = Supervisor(port_open, Rules(grace=0.2, probe_every=0.01))
    await supervisor.apply("job", [process("a", STUBBORN)])
    status = (await until(supervisor, "job", is_ready)).processes[0]
    await supervisor.remove("job", "test")
    assert not alive(status.pid)
    assert "not yet" in log_of(status)


async def test_hurry_does_not_wait_for_the_grace(process) -> None:
    supervisor = Supervisor(port_open, Rules(grace=300.0, probe_every=0.01))
    await supervisor.apply("job", [process("a", STUBBORN)])
    status = (await until(supervisor, "job", is_ready)).processes[0]
    removing = asyncio.create_task(supervisor.remove("job", "test"))
    await asyncio.sleep(0)
    supervisor.hurry()
    await asyncio.wait_for(removing, DEADLINE_S)
    assert not alive(status.pid)


async def test_apply_is_idempotent_and_refuses_another_plan(supervisor, process) -> None:
    specs = [process("a", SERVE)]
    await supervisor.apply("job", specs)
    pid = (await until(supervisor, "job", is_ready)).processes[0].pid
    await supervisor.apply("job", list(specs))
    assert [status.processes[0].pid for status in supervisor.snapshot()] == [pid]
    with pytest.raises(Conflict, match="other processes"):
        await supervisor.apply("job", [process("b", SERVE)])
    with pytest.raises(Conflict, match="twice"):
        await supervisor.apply("job2", [*specs, *specs])


async def test_close_stops_the_stack_last_and_in_reverse(supervisor, process, tmp_path: Path) -> None:
    order = tmp_path / "order"

    def told(name: str) -> str:
        say = f"open({str(order)!r}, 'a').write({name!r} + ' '); sys.exit(0)"
        return f"import signal, sys\ndef end(*_):\n    {say}\nsignal.signal(signal.SIGTERM, end)\n" + SERVE

    await supervisor.apply(STACK_UNIT, [process("broker", told("broker")), process("gateway", told("gateway"))])
    await supervisor.apply("job", [process("actor", told("actor"))])
    for unit in (STACK_UNIT, "job"):
        await until(supervisor, unit, is_ready)
    await supervisor.close(STACK_UNIT)
    assert order.read_text().split() == ["actor", "gateway", "broker"]
    with pytest.raises(Conflict, match="shutting down"):
        await supervisor.apply("late", [process("late", SERVE)])


async def test_a_program_that_is_not_there(supervisor, process) -> None:
    missing = process("a", SERVE)
    missing = ProcessSpec(**{**vars(missing), "argv": ("/nowhere/valkey-server",)})
    await supervisor.apply("job", [missing])
    failed = await until(supervisor, "job", lambda status: status.state is UnitState.FAILED)
    assert "cannot start /nowhere/valkey-server: No such file" in failed.message


SUPERVISE = """
import asyncio, sys
from pathlib import Path
from longshore.launcher.spec import ProcessSpec, Ready, ReadyKind
from longshore.launcher.supervisor import Supervisor

CHILD = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"

async def never(ready):
    return False

async def main():
    argv = (sys.executable, "-I", "-S", "-c", CHILD)
    ready = Ready(ReadyKind.GRPC, "127.0.0.1:1")
    specs = [ProcessSpec(name, name, argv, {}, Path(sys.argv[1]) / name, ready) for name in "ab"]
    await Supervisor(never).apply("job", specs)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_no_process_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    logs = [tmp_path / name for name in "ab"]
    with subprocess.Popen([sys.executable, "-c", SUPERVISE, str(tmp_path)], stdout=subprocess.DEVNULL) as parent:
        wait_until(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs), what="the start")
        pids = [int(log.read_text()) for log in logs]
        assert all(alive(pid) for pid in pids)
        parent.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids), what="the death of the children")


@contextlib.asynccontextmanager
async def over_the_wire(supervisor: Supervisor, folder: str) -> AsyncIterator[SupervisorClient]:
    server = RpcServer(f"unix:{folder}/s.sock")
    add_SupervisorServiceServicer_to_server(SupervisorService(supervisor), server.server)
    await server.start()
    client = SupervisorClient(server.listen)
    try:
        yield client
    finally:
        await client.close()
        await server.drain(0)


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A socket's path is limited to about 100 bytes: pytest's own folders can be longer."""
    with tempfile.TemporaryDirectory(prefix="ls-", dir="/tmp") as folder:
        yield folder


async def test_the_service_applies_watches_and_removes(supervisor, process, short_folder: str) -> None:
    async with over_the_wire(supervisor, short_folder) as client, asyncio.timeout(DEADLINE_S):
        specs = [process("learner", SERVE, completes_unit=True), process("actor", SERVE)]
        await client.apply("job", specs)
        await client.apply("job", specs)
        async for units in client.watch():
            if units["job"].ready:
                break
        assert list(units.values()) == supervisor.snapshot()
        with pytest.raises(Conflict):
            await client.apply("job", specs[:1])
        with pytest.raises(Rejected, match="how it becomes ready"):
            await client.apply("job2", [ProcessSpec(**{**vars(specs[0]), "ready": Ready(ReadyKind.GRPC, "")})])
        await client.remove("job", "test")
        await client.remove("job", "test")
    assert supervisor.snapshot() == []


async def test_an_absent_supervisor_is_unavailable(short_folder: str, process) -> None:
    client = SupervisorClient(f"unix:{short_folder}/nobody.sock")
    try:
        with pytest.raises(Unavailable):
            await client.apply("job", [process("a", SERVE)])
    finally:
        await client.close()
