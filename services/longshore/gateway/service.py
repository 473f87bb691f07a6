"""The gateway process: puts store, reconciler and REST API together and serves until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from redis.asyncio import Redis

from longshore.errors import ConfigError
from longshore.gateway.app import Api
from longshore.gateway.books import Books
from longshore.gateway.config import GatewaySettings
from longshore.gateway.database import Database
from longshore.gateway.driver import Parts
from longshore.gateway.jobs import Jobs, Rotate
from longshore.gateway.keys import rotate_key
from longshore.gateway.prepare import job_paths, prepare
from longshore.gateway.reconcile import Reconciler
from longshore.gateway.store import Job, JobStore
from longshore.gateway.units import Units
from longshore.launcher.broker_server import site_brokers
from longshore.launcher.connect import connect_launcher
from longshore.launcher.interpreter import generator_python
from longshore.launcher.plan import Endpoints, plan_job
from longshore.launcher.spec import ProcessSpec
from longshore.rollout_queue import broker
from longshore.rollout_queue.channel import JobChannel
from longshore.rpc.http_server import serve_http
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer
from longshore.tasks.check import check_document
from longshore.types import JobRef
from longshore.weights.client import WeightsClient


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Serves the API and drives jobs until `stop` is set; jobs go on without it."""
    api_key = await asyncio.to_thread(_read_key, settings)
    async with contextlib.AsyncExitStack() as resources:
        database = Database(settings.database_url)
        resources.push_async_callback(database.close)
        await database.open()
        store = JobStore(database)
        client = broker.connect(settings.broker_url)
        resources.push_async_callback(client.aclose)
        books = Books(client, settings.runs_dir)
        reconciler = Reconciler(_parts(settings, store, client, books, resources), settings.jobs_since)
        api = Api(Jobs(store, check_document, _rotation(settings)), books, settings.runs_dir, api_key, stop)
        rpc = RpcServer(settings.listen)

        async def on_listening(address: str) -> None:
            # Health comes last: who sees it can use the API.
            await rpc.start()

        async with asyncio.TaskGroup() as group:
            http = group.create_task(serve_http(api.app(), settings.http_listen, settings.drain_s, stop, on_listening))
            looking = group.create_task(reconciler.run(stop))
            # Neither ends before `stop`: if one does, so does the process, and the launcher starts it again.
            await asyncio.wait({http, looking}, return_when=asyncio.FIRST_COMPLETED)
            stop.set()
        await rpc.drain(settings.drain_s)


def _read_key(settings: GatewaySettings) -> str:
    try:
        key = settings.api_key_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"LONGSHORE_API_KEY_FILE {settings.api_key_file}: {error.strerror}") from None
    if not key:
        raise ConfigError(f"LONGSHORE_API_KEY_FILE {settings.api_key_file} is empty")
    return key


def _rotation(settings: GatewaySettings) -> Rotate:
    async def rotate(job: Job) -> str:
        paths = job_paths(settings.runs_dir, settings.state_dir, job.id)
        return await rotate_key(settings.weights, paths.signing_key_file, paths.job_file)

    return rotate


def _parts(
    settings: GatewaySettings, store: JobStore, client: Redis, books: Books, resources: contextlib.AsyncExitStack
) -> Parts:
    launcher = connect_launcher(settings.supervisor)
    resources.push_async_callback(launcher.close)
    endpoints = Endpoints(settings.broker_url, settings.weights)

    async def prepare_job(job: Job) -> Sequence[ProcessSpec]:
        paths = job_paths(settings.runs_dir, settings.state_dir, job.id)
        file = await asyncio.to_thread(prepare, job, paths)
        python = generator_python(file.spec)
        weights = WeightsClient(settings.weights, file.ref, bytes.fromhex(file.learner_public_key))
        try:
            await weights.register_key(file.spec.weights.keep)
        finally:
            await weights.close()
        sites = [site.name for site in file.spec.sites]
        brokers = await asyncio.to_thread(site_brokers, sites, paths, settings.supervisor)
        return plan_job(file, endpoints, paths, brokers, python)

    return Parts(
        store=store,
        launcher=launcher,
        units=Units(launcher),
        prepare=prepare_job,
        channel=lambda job: JobChannel(client, JobRef(job.project, job.id)),
        forget=books.close,
    )


def main() -> int:
    """Entry point of `longshore serve gateway`."""
    return run_process("gateway", GatewaySettings.from_environment(), serve)
