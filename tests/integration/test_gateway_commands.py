"""The commands that steer jobs and make keys, over the real gateway."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from gateway_bench import KEY, GatewayBench
from redis.asyncio import Redis
from weight_origin import publish_versions, weight_origin

from longshore.cli import main
from longshore.client import ApiClient
from longshore.console import commands, keys
from longshore.gateway import driver
from longshore.gateway.prepare import job_paths, prepare
from longshore.signing import SigningKey

Shell = Callable[..., "asyncio.Future[tuple[int, str, str]]"]


@pytest.fixture
async def bench(tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GatewayBench]:
    monkeypatch.setattr(driver, "BLOCK_MS", 20)
    bench = GatewayBench(tmp_path, redis)
    async with weight_origin(tmp_path / "weights") as bench.weights:
        await bench.start()
        for module in (commands, keys):
            monkeypatch.setattr(module, "open_client", lambda: ApiClient(bench.url, KEY))
        yield bench
        await bench.stop()


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs the command beside this test's own loop."""

    async def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(main, list(arguments))
        out, err = capsys.readouterr()
        # The gateway runs in this process, and its log comes out here too.
        own = [
            line for line in out.splitlines(keepends=True) if not re.match(r"\d{4}-.* \[(info|warning|error) ", line)
        ]
        return code, "".join(own), err

    return call


async def test_a_job_is_paused_resumed_forked_and_rolled_back(
    bench: GatewayBench, shell: Shell, tmp_path: Path
) -> None:
    job_id = await bench.running()
    paths = job_paths(tmp_path / "runs", tmp_path, job_id)
    file = prepare(await bench.store.get(job_id), paths)
    await publish_versions(bench.weights, file, SigningKey.load(paths.signing_key_file), 3)
    assert (await shell("pause", job_id))[:2] == (0, f"{job_id} is pausing\n")
    await bench.until_state(job_id, "paused")
    assert (await shell("resume", job_id))[:2] == (0, f"{job_id} is queued\n")
    assert (await shell("rollback", job_id, "1"))[:2] == (0, f"{job_id}: serving is version 1\n")
    changes = tmp_path / "changes.yaml"
    changes.write_text("train:\n  steps: 7\n")
    code, out, _ = await shell("fork", job_id, "--version", "2", "--changes", str(changes))
    assert code == 0
    fork = await bench.store.get(out.strip())
    assert (fork.parent_job, fork.parent_version) == (job_id, 2)
    assert fork.spec is not None
    assert fork.spec["train"]["steps"] == 7
    code, _, err = await shell("rollback", job_id, "99")
    assert (code, err.startswith("longshore: ")) == (1, True)


async def test_keys_are_made_listed_rotated_and_revoked(bench: GatewayBench, shell: Shell) -> None:
    assert (await shell("keys", "list"))[2] == "no keys yet; make one with `longshore keys create`\n"
    code, out, err = await shell("keys", "create", "submitter", "--project", "vision", "--name", "nightly")
    assert code == 0
    assert err.startswith(f"key {out.split('_')[1]}: submitter of vision, until 20")
    async with ApiClient(bench.url, out.strip()) as client:
        assert (await client.caller())["project"] == "vision"
    (listed,) = json.loads((await shell("keys", "list", "--json"))[1])
    assert listed["name"] == "nightly"
    assert " ".join((await shell("keys", "list"))[1].splitlines()[1].split()[:3]) == f"{listed['id']} vision submitter"
    code, new, _ = await shell("keys", "rotate", listed["id"])
    assert code == 0
    assert new != out
    assert (await shell("keys", "revoke", new.split("_")[1]))[0] == 0
    code, _, err = await shell("keys", "revoke", "0" * 12)
    assert (code, err) == (1, "longshore: there is no API key 000000000000\n")
