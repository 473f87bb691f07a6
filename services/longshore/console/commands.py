"""The commands that talk to a stack that runs already."""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from longshore.api_types import JobView
from longshore.client import ApiClient, connect
from longshore.config import load_job, parse_job
from longshore.console.follow import EXIT_OK, follow_job
from longshore.console.screen import Screen
from longshore.console.tables import aligned
from longshore.documents import unplain
from longshore.launcher.state_dir import default_state_dir, read_up


def open_client() -> ApiClient:
    """A client of the gateway that LONGSHORE_URL names, or of the stack that runs here. Raises as `connect`."""
    return connect(default_state_dir())


async def submit(document: dict[str, Any]) -> int:
    """Prints the id alone on stdout, for scripts; the hint goes to stderr. Raises InvalidJobSpec with every fault."""
    if unplain(document) or read_up(default_state_dir()) is None:
        # Nobody can be asked who knows what is installed; what can be told without is.
        parse_job(document)
    async with open_client() as client:
        job = await client.submit(document)
    sys.stdout.write(f"{job['id']}\n")
    sys.stdout.flush()
    sys.stderr.write(f"see it with `longshore watch {job['id']}`; its files: {job['run_dir']}\n")
    return EXIT_OK


async def jobs() -> int:
    """Prints one line a job, newest first."""
    async with open_client() as client:
        found = await client.jobs()
    if not found:
        sys.stderr.write("no jobs yet\n")
        return EXIT_OK
    rows = [("ID", "STATE", "STEP", "REWARD", "CREATED"), *(_row(job) for job in found)]
    sys.stdout.write("".join(f"{line}\n" for line in aligned(rows)))
    return EXIT_OK


def _row(job: JobView) -> tuple[str, ...]:
    progress = job["progress"]
    step = f"{progress['step']}/{progress['steps']}" if progress.get("step") else progress.get("phase") or "-"
    reward = progress.get("reward/mean")
    created = datetime.fromisoformat(job["created_at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return job["id"], job["state"], str(step), "-" if reward is None else f"{reward:.3f}", created


async def watch(job_id: str, screen: Screen) -> int:
    """Shows a job until it ends."""
    async with open_client() as client:
        try:
            return await follow_job(client, job_id, screen)
        except asyncio.CancelledError:
            screen.line(f"the job goes on; see it again with `longshore watch {job_id}`")
            raise


async def logs(job_id: str, service: str | None, tail: int, follow: bool) -> int:
    """Prints log lines."""
    async with open_client() as client:
        async for text in client.logs(job_id, service, tail, follow):
            sys.stdout.write(text)
            sys.stdout.flush()
    return EXIT_OK


async def rotate_key(job_id: str) -> int:
    """Has a job's versions signed by a new key."""
    async with open_client() as client:
        key_id = await client.rotate_key(job_id)
    sys.stdout.write(f"{job_id}: versions are signed by key {key_id} from now on\n")
    return EXIT_OK


async def cancel(job_id: str) -> int:
    """Asks for a job's end."""
    async with open_client() as client:
        return _say_state(await client.cancel(job_id))


async def pause(job_id: str) -> int:
    """Has a job's processes stopped."""
    async with open_client() as client:
        return _say_state(await client.pause(job_id))


async def resume(job_id: str) -> int:
    """Has a paused job go on."""
    async with open_client() as client:
        return _say_state(await client.resume(job_id))


def _say_state(job: JobView) -> int:
    sys.stdout.write(f"{job['id']} is {job['state']}\n")
    return EXIT_OK


async def fork(job_id: str, version: int | None, changes: Path | None) -> int:
    """Prints the new job's id alone on stdout, as `submit` does. Raises InvalidJobSpec with every fault."""
    settings = {} if changes is None else load_job(changes)
    async with open_client() as client:
        job = await client.fork(job_id, version, settings)
    sys.stdout.write(f"{job['id']}\n")
    return EXIT_OK


async def rollback(job_id: str, version: int) -> int:
    """Has a policy version served."""
    async with open_client() as client:
        pointer = await client.rollback(job_id, version)
    sys.stdout.write(f"{job_id}: {pointer['name']} is version {pointer['version']}\n")
    return EXIT_OK
