"""The pool with real scoring processes, honest and otherwise."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import scorers
from local_processes import alive, wait_until

from longshore.config import VerifierSpec
from longshore.errors import PluginError, Rejected, Unavailable
from longshore.tasks.verification import ScoreRequest
from longshore.types import Message, Task, Verdict
from longshore.verifier.pool import PoolLimits, ScoreFailed, ScoreTimeout, VerifierPool

TASK = Task("t", (Message("user", "3+4="),), answer="7", info={"deep": [1, {"x": None}]})
MEMORY = 1024 * 1024 * 1024
# Above what a loaded machine may take for an honest score, and short enough to wait for.
TIMEOUT_S = 2.0
Open = Callable[..., Awaitable[VerifierPool]]


def request(reply: str) -> ScoreRequest:
    return ScoreRequest(TASK, [*TASK.messages, Message("assistant", reply)], reply, [{"guess": 3}])


def is_folder(path: str) -> bool:
    return Path(path).is_dir()


@pytest.fixture
async def open_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    """Opens pools of the scorers in tests/support/scorers.py, and closes them after the test."""
    installed = scorers.install(tmp_path / "site")
    paths = [str(installed), str(Path(__file__).parents[3] / "services")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    pools = []

    async def make(name: str = "scripted", workers: int = 1, max_waiting: int = 100) -> VerifierPool:
        limits = PoolLimits(workers, max_waiting, MEMORY, start_s=60)
        pools.append(VerifierPool(VerifierSpec(name=name, timeout_s=TIMEOUT_S), limits))
        return await pools[-1].__aenter__()

    yield make
    for pool in pools:
        await pool.__aexit__()


async def score(pool: VerifierPool, reply: str) -> Verdict:
    async with asyncio.timeout(60):
        return await pool.score(request(reply))


async def test_a_score_crosses_whole(open_pool: Open) -> None:
    pool = await open_pool()
    verdict = await score(pool, "reward 0.5")
    assert verdict == Verdict(0.5, "scripted@3", {"half": 0.25}, reason="as told")
    echoed = (await score(pool, "echo")).reason
    assert echoed == repr((TASK, [*TASK.messages, Message("assistant", "echo")], [{"guess": 3}]))
    assert pool.ready.is_set()


async def test_a_failed_score_fails_alone(open_pool: Open) -> None:
    pool = await open_pool()
    with pytest.raises(ScoreFailed, match="scripted@3: ValueError: bad luck"):
        await score(pool, "raise bad luck")
    with pytest.raises(ScoreFailed, match="AttributeError"):
        await score(pool, "nothing")
    with pytest.raises(Rejected, match="no such problem"):
        await score(pool, "refuse no such problem")
    for number in ("nan", "inf"):
        with pytest.raises(Rejected, match="not_finite"):
            await score(pool, f"reward {number}")
    # None of them cost the worker its life.
    assert (await score(pool, "count")).reward == 6


async def test_a_worker_that_hangs_is_replaced(open_pool: Open) -> None:
    pool = await open_pool()
    pid = int((await score(pool, "pid")).reward)
    with pytest.raises(ScoreTimeout, match="longer than 2 s"):
        await score(pool, "spin")
    assert (await score(pool, "reward 1")).reward == 1.0
    assert not alive(pid)


async def test_a_worker_that_dies_is_replaced(open_pool: Open) -> None:
    pool = await open_pool()
    with pytest.raises(ScoreFailed, match="ended with exit code 3"):
        await score(pool, "exit 3")
    os.kill(int((await score(pool, "pid")).reward), signal.SIGKILL)
    with pytest.raises(ScoreFailed, match="ended with signal 9"):
        await score(pool, "reward 1")
    assert (await score(pool, "reward 1")).reward == 1.0


async def test_what_a_verifier_prints_or_reads_harms_nothing(open_pool: Open) -> None:
    pool = await open_pool()
    assert (await score(pool, "print")).reward == 0.25
    assert (await score(pool, "read")).reward == 0.5
    assert (await score(pool, "reward 1")).reward == 1.0


async def test_a_worker_is_confined(open_pool: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSHORE_SIGNING_KEY_FILE", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    pool = await open_pool()
    names, folder, files = literal_eval((await score(pool, "env")).reason)
    assert set(names) <= {"PATH", "PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TMPDIR", "LC_CTYPE"}
    assert files == []
    assert is_folder(folder)
    core, open_files, memory = literal_eval((await score(pool, "limits")).reason)
    assert (core, open_files, memory) == ((0, 0), (256, 256), (MEMORY, MEMORY))
    with pytest.raises(ScoreFailed, match="MemoryError"):
        await score(pool, f"eat {2 * MEMORY}")
    assert (await score(pool, "count")).reward == 4
    await pool.__aexit__()
    assert not is_folder(folder)


async def test_what_a_worker_started_ends_with_it(open_pool: Open) -> None:
    pool = await open_pool()
    child = int((await score(pool, "fork")).reward)
    with pytest.raises(ScoreTimeout):
        await score(pool, "spin")
    wait_until(lambda: not alive(child), what="the child's end")


async def test_workers_score_side_by_side(open_pool: Open) -> None:
    pool = await open_pool(workers=2)
    pids = {int((await score(pool, "pid")).reward) for _ in range(1)}
    while len(pids) < 2:
        verdicts = await asyncio.gather(*(score(pool, "sleep 0.05") for _ in range(2)), score(pool, "pid"))
        pids.add(int(verdicts[-1].reward))
    assert len(pids) == 2


async def test_waiting_is_bounded_and_the_gone_are_skipped(open_pool: Open) -> None:
    pool = await open_pool(max_waiting=3)
    await score(pool, "reward 1")
    busy = asyncio.create_task(score(pool, "sleep 1"))
    await asyncio.sleep(0.1)
    waiting = [asyncio.create_task(score(pool, "count")) for _ in range(3)]
    await asyncio.sleep(0.1)
    with pytest.raises(Unavailable, match="3 scores are waiting already"):
        await score(pool, "count")
    waiting[0].cancel()
    waiting[1].cancel()
    # reward, sleep, then the last one: the two whose callers went away cost nothing.
    assert (await waiting[2]).reward == 3
    assert (await busy).reward == 1.0


async def test_a_caller_that_goes_during_its_score_leaves_no_answer_behind(open_pool: Open) -> None:
    pool = await open_pool()
    await score(pool, "reward 1")
    leaving = asyncio.create_task(score(pool, "sleep 0.3"))
    await asyncio.sleep(0.1)
    leaving.cancel()
    # The next caller must not get the answer that nobody waited for.
    assert (await score(pool, "reward 0.125")).reward == 0.125


async def test_an_oversized_request_is_refused(open_pool: Open) -> None:
    pool = await open_pool()
    with pytest.raises(Rejected, match="oversized"):
        await score(pool, "reward 1" + " " * 9_000_000)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unloadable", "cannot be made with its options: RuntimeError.*needs a licence"),
        ("no-such", "'no-such' is not installed; installed: exact-match"),
        ("stillborn", "did not start 3 times: .*exit code 7"),
    ],
)
async def test_a_verifier_that_cannot_start_ends_the_pool(open_pool: Open, name: str, says: str) -> None:
    pool = await open_pool(name)
    async with asyncio.timeout(60):
        with pytest.raises(PluginError, match=says):
            await pool.run(asyncio.Event())


_HOST = """
import asyncio, sys
from longshore.config import VerifierSpec
from longshore.tasks.verification import ScoreRequest
from longshore.types import Task
from longshore.verifier.pool import PoolLimits, VerifierPool

async def main():
    async with VerifierPool(VerifierSpec(name="scripted", timeout_s=60), PoolLimits(1, 9, 2**30, 60)) as pool:
        verdict = await pool.score(ScoreRequest(Task("t", ()), [], "pid"))
        print(int(verdict.reward), flush=True)
        await pool.score(ScoreRequest(Task("t", ()), [], "spin"))
asyncio.run(main())
"""


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    paths = [str(scorers.install(tmp_path / "site")), str(Path(__file__).parents[3] / "services")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen([sys.executable, "-c", _HOST], stdout=subprocess.PIPE, env=environment) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        time.sleep(0.2)
        assert alive(pid)
        host.kill()
    wait_until(lambda: not alive(pid), what="the worker's end")
