"""The REST API as a person's machine sees it. Every error is a LongshoreError with one clear sentence."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from longshore.errors import Conflict, Fault, InvalidJobSpec, LongshoreError, NotFound, Unavailable
from longshore.launcher.state_dir import read_api_key, read_up

Json = dict[str, Any]

# Submitting runs the tasks' own checks, which may read a data set.
_TIMEOUT = httpx.Timeout(90.0, connect=5.0)
# An event stream says something at least every 15 s.
_STREAM_TIMEOUT = httpx.Timeout(45.0, connect=5.0)
# A gateway that was killed is back within seconds.
_AWAY_S = 60.0
_RETRY_S = 0.5
# Dead letters a request.
_PAGE = 200

NO_STACK = "no stack is running here; start one with `longshore up`"


class ApiClient:
    """One gateway. Use as `async with ApiClient(url, key) as client`."""

    def __init__(self, url: str, api_key: str, patience_s: float = 10.0) -> None:
        """`patience_s`: how long a gateway that refuses connections is waited for; it may be starting again."""
        self.url = url
        self._patience_s = patience_s
        headers = {"Authorization": f"Bearer {api_key}"}
        # trust_env off: a proxy of the environment must not see the key, nor stand before loopback.
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=_TIMEOUT, trust_env=False)

    async def __aenter__(self) -> ApiClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def submit(self, document: Json) -> Json:
        """Queues a job. Raises InvalidJobSpec with every fault."""
        return await self._request("POST", "/v1/jobs", json=document)

    async def jobs(self, limit: int = 100) -> list[Json]:
        """The newest jobs, newest first."""
        answer = await self._request("GET", "/v1/jobs", params={"limit": limit})
        return list(answer["jobs"])

    async def job(self, job_id: str) -> Json:
        """Raises NotFound."""
        return await self._request("GET", f"/v1/jobs/{job_id}")

    async def cancel(self, job_id: str) -> Json:
        """Raises NotFound, or Conflict when the job has ended."""
        return await self._request("POST", f"/v1/jobs/{job_id}/cancel")

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
                    if event["type"] == "state" and event["state"] in ENDED:
                        return
            except Unavailable:
                lost_at = time.monotonic() if lost_at is None else lost_at
                if time.monotonic() - lost_at > _AWAY_S:
                    raise
            # Away, or draining: a gateway ends its streams before it ends.
            await asyncio.sleep(_RETRY_S)

    async def ledger(self, job_id: str) -> Json:
        """The state of every ticket, by site. Raises NotFound."""
        return await self._request("GET", f"/v1/jobs/{_part(job_id)}/ledger")

    async def dead_letters(self, job_id: str) -> AsyncIterator[Json]:
        """Every dead letter that is kept, oldest first. Raises NotFound."""
        after = ""
        while True:
            path = f"/v1/jobs/{_part(job_id)}/dead-letters"
            page = (await self._request("GET", path, params={"after": after, "limit": _PAGE}))["letters"]
            for letter in page:
                yield letter
            if len(page) < _PAGE:
                return
            after = page[-1]["id"]

    async def dead_letter(self, job_id: str, letter_id: str) -> Json:
        """One dead letter whole. Raises NotFound."""
        return await self._request("GET", f"/v1/jobs/{_part(job_id)}/dead-letters/{_part(letter_id)}")

    async def requeue(self, job_id: str, letter_id: str) -> None:
        """Has a dead letter's task attempted again. Raises NotFound, Conflict."""
        await self._request("POST", f"/v1/jobs/{_part(job_id)}/dead-letters/{_part(letter_id)}/requeue")

    async def rotate_key(self, job_id: str) -> str:
        """Has a job's versions signed by a new key; its id. Raises NotFound, Conflict, Unavailable."""
        return str((await self._request("POST", f"/v1/jobs/{_part(job_id)}/keys/rotate"))["key_id"])

    async def judge(self, job_id: str, verdict: Json) -> None:
        """Hands in a verdict: {ticket, reward, verifier, breakdown?, reason?}. Raises NotFound, Conflict."""
        await self._request("POST", f"/v1/jobs/{_part(job_id)}/verdicts", json=verdict)

    async def logs(self, job_id: str, service: str | None, tail: int, follow: bool) -> AsyncIterator[str]:
        """Pieces of the job's logs. Raises NotFound, Unavailable."""
        params = {"tail": str(tail), "follow": str(follow).lower()} | ({"service": service} if service else {})
        # A job may be silent for long; its end closes the stream.
        timeout = httpx.Timeout(90.0, read=None if follow else 90.0)
        try:
            async with self._http.stream("GET", f"/v1/jobs/{job_id}/logs", params=params, timeout=timeout) as response:
                await _check(response)
                async for text in response.aiter_text():
                    yield text
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from None

    async def _stream_events(self, job_id: str, last_id: str) -> AsyncIterator[tuple[str, Json | None]]:
        """(id, event); ("", None) is a sign of life."""
        headers = {"Last-Event-ID": last_id}
        path = f"/v1/jobs/{job_id}/events"
        try:
            async with self._http.stream("GET", path, headers=headers, timeout=_STREAM_TIMEOUT) as response:
                await _check(response)
                yield "", None
                event_id = ""
                async for line in response.aiter_lines():
                    if line.startswith("id: "):
                        event_id = line.removeprefix("id: ")
                    elif line.startswith("data: "):
                        yield event_id, json.loads(line.removeprefix("data: "))
                    elif line.startswith(":"):
                        yield "", None
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from None

    async def _request(self, method: str, path: str, **options: Any) -> Json:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                response = await self._http.request(method, path, **options)
                break
            except httpx.ConnectError as error:
                # Nobody was there to hear it, so saying it again is safe whatever it is.
                if time.monotonic() > deadline:
                    raise _unreachable(self.url, error) from None
                await asyncio.sleep(_RETRY_S)
            except httpx.HTTPError as error:
                raise _unreachable(self.url, error) from None
        await _check(response)
        answer: Json = response.json()
        return answer


ENDED = frozenset({"succeeded", "failed", "cancelled"})


def connect(state_dir: Path) -> ApiClient:
    """A client of the stack that runs in a state directory. Raises Unavailable when none does."""
    up = read_up(state_dir)
    try:
        if up is not None:
            return ApiClient(up.url, read_api_key(state_dir))
    except OSError:
        pass
    raise Unavailable(NO_STACK)


def _part(name: str) -> str:
    """A name as one part of a path, whatever is in it."""
    return quote(name, safe="") or "-"


async def _check(response: httpx.Response) -> None:
    """Raises the error that a problem document stands for."""
    if response.is_success:
        return
    await response.aread()
    try:
        problem: Json = response.json()
    except ValueError:
        problem = {}
    detail = str(problem.get("detail") or f"HTTP status {response.status_code}")
    if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY and problem.get("faults"):
        raise InvalidJobSpec([Fault(item["path"], item["value"], item["message"]) for item in problem["faults"]])
    kinds: dict[int, type[LongshoreError]] = {404: NotFound, 409: Conflict, 503: Unavailable}
    raise kinds.get(response.status_code, LongshoreError)(detail)


def _unreachable(url: str, error: httpx.HTTPError) -> Unavailable:
    if isinstance(error, httpx.ConnectError):
        return Unavailable(f"the stack at {url} does not answer")
    return Unavailable(f"the stack at {url} broke off: {error or type(error).__name__}")
