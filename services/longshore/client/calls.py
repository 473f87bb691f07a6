"""Each request that is answered by one JSON object or by nothing: its method, path and parts. Sends nothing."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from longshore import api_types as t

T = TypeVar("T")
Json = dict[str, Any]


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request whose answer is a T. `repeatable`: sending it twice does no more than sending it once."""

    method: str
    path: str
    params: Json = field(default_factory=dict)
    json: object = None
    headers: dict[str, str] = field(default_factory=dict)
    repeatable: bool = False


def get(kind: type[T], path: str, **params: object) -> Call[T]:
    """A read that is answered by a `kind`; parameters that are None are left out."""
    return Call("GET", path, {name: value for name, value in params.items() if value is not None}, repeatable=True)


def post(kind: type[T], path: str, json: object = None) -> Call[T]:
    """An act that is answered by a `kind`, and is not sent twice."""
    return Call("POST", path, json=json)


def job_path(job_id: str, *rest: str | int) -> str:
    """A path below a job, whatever is in the names."""
    return "/v1/jobs/" + "/".join(part(str(name)) for name in (job_id, *rest))


def part(name: str) -> str:
    """A name as one part of a path, whatever is in it."""
    return quote(name, safe="") or "-"


def _once(path: str, json: object, idempotency_key: str | None) -> Call[t.JobView]:
    """A submission that may be sent again: of one key there is one job."""
    headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
    return Call("POST", path, json=json, headers=headers, repeatable=True)


def submit(document: Json, idempotency_key: str | None) -> Call[t.JobView]:
    return _once("/v1/jobs", document, idempotency_key)


def fork(job_id: str, version: int | None, changes: Json | None, idempotency_key: str | None) -> Call[t.JobView]:
    return _once(job_path(job_id, "fork"), {"version": version, "changes": changes or {}}, idempotency_key)


def jobs(limit: int, cursor: str | None, state: str | None) -> Call[t.JobPage]:
    return get(t.JobPage, "/v1/jobs", limit=limit, cursor=cursor, state=state)


def metrics(job_id: str, names: list[str] | None, after: int, points: int) -> Call[t.Series]:
    return get(t.Series, job_path(job_id, "metrics"), name=names or None, after=after, points=points)


def rollouts(
    job_id: str, limit: int, after: str | None, state: str | None, site: str | None, step: int | None
) -> Call[t.RolloutPage]:
    return get(t.RolloutPage, job_path(job_id, "rollouts"), limit=limit, after=after, state=state, site=site, step=step)


def rollback(job_id: str, version: int) -> Call[t.PointerView]:
    return Call("POST", job_path(job_id, "rollback"), json={"version": version}, repeatable=True)


def pin_version(job_id: str, version: int) -> Call[t.PointerView]:
    return Call("PUT", job_path(job_id, "versions", version, "pin"), repeatable=True)


def unpin_version(job_id: str, version: int) -> Call[None]:
    return Call("DELETE", job_path(job_id, "versions", version, "pin"))


def pin_checkpoint(job_id: str, name: str) -> Call[t.CheckpointView]:
    return Call("PUT", job_path(job_id, "checkpoints", name, "pin"), repeatable=True)


def unpin_checkpoint(job_id: str, name: str) -> Call[None]:
    return Call("DELETE", job_path(job_id, "checkpoints", name, "pin"))


def create_key(role: str, project: str | None, name: str, days: float | None) -> Call[t.NewApiKey]:
    return post(t.NewApiKey, "/v1/keys", {"role": role, "project": project, "name": name, "days": days})


def rotate_api_key(key_id: str, grace_s: float) -> Call[t.NewApiKey]:
    return post(t.NewApiKey, f"/v1/keys/{part(key_id)}/rotate", {"grace_s": grace_s})


def revoke_key(key_id: str) -> Call[None]:
    return Call("DELETE", f"/v1/keys/{part(key_id)}")


def join_site(site: str, project: str | None, request: str, days: float) -> Call[t.IssuedCredential]:
    return post(t.IssuedCredential, "/v1/sites", {"site": site, "project": project, "request": request, "days": days})


def renew_site(site: str, request: str) -> Call[t.IssuedCredential]:
    return post(t.IssuedCredential, f"/v1/sites/{part(site)}/renew", {"request": request})


def revoke_site(site: str) -> Call[None]:
    return Call("DELETE", f"/v1/sites/{part(site)}", repeatable=True)


def set_quotas(project: str, max_jobs: int | None, max_generators: int | None, max_gpus: int | None) -> Call[t.Quotas]:
    body = {"max_jobs": max_jobs, "max_generators": max_generators, "max_gpus": max_gpus}
    return Call("PUT", f"/v1/projects/{part(project)}", json=body, repeatable=True)
