"""What the REST API answers, as both of its sides see it: JSON objects with named fields. Times are RFC 3339, in UTC.

The gateway builds these and describes them in OpenAPI; `longshore.client` returns them.
"""

from __future__ import annotations

from typing import Any

# pydantic asks for this one until Python 3.12.
from typing_extensions import TypedDict

Json = dict[str, Any]


class JobView(TypedDict):
    """A job. `spec` is null in lists; `revision` counts its changes, and is its ETag."""

    id: str
    project: str
    name: str
    state: str
    error: str
    created_at: str
    updated_at: str
    progress: Json
    run_dir: str
    revision: int
    parent: ParentView | None
    spec: Json | None


class ParentView(TypedDict):
    """What a job was forked from."""

    job: str
    version: int


class JobPage(TypedDict):
    """Jobs, newest first, without their specs. `next`: the `cursor` of the page after; null on the last."""

    jobs: list[JobView]
    next: str | None


class KeyId(TypedDict):
    """The key that signs a job's versions from now on: the first 16 hex digits of its public half's SHA-256."""

    key_id: str


class LearnerIssued(TypedDict):
    """What the learner's own books said at its last train step."""

    issued: int
    at_step: int | None


class LedgerView(TypedDict):
    """Every ticket issued, in exactly one state: `issued` is the sum of `states`, and of all sites."""

    issued: int
    states: dict[str, int]
    by_site: dict[str, dict[str, int]]
    balanced: bool
    bytes_waiting: int
    learner: LearnerIssued | None


class LetterView(TypedDict):
    """A ticket or a rollout that was set aside, and why."""

    id: str
    at: str
    kind: str
    ticket: str
    site: str
    reason: str
    detail: str
    attempt: int
    payload_bytes: int
    task: Json | None


class WholeLetter(LetterView):
    """With what came, in base64 as it travelled; empty when it was too large to keep."""

    payload: str


class LetterPage(TypedDict):
    """Dead letters, oldest first."""

    letters: list[LetterView]


class Accepted(TypedDict):
    """What was asked for will be done by the job's learner."""

    accepted: str


class Series(TypedDict):
    """Metrics by train step: `series[name][i]` belongs to `steps[i]`; null where a step has no such number."""

    names: list[str]
    steps: list[int]
    series: dict[str, list[float | None]]


class RolloutView(TypedDict):
    """A ticket and what became of it. `step`: the train step whose batch has it."""

    id: str
    state: str
    site: str
    attempt: int
    step: int | None
    bytes: int | None


class RolloutPage(TypedDict):
    """Rollouts by group and index. `next`: the `after` of the page after; null on the last."""

    rollouts: list[RolloutView]
    next: str | None


class WholeRollout(RolloutView):
    """With its content, as far as the broker still has it: null before it is delivered and after it is trained on."""

    content: Json | None


class VersionView(TypedDict):
    """A policy version on hand. `names`: the pointers that name it (head, serving, pin/...)."""

    version: int
    names: list[str]


class VersionPage(TypedDict):
    """Policy versions, newest first. `next`: the `before` of the page after; null on the last."""

    versions: list[VersionView]
    next: int | None


class WholeVersion(VersionView):
    """With what its signed manifest says."""

    train_step: int
    learner_epoch: int
    checksum: str
    assets_sha256: str
    layout_sha256: str


class PointerView(TypedDict):
    """Where a name points now."""

    name: str
    version: int
    serial: int
    expires_at: str


class FileView(TypedDict):
    """A file of a checkpoint. `sha256` is null where nobody wrote it down."""

    name: str
    bytes: int
    sha256: str | None


class CheckpointView(TypedDict):
    """A durable checkpoint of the learner, or `final`: the trained model as transformers loads it."""

    name: str
    step: int | None
    pinned: bool
    files: list[FileView]


class CheckpointList(TypedDict):
    """Checkpoints, newest first."""

    checkpoints: list[CheckpointView]


class ProcessView(TypedDict):
    """One process of a job."""

    name: str
    state: str
    restarts: int
    exit_code: int | None


class SiteView(TypedDict):
    """One site of a job. `healthy`: every process of it is ready; null while none runs."""

    name: str
    healthy: bool | None
    processes: list[ProcessView]
    tickets: dict[str, int]


class SiteList(TypedDict):
    """The sites of a job, the home site first."""

    sites: list[SiteView]


class ApiKeyView(TypedDict):
    """An API key without its secret. `project` null: every project."""

    id: str
    project: str | None
    role: str
    name: str
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    successor_of: str | None


class NewApiKey(ApiKeyView):
    """`key` is what callers send. It is shown this once, and kept nowhere."""

    key: str


class ApiKeyList(TypedDict):
    """API keys, by id."""

    keys: list[ApiKeyView]


class SiteCredentialView(TypedDict):
    """A rollout site that has joined, and how its credential is: `good`, `expiring` (a third of its time is left),
    `expired` or `revoked`. `project` null: every project. `serial`: of its newest certificate."""

    site: str
    project: str | None
    state: str
    serial: str
    issued_at: str
    expires_at: str
    revoked_at: str | None


class SiteCredentialList(TypedDict):
    """Rollout sites, by name."""

    sites: list[SiteCredentialView]


class IssuedCredential(SiteCredentialView):
    """What a site's relay reaches home with: its certificate, the authority that home's servers are known by (PEM), and
    home's addresses. `broker_url` and `api_key` hold secrets, which are told this once; null when a site renews, for
    they stay as they were."""

    certificate: str
    authority: str
    weights: str
    gateway: str
    broker_url: str | None
    api_key: str | None


class Quotas(TypedDict):
    """What a project may use at a time; null: no limit of its own."""

    max_jobs: int | None
    max_generators: int | None
    max_gpus: int | None


class ProjectView(Quotas):
    """A project, its quotas, and what it uses now."""

    name: str
    jobs: int
    generators: int
    gpus: int
    queued: int


class ProjectList(TypedDict):
    """Projects that have quotas or unfinished jobs, by name."""

    projects: list[ProjectView]


class AuditEntry(TypedDict):
    """One request that was to change something, and how it was answered."""

    id: int
    at: str
    project: str | None
    principal: str
    method: str
    path: str
    status: int
    request_id: str


class AuditPage(TypedDict):
    """Audit entries, newest first. `next`: the `before` of the page after; null on the last."""

    entries: list[AuditEntry]
    next: int | None


class Caller(TypedDict):
    """Who sent the request, as the gateway sees it."""

    principal: str
    project: str | None
    role: str


class Health(TypedDict):
    """Whether the gateway serves."""

    status: str
    version: str
