"""The REST API for asyncio. Every error is a LongshoreError with one clear sentence."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast

import httpx

from longshore import api_types as t
from longshore.client import answers, calls
from longshore.client.answers import EventLines, checked_url, error_of, may_repeat, unreachable
from longshore.client.calls import Call, Json, get, job_path, post
from longshore.errors import ConfigError, Unavailable
from longshore.launcher.state_dir import read_api_key, read_up

T = TypeVar("T")

NO_STACK = "no stack is running here; start one with `longshore up`"


class ApiClient:
    """One gateway. Use as `async with ApiClient(url, key) as client`."""

    def __init__(self, url: str, api_key: str, patience_s: float = 10.0) -> None:
        """`patience_s`: how long a gateway that refuses connections is waited for; it may be starting again."""
        self.url = url
        self._patience_s = patience_s
        headers = {"Authorization": f"Bearer {api_key}"}
        # trust_env off: a proxy of the environment must not see the key, nor stand before loopback.
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=answers.TIMEOUT, trust_env=False)

    async def __aenter__(self) -> ApiClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def jobs(self, limit: int = 100, state: str | None = None) -> list[t.JobView]:
        """The newest jobs, newest first, page by page up to `limit`."""
        found: list[t.JobView] = []
        cursor: str | None = None
        while len(found) < limit:
            page: t.JobPage = await self._send(calls.jobs(min(limit - len(found), 1000), cursor, state))
            found += page["jobs"]
            cursor = page["next"]
            if cursor is None:
                break
        return found

    async def dead_letters(self, job_id: str) -> AsyncIterator[t.LetterView]:
        """Every dead letter that is kept, oldest first. Raises NotFound."""
        after = ""
        while True:
            page: t.LetterPage = await self._send(
                get(t.LetterPage, job_path(job_id, "dead-letters"), after=after, limit=answers.PAGE)
            )
            for letter in page["letters"]:
                yield letter
            if len(page["letters"]) < answers.PAGE:
                return
            after = page["letters"][-1]["id"]

    async def events(self, job_id: str) -> AsyncIterator[Json]:
        """Every event of a job from its first, until its terminal state; goes on through a gateway's restart.

        Raises:
            NotFound: there is no such job.
            Unavailable: the gateway stayed away for a minute.
        """
        last_id = "0"
        lost_at: float | None = None
        while True:
            try:
                async for event_id, event in self._stream_events(job_id, last_id):
                    lost_at = None
                    if event is None:
                        continue
                    last_id = event_id
                    yield event
                    if answers.is_last(event):
                        return
            except Unavailable:
                lost_at = time.monotonic() if lost_at is None else lost_at
                if time.monotonic() - lost_at > answers.AWAY_S:
                    raise
            # Away, or draining: a gateway ends its streams before it ends.
            await asyncio.sleep(answers.RETRY_S)

    async def logs(
        self, job_id: str, service: str | None = None, tail: int = 200, follow: bool = False
    ) -> AsyncIterator[str]:
        """Pieces of the job's logs. Raises NotFound, Unavailable."""
        params = {"tail": str(tail), "follow": str(follow).lower()} | ({"service": service} if service else {})
        # A job may be silent for long; its end closes the stream.
        timeout = httpx.Timeout(90.0, read=None if follow else 90.0)
        path = job_path(job_id, "logs")
        try:
            async with self._http.stream("GET", path, params=params, timeout=timeout) as response:
                await _check(response)
                async for text in response.aiter_text():
                    yield text
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from None

    async def model(self, job_id: str, version: int, to: Path) -> None:
        """Downloads a policy version as a safetensors file. Raises NotFound, Unavailable, OSError."""
        await self._download(job_path(job_id, "versions", version, "model"), to)

    async def checkpoint_file(self, job_id: str, name: str, file: str, to: Path) -> None:
        """Downloads a file of a checkpoint. Raises NotFound, Unavailable, OSError."""
        await self._download(job_path(job_id, "checkpoints", name, "files", file), to)

    async def submit(self, document: Json, idempotency_key: str | None = None) -> t.JobView:
        """Queues a job. Raises InvalidJobSpec with every fault."""
        return await self._send(calls.submit(document, idempotency_key))

    async def job(self, job_id: str) -> t.JobView:
        """One job with its spec. Raises NotFound."""
        return await self._send(get(t.JobView, job_path(job_id)))

    async def cancel(self, job_id: str) -> t.JobView:
        """Asks for a job's end. Raises NotFound, or Conflict when the job has ended."""
        return await self._send(post(t.JobView, job_path(job_id, "cancel")))

    async def pause(self, job_id: str) -> t.JobView:
        """Has a job's processes stopped after a checkpoint. Raises NotFound, Conflict."""
        return await self._send(post(t.JobView, job_path(job_id, "pause")))

    async def resume(self, job_id: str) -> t.JobView:
        """Has a paused job go on. Raises NotFound, Conflict."""
        return await self._send(post(t.JobView, job_path(job_id, "resume")))

    async def fork(
        self, job_id: str, version: int | None = None, changes: Json | None = None, idempotency_key: str | None = None
    ) -> t.JobView:
        """Queues a job that begins with a version (None: the newest) of another. Raises NotFound, InvalidJobSpec."""
        return await self._send(calls.fork(job_id, version, changes, idempotency_key))

    async def summary(self, job_id: str) -> Json:
        """What summary.json holds. Raises NotFound until the job has ended in order."""
        return await self._send(get(Json, job_path(job_id, "summary")))

    async def metrics(
        self, job_id: str, names: list[str] | None = None, after: int = 0, points: int = 1000
    ) -> t.Series:
        """Metrics by train step. Raises NotFound: no step has such a metric."""
        return await self._send(calls.metrics(job_id, names, after, points))

    async def rollouts(
        self,
        job_id: str,
        limit: int = 100,
        after: str | None = None,
        state: str | None = None,
        site: str | None = None,
        step: int | None = None,
    ) -> t.RolloutPage:
        """A page of the rollouts that the broker has, or with `step` of those of a train step."""
        return await self._send(calls.rollouts(job_id, limit, after, state, site, step))

    async def rollout(self, job_id: str, rollout_id: str) -> t.WholeRollout:
        """One rollout in full. Raises NotFound."""
        return await self._send(get(t.WholeRollout, job_path(job_id, "rollouts", rollout_id)))

    async def sites(self, job_id: str) -> t.SiteList:
        """The job's sites and how they are."""
        return await self._send(get(t.SiteList, job_path(job_id, "sites")))

    async def ledger(self, job_id: str) -> t.LedgerView:
        """The state of every ticket, by site. Raises NotFound."""
        return await self._send(get(t.LedgerView, job_path(job_id, "ledger")))

    async def judge(self, job_id: str, verdict: Json) -> t.Accepted:
        """Hands in a verdict: {ticket, reward, verifier, breakdown?, reason?}. Raises NotFound, Conflict."""
        return await self._send(post(t.Accepted, job_path(job_id, "verdicts"), verdict))

    async def dead_letter(self, job_id: str, letter_id: str) -> t.WholeLetter:
        """One dead letter whole. Raises NotFound."""
        return await self._send(get(t.WholeLetter, job_path(job_id, "dead-letters", letter_id)))

    async def requeue(self, job_id: str, letter_id: str) -> t.Accepted:
        """Has a dead letter's task attempted again. Raises NotFound, Conflict."""
        return await self._send(post(t.Accepted, job_path(job_id, "dead-letters", letter_id, "requeue")))

    async def rollback(self, job_id: str, version: int) -> t.PointerView:
        """Has a policy version served, an older one or a newer one. Raises NotFound, Conflict."""
        return await self._send(calls.rollback(job_id, version))

    async def rotate_key(self, job_id: str) -> t.KeyId:
        """Has a job's versions signed by a new key. Raises NotFound, Conflict, Unavailable."""
        return await self._send(post(t.KeyId, job_path(job_id, "keys", "rotate")))

    async def versions(self, job_id: str, limit: int = 100, before: int | None = None) -> t.VersionPage:
        """A page of the policy versions on hand, newest first."""
        return await self._send(get(t.VersionPage, job_path(job_id, "versions"), limit=limit, before=before))

    async def version(self, job_id: str, version: int) -> t.WholeVersion:
        """What a version's signed manifest says. Raises NotFound."""
        return await self._send(get(t.WholeVersion, job_path(job_id, "versions", version)))

    async def pin_version(self, job_id: str, version: int) -> t.PointerView:
        """Has a version kept. Raises NotFound."""
        return await self._send(calls.pin_version(job_id, version))

    async def unpin_version(self, job_id: str, version: int) -> None:
        """Takes a version's pin away. Raises NotFound."""
        await self._send(calls.unpin_version(job_id, version))

    async def checkpoints(self, job_id: str) -> t.CheckpointList:
        """The job's checkpoints, newest first."""
        return await self._send(get(t.CheckpointList, job_path(job_id, "checkpoints")))

    async def pin_checkpoint(self, job_id: str, name: str) -> t.CheckpointView:
        """Has a checkpoint kept. Raises NotFound, Conflict."""
        return await self._send(calls.pin_checkpoint(job_id, name))

    async def unpin_checkpoint(self, job_id: str, name: str) -> None:
        """Takes a checkpoint's pin away. Raises NotFound, Conflict."""
        await self._send(calls.unpin_checkpoint(job_id, name))

    async def caller(self) -> t.Caller:
        """Who the key says that we are."""
        return await self._send(get(t.Caller, "/v1/caller"))

    async def keys(self) -> t.ApiKeyList:
        """The API keys of the caller's project. Raises Forbidden."""
        return await self._send(get(t.ApiKeyList, "/v1/keys"))

    async def create_key(
        self, role: str, project: str | None = None, name: str = "", days: float | None = 90.0
    ) -> t.NewApiKey:
        """Makes an API key, which is told this once. Raises Forbidden."""
        return await self._send(calls.create_key(role, project, name, days))

    async def rotate_api_key(self, key_id: str, grace_s: float = 0.0) -> t.NewApiKey:
        """Makes a key in another's place, which ends after `grace_s`. Raises NotFound, Conflict, Forbidden."""
        return await self._send(calls.rotate_api_key(key_id, grace_s))

    async def revoke_key(self, key_id: str) -> None:
        """Ends an API key at once. Raises NotFound, Conflict, Forbidden."""
        await self._send(calls.revoke_key(key_id))

    async def joined_sites(self) -> t.SiteCredentialList:
        """Rollout sites that have joined, and how their credentials are. Raises Forbidden."""
        return await self._send(get(t.SiteCredentialList, "/v1/sites"))

    async def join_site(
        self, site: str, request: str, project: str | None = None, days: float = 30.0
    ) -> t.IssuedCredential:
        """Lets a rollout site in; its secrets are told this once. `request`: see sites.certificates.make_request.

        Raises Conflict (it has joined already, or this home takes no sites), Forbidden.
        """
        return await self._send(calls.join_site(site, project, request, days))

    async def renew_site(self, site: str, request: str) -> t.IssuedCredential:
        """Gives a site another certificate. Raises NotFound, Forbidden."""
        return await self._send(calls.renew_site(site, request))

    async def revoke_site(self, site: str) -> None:
        """Puts a site out at once. Raises NotFound, Forbidden, Unavailable."""
        await self._send(calls.revoke_site(site))

    async def projects(self) -> t.ProjectList:
        """Projects, their quotas and what they use."""
        return await self._send(get(t.ProjectList, "/v1/projects"))

    async def set_quotas(
        self, project: str, max_jobs: int | None = None, max_generators: int | None = None, max_gpus: int | None = None
    ) -> t.Quotas:
        """Sets what a project may use at a time. Raises Forbidden."""
        return await self._send(calls.set_quotas(project, max_jobs, max_generators, max_gpus))

    async def audit(self, limit: int = 100, before: int | None = None) -> t.AuditPage:
        """A page of the audit log, newest first. Raises Forbidden."""
        return await self._send(get(t.AuditPage, "/v1/audit", limit=limit, before=before))

    async def healthz(self) -> t.Health:
        """Whether the gateway serves."""
        return await self._send(get(t.Health, "/healthz"))

    async def _download(self, path: str, to: Path) -> None:
        part = to.with_name(f".{to.name}.part")
        try:
            async with self._http.stream("GET", path) as response:
                await _check(response)
                with part.open("wb") as file:
                    async for block in response.aiter_bytes():
                        await asyncio.to_thread(file.write, block)
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from None
        part.replace(to)

    async def _stream_events(self, job_id: str, last_id: str) -> AsyncIterator[tuple[str, Json | None]]:
        """(id, event); ("", None) is a sign of life."""
        headers, lines = {"Last-Event-ID": last_id}, EventLines()
        path = job_path(job_id, "events")
        try:
            async with self._http.stream("GET", path, headers=headers, timeout=answers.STREAM_TIMEOUT) as response:
                await _check(response)
                yield "", None
                async for line in response.aiter_lines():
                    told = lines.take(line)
                    if told is not None:
                        yield told
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from None

    async def _send(self, call: Call[T]) -> T:
        deadline = time.monotonic() + self._patience_s
        # A body that is null is none.
        body: Json = {} if call.json is None else {"json": call.json}
        while True:
            try:
                response = await self._http.request(
                    call.method, call.path, params=call.params, headers=call.headers, **body
                )
                break
            except httpx.HTTPError as error:
                if not may_repeat(error, call.repeatable) or time.monotonic() > deadline:
                    raise unreachable(self.url, error) from None
            await asyncio.sleep(answers.RETRY_S)
        await _check(response)
        return cast("T", response.json() if response.content else None)


def connect(state_dir: Path) -> ApiClient:
    """A client of the gateway that LONGSHORE_URL names, with the key LONGSHORE_API_KEY; else of the stack that runs in
    a state directory.

    Raises:
        Unavailable: no stack runs.
        ConfigError: the URL is no gateway's, or there is no key.
    """
    url = os.environ.get("LONGSHORE_URL")
    if url:
        key = os.environ.get("LONGSHORE_API_KEY")
        if not key:
            raise ConfigError("LONGSHORE_URL needs LONGSHORE_API_KEY: `longshore keys create` makes one")
        return ApiClient(checked_url(url, "LONGSHORE_URL"), key)
    up = read_up(state_dir)
    try:
        if up is not None:
            return ApiClient(up.url, read_api_key(state_dir))
    except OSError:
        pass
    raise Unavailable(NO_STACK)


async def _check(response: httpx.Response) -> None:
    """Raises the error that a problem document stands for."""
    if not response.is_success:
        raise error_of(response.status_code, await response.aread())
