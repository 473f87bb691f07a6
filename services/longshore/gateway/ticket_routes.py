"""The routes about a job's tickets: the ledger, dead letters, verdicts. Decides nothing itself."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, Field

from longshore.documents import unplain
from longshore.gateway.body import read_document
from longshore.gateway.books import Books
from longshore.gateway.store import JobStore
from longshore.rpc.rollout_checks import MAX_NAME_CHARACTERS, MAX_REASON_CHARACTERS, MAX_REWARD, MAX_TABLE_ENTRIES
from longshore.types import Verdict

MAX_LETTERS = 200
_Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class LearnerIssued(pydantic.BaseModel):
    """What the learner's own books said at its last train step."""

    issued: int
    at_step: int | None


class LedgerView(pydantic.BaseModel):
    """Every ticket issued, in exactly one state: `issued` is the sum of `states`, and of all sites."""

    issued: int
    states: dict[str, int]
    by_site: dict[str, dict[str, int]]
    balanced: bool
    bytes_waiting: int
    learner: LearnerIssued | None


class LetterView(pydantic.BaseModel):
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
    task: dict[str, Any] | None = None


class WholeLetter(LetterView):
    """With what came, in base64 as it travelled; empty when it was too large to keep."""

    payload: str


class LetterList(pydantic.BaseModel):
    """Dead letters, oldest first."""

    letters: list[LetterView]


class VerdictBody(pydantic.BaseModel):
    """A verdict on a rollout that awaits one. Example: {"ticket": "12.3", "reward": 1.0, "verifier": "people@1"}"""

    model_config = ConfigDict(extra="forbid", strict=True)

    ticket: str = Field(pattern=r"^(0|[1-9]\d{0,14})\.(0|[1-9]\d{0,5})$")
    reward: _Number = Field(ge=-MAX_REWARD, le=MAX_REWARD)
    breakdown: dict[_Name, _Number] = Field(default_factory=dict, max_length=MAX_TABLE_ENTRIES)
    reason: str = Field("", max_length=MAX_REASON_CHARACTERS)
    verifier: _Name = Field(min_length=1)


class Accepted(pydantic.BaseModel):
    """What was asked for will be done by the job's learner."""

    accepted: str


class TicketRoutes:
    """The routes over one `Books`."""

    def __init__(self, store: JobStore, books: Books) -> None:
        self._store = store
        self._books = books

    def add_to(self, router: APIRouter) -> None:
        """Adds every route, below /jobs/{job_id}."""
        job = "/jobs/{job_id}"
        letter = job + "/dead-letters/{letter_id}"
        body = {"requestBody": {"required": True, "content": {"application/json": {"schema": _VERDICT_SCHEMA}}}}
        router.add_api_route(job + "/ledger", self.ledger, methods=["GET"])
        router.add_api_route(
            job + "/verdicts", self.judge, methods=["POST"], status_code=202, openapi_extra=body, responses=_CONFLICT
        )
        router.add_api_route(job + "/dead-letters", self.letters, methods=["GET"])
        router.add_api_route(letter, self.letter, methods=["GET"])
        router.add_api_route(letter + "/requeue", self.requeue, methods=["POST"], status_code=202, responses=_CONFLICT)

    async def ledger(self, job_id: str) -> LedgerView:
        """The state of every ticket that the job has issued, by site."""
        return LedgerView.model_validate(await self._books.ledger(await self._store.get(job_id)))

    async def judge(self, job_id: str, request: Request) -> Accepted:
        """Hands in a verdict that came after its rollout. 404: no such ticket is out. 409: it awaits none."""
        job = await self._store.get(job_id)
        body = _verdict(await read_document(request))
        verdict = Verdict(body.reward, body.verifier, body.breakdown, reason=body.reason)
        await self._books.judge(job, body.ticket, verdict)
        return Accepted(accepted=body.ticket)

    async def letters(
        self, job_id: str, after: str = "", limit: Annotated[int, Query(ge=1, le=MAX_LETTERS)] = 100
    ) -> LetterList:
        """Tickets that came to nothing and rollouts that were refused, oldest first, after the letter `after`."""
        found = await self._books.letters(await self._store.get(job_id), after, limit)
        return LetterList(letters=[LetterView.model_validate(letter) for letter in found])

    async def letter(self, job_id: str, letter_id: str) -> WholeLetter:
        """One dead letter, with what came."""
        return WholeLetter.model_validate(await self._books.letter(await self._store.get(job_id), letter_id))

    async def requeue(self, job_id: str, letter_id: str) -> Accepted:
        """Has the letter's task attempted again, as a new group. 409: nobody knows its task, or the job has ended."""
        await self._books.requeue(await self._store.get(job_id), letter_id)
        return Accepted(accepted=letter_id)


def _verdict(document: object) -> VerdictBody:
    if unplain(document):
        wrong = [
            {"loc": ("body", *fault.path.split(".")), "input": fault.value, "msg": fault.message}
            for fault in unplain(document)
        ]
        raise RequestValidationError(wrong)
    try:
        return VerdictBody.model_validate(document)
    except pydantic.ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from None


_VERDICT_SCHEMA = VerdictBody.model_json_schema()
_CONFLICT: dict[int | str, dict[str, Any]] = {409: {"description": "The state of the ticket or of the job forbids it"}}
