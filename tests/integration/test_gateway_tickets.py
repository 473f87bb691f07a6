"""The routes and commands about a job's tickets, over the real gateway and broker: ledger, dead letters, verdicts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from gateway_bench import KEY, GatewayBench

from longshore.cli import main
from longshore.client import ApiClient, answers
from longshore.console import tickets as commands
from longshore.launcher.spec import UnitState
from longshore.proto.v1 import verdict_pb2
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rpc import convert
from longshore.types import JobRef

Shell = Callable[..., "asyncio.Future[tuple[int, str, str]]"]


@pytest.fixture
def bench(bench: GatewayBench, monkeypatch: pytest.MonkeyPatch) -> GatewayBench:
    monkeypatch.setattr(commands, "open_client", lambda: ApiClient(bench.url, KEY))
    return bench


@pytest.fixture
async def job(bench: GatewayBench, make_bench):
    """A running job: one ticket ended as a dead letter, one awaits its verdict, two are queued."""
    queues = make_bench(bench.redis, JobRef("default", await bench.running()))
    await queues.issued(4)
    lost, unscored, *_ = await queues.tickets.claim("actor-0", 2, 0)
    await queues.tickets.reject(lost, "prompt_too_long", "65 tokens, at most 64")
    await queues.rollouts.deliver(unscored, b"a rollout", awaiting_verdict=True)
    return queues


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs the command beside this test's own loop."""

    async def call(*arguments: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(main, list(arguments))
        return (code, *capsys.readouterr())

    return call


def good(ticket: str = "0.1", **more: object) -> dict[str, object]:
    return {"ticket": ticket, "reward": 0.5, "verifier": "people@1", **more}


async def test_the_ledger_adds_up_by_site(bench: GatewayBench, job) -> None:
    await job.redis.hincrby(job.keys.counts, "state:queued@home", -1)
    await job.redis.hincrby(job.keys.counts, "state:running@west", 1)
    await bench.channel(job.job.job).publish(
        {"type": "step", "step": 3, "steps": 9, "metrics": {"tickets/issued": 4.0}}
    )
    async with ApiClient(bench.url, KEY) as client:

        async def told() -> bool:
            return (await client.ledger(job.job.job))["learner"] is not None

        await bench.until(told)
        view = await client.ledger(job.job.job)
    assert (view["issued"], view["balanced"], view["bytes_waiting"]) == (4, True, 9)
    assert view["learner"] == {"issued": 4, "at_step": 3}
    assert view["by_site"] == {
        "home": {"awaiting_verdict": 1, "prompt_too_long": 1, "queued": 1},
        "west": {"running": 1},
    }
    assert view["issued"] == sum(view["states"].values())


async def test_the_commands_show_it_in_80_columns(bench: GatewayBench, job, shell: Shell) -> None:
    code, out, _ = await shell("ledger", job.job.job)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"{job.job.job}: 4 tickets issued, each in exactly one state"
    assert " ".join(lines[2].split()) == "SITE QUEUED RUNNING SPOOLED UNJUDGED DONE TRAINED OTHER ISSUED"
    assert " ".join(lines[3].split()) == "home 2 0 0 1 0 0 1 4"
    assert "other: prompt_too_long 1" in lines
    assert max(map(len, lines)) <= 80
    _, out, _ = await shell("ledger", job.job.job, "--json")
    assert json.loads(out)["issued"] == 4
    await job.redis.hincrby(job.keys.counts, "issued", 1)
    _, out, _ = await shell("ledger", job.job.job)
    assert "THE LEDGER DOES NOT ADD UP" in out


async def test_dead_letters_are_listed_shown_and_requeued(bench: GatewayBench, job, shell: Shell) -> None:
    name = job.job.job
    code, out, _ = await shell("dead-letters", "list", name, "--json")
    (letter,) = json.loads(out)
    assert (code, letter["ticket"], letter["reason"], letter["kind"]) == (0, "0.0", "prompt_too_long", "ticket")
    _, out, _ = await shell("dead-letters", "list", name)
    assert len(out.splitlines()) == 2
    assert all(len(line) <= 80 for line in out.splitlines())
    code, out, _ = await shell("dead-letters", "show", name, letter["id"])
    assert code == 0
    assert "65 tokens, at most 64" in out
    assert "user: Spell 0 backward" in out
    code, out, _ = await shell("dead-letters", "requeue", name, letter["id"])
    assert (code, out) == (0, f"{letter['id']} will be attempted again\n")
    ((_, task),) = await bench.channel(name).requeues()
    assert b"Spell 0 backward" in task


@pytest.mark.parametrize(
    "arguments",
    [
        ("ledger", "nobody"),
        ("dead-letters", "list", "nobody"),
        ("dead-letters", "show", "JOB", "1-1"),
        ("dead-letters", "show", "JOB", "x y?z"),
        ("dead-letters", "requeue", "JOB", "x"),
    ],
)
async def test_what_is_not_there_is_one_line_and_exit_code_2(job, shell: Shell, arguments: tuple[str, ...]) -> None:
    code, out, err = await shell(*[job.job.job if argument == "JOB" else argument for argument in arguments])
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("longshore: there is no ")


async def test_a_letter_without_its_task_cannot_be_requeued(bench: GatewayBench, job, shell: Shell) -> None:
    letter = await job.redis.xadd(job.keys.dead, {"kind": "rollout", "key": "9.9", "reason": "unknown_ticket"})
    code, _, err = await shell("dead-letters", "requeue", job.job.job, letter.decode())
    assert code == 2
    assert "does not say which task" in err


async def test_many_letters_are_read_page_by_page(bench: GatewayBench, job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PAGE", 3)
    for number in range(7):
        await job.redis.xadd(job.keys.dead, {"kind": "rollout", "key": f"1.{number}", "reason": "x"})
    async with ApiClient(bench.url, KEY) as client:
        found = [letter["ticket"] async for letter in client.dead_letters(job.job.job)]
    assert found == ["0.0", *[f"1.{number}" for number in range(7)]]


async def test_a_verdict_reaches_the_learner_once(bench: GatewayBench, job) -> None:
    queue = RolloutQueue(bench.redis, job.job)
    async with bench.http() as http:
        path = f"/v1/jobs/{job.job.job}/verdicts"
        answer = await http.post(path, json=good(breakdown={"style": 1}, reason="well put"))
        assert (answer.status_code, answer.json()) == (202, {"accepted": "0.1"})
        again = await http.post(path, json=good())
        assert (again.status_code, again.headers["content-type"]) == (409, "application/problem+json")
        assert (await http.post(path, json=good("0.3"))).status_code == 409
        assert (await http.post(path, json=good("7.7"))).status_code == 404
    *_, last = await queue.read(10, 0)
    assert last.ticket_key == "0.1"
    verdict = convert.verdict_from_proto(verdict_pb2.Verdict.FromString(last.verdict))
    assert (verdict.reward, verdict.breakdown, verdict.reason) == (0.5, {"style": 1.0}, "well put")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b'{"ticket": "0.1", "reward": NaN, "verifier": "x"}', "reward"),
        (b'{"ticket": "0.1", "reward": 1e7, "verifier": "x"}', "reward"),
        (b'{"ticket": "0.1", "reward": "1", "verifier": "x"}', "reward"),
        (b'{"ticket": "00.1", "reward": 1, "verifier": "x"}', "ticket"),
        (b'{"ticket": "0.1", "reward": 1}', "verifier"),
        (b'{"ticket": "0.1", "reward": 1, "verifier": "x", "rewardz": 1}', "rewardz"),
        (b'{"ticket": "0.1", "reward": 1, "verifier": "x", "breakdown": {"a": Infinity}}', "breakdown"),
        (b'{"ticket": "0.1", "reward": 1, "verifier": "\\ud800"}', "body.verifier"),
        (b'{"ticket": "0.1", "reward": 1, "verifier": "x", "breakdown": {"\\ud800": 1}}', "breakdown"),
        (b"[]", "body"),
        (b"{", None),
    ],
)
async def test_a_verdict_that_is_none_is_refused(bench: GatewayBench, job, body: bytes, fault: str | None) -> None:
    async with bench.http() as http:
        headers = {"Content-Type": "application/json"}
        answer = await http.post(f"/v1/jobs/{job.job.job}/verdicts", content=body, headers=headers)
    assert answer.headers["content-type"] == "application/problem+json"
    if fault is None:
        assert answer.status_code == 400
    else:
        assert answer.status_code == 422, answer.text
        assert any(fault in item["path"] for item in answer.json()["faults"])


async def test_the_books_outlive_the_job(bench: GatewayBench, job, shell: Shell) -> None:
    name = job.job.job
    async with ApiClient(bench.url, KEY) as client:
        before = await client.ledger(name)
        (letter,) = [letter async for letter in client.dead_letters(name)]
        bench.launcher.becomes(name, UnitState.FAILED, "x")
        await bench.until_state(name, "failed")

        async def forgotten() -> bool:
            return not await bench.redis.exists(job.keys.counts)

        await bench.until(forgotten)
        assert await client.ledger(name) == before
        assert [kept async for kept in client.dead_letters(name)] == [letter]
        assert (await client.dead_letter(name, letter["id"]))["detail"] == letter["detail"]
    code, _, err = await shell("dead-letters", "requeue", name, letter["id"])
    assert (code, err) == (2, f"longshore: job {name} is failed\n")
    assert (await shell("dead-letters", "show", name, "1-1"))[0] == 2
