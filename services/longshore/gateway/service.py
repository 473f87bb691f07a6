"""The gateway process: puts store, reconciler and REST API together and serves until told to stop."""

from __future__ import annotations

import asyncio
import contextlib

from redis.asyncio import Redis

from longshore.errors import ConfigError
from longshore.gateway.api_keys import ApiKeys
from longshore.gateway.app import Services, make_app
from longshore.gateway.audit import AuditLog
from longshore.gateway.auth import Authenticator
from longshore.gateway.books import Books
from longshore.gateway.checking import CheckProcesses
from longshore.gateway.config import GatewaySettings
from longshore.gateway.database import Database
from longshore.gateway.driver import Parts
from longshore.gateway.jobs import CHECK_TIMEOUT_S, Jobs, Places
from longshore.gateway.keys import rotate_key
from longshore.gateway.oidc import Issuer, Tokens
from longshore.gateway.places import Limits
from longshore.gateway.plans import Planner
from longshore.gateway.prepare import job_paths
from longshore.gateway.projects import Projects
from longshore.gateway.reconcile import Reconciler
from longshore.gateway.rollout_views import Rollouts
from longshore.gateway.site_access import SiteAccess, SiteSettings
from longshore.gateway.site_certificates import SiteCertificates
from longshore.gateway.store import Job, JobStore
from longshore.gateway.units import Units
from longshore.gateway.version_routes import Rotate
from longshore.gateway.versions import Versions
from longshore.launcher.plan import JobPaths
from longshore.rollout_queue import broker
from longshore.rollout_queue.channel import JobChannel
from longshore.rollout_queue.site_users import SiteUsers
from longshore.rpc.channel import tls_file
from longshore.rpc.http_server import serve_http
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer
from longshore.types import JobRef


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Serves the API and drives jobs until `stop` is set; jobs go on without it."""
    root_key = await asyncio.to_thread(_read_key, settings)
    async with contextlib.AsyncExitStack() as resources:
        database = Database(settings.database_url)
        resources.push_async_callback(database.close)
        await database.open()
        store, projects = JobStore(database), Projects(database)
        client = broker.connect(settings.broker_url)
        resources.push_async_callback(client.aclose)
        books = Books(client, settings.runs_dir)
        parts = _parts(settings, store, client, books, resources)
        room = Limits(settings.max_jobs, settings.max_generators, settings.max_gpus)
        reconciler = Reconciler(parts, projects, room, settings.jobs_since)
        keys, audit = ApiKeys(database), AuditLog(database)
        checks = CheckProcesses(settings.check_memory_mb, CHECK_TIMEOUT_S)
        resources.callback(checks.close)
        sites = SiteAccess(_site_settings(settings), SiteCertificates(database), keys, SiteUsers(client))
        services = Services(
            jobs=Jobs(store, projects, checks.check_document, settings.runs_dir, Places(room, settings.data_dir)),
            books=books,
            rollouts=Rollouts(client, settings.runs_dir),
            versions=Versions(settings.weights, lambda job_id: _paths(settings, job_id)),
            units=parts.units,
            keys=keys,
            projects=projects,
            audit=audit,
            sites=sites,
            authenticate=Authenticator(keys, root_key, tokens=_tokens(settings)),
            rotate=_rotation(settings),
            runs_dir=settings.runs_dir,
        )
        app = make_app(services, stop)
        rpc = RpcServer(settings.listen)

        async def on_listening(address: str) -> None:
            # Health comes last: who sees it can use the API.
            await rpc.start()

        async with asyncio.TaskGroup() as group:
            http = group.create_task(serve_http(app, settings.http_listen, settings.drain_s, stop, on_listening))
            looking = group.create_task(reconciler.run(stop))
            group.create_task(audit.keep(settings.audit_days, stop))
            telling = group.create_task(sites.run(stop))
            # None ends before `stop`: if one does, so does the process, and the launcher starts it again.
            await asyncio.wait({http, looking, telling}, return_when=asyncio.FIRST_COMPLETED)
            stop.set()
        await rpc.drain(settings.drain_s)


def _tokens(settings: GatewaySettings) -> Tokens | None:
    if settings.oidc_issuer is None:
        return None
    if settings.oidc_jwks_url is None:
        raise ConfigError("LONGSHORE_OIDC_ISSUER needs LONGSHORE_OIDC_JWKS_URL: where the issuer publishes its keys")
    return Tokens(Issuer(settings.oidc_issuer, settings.oidc_audience, settings.oidc_jwks_url))


def _site_settings(settings: GatewaySettings) -> SiteSettings | None:
    """None: this home takes no rollout sites. Raises ConfigError: it is told only half of what it needs for them."""
    told = (settings.sites_weights, settings.sites_broker_url, settings.sites_gateway)
    if not any(told):
        return None
    if not all(told):
        raise ConfigError("LONGSHORE_SITES_WEIGHTS, LONGSHORE_SITES_BROKER_URL and LONGSHORE_SITES_GATEWAY go together")
    authority_of_home = tls_file("LONGSHORE_TLS_CA")
    if authority_of_home is None:
        raise ConfigError("LONGSHORE_SITES_WEIGHTS needs LONGSHORE_TLS_CA: who signs the weight store's certificate")
    return SiteSettings(
        *told,
        authority_of_home,
        settings.sites_authority or settings.state_dir / "authority",
        settings.sites_file or settings.state_dir / "sites.json",
    )


def _paths(settings: GatewaySettings, job_id: str) -> JobPaths:
    return job_paths(settings.runs_dir, settings.state_dir, job_id)


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
        paths = _paths(settings, job.id)
        return await rotate_key(settings.weights, paths.signing_key_file, paths.job_file)

    return rotate


def _parts(
    settings: GatewaySettings, store: JobStore, client: Redis, books: Books, resources: contextlib.AsyncExitStack
) -> Parts:
    planner = Planner(settings, client)
    resources.push_async_callback(planner.close)
    return Parts(
        store=store,
        launcher=planner.launcher,
        units=Units(planner.launcher),
        prepare=planner.plan,
        channel=lambda job: JobChannel(client, JobRef(job.project, job.id)),
        forget=books.close,
    )


def main() -> int:
    """Entry point of `longshore serve gateway`."""
    return run_process("gateway", GatewaySettings.from_environment(), serve)
