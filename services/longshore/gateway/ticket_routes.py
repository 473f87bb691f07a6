"""The routes about a job's tickets: the ledger, dead letters, verdicts. Decides nothing itself."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Query, Request
from pydantic import ConfigDict, Field

from longshore.api_types import Accepted, LedgerView, LetterPage, WholeLetter
from longshore.gateway.auth import SteeredJob, ViewedJob
from longshore.gateway.body import read_model
from longshore.gateway.books import Books
from longshore.gateway.responses import READS, STEERS, TAKES
from longshore.rpc.rollout_checks import MAX_NAME_CHARACTERS, MAX_REASON_CHARACTERS, MAX_REWARD, MAX_TABLE_ENTRIES
from longshore.types import Verdict

MAX_LETTERS = 200
_Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class VerdictBody(pydantic.BaseModel):
    """A verdict on a rollout that awaits one. Example: {"ticket": "12.3", "reward": 1.0, "verifier": "people@1"}"""

    model_config = ConfigDict(extra="forbid", strict=True)

    ticket: str = Field(pattern=r"^(0|[1-9]\d{0,14})\.(0|[1-9]\d{0,5})$")
    reward: _Number = Field(ge=-MAX_REWARD, le=MAX_REWARD)
    breakdown: dict[_Name, _Number] = Field(default_factory=dict, max_length=MAX_TABLE_ENTRIES)
    reason: str = Field("", max_length=MAX_REASON_CHARACTERS)
    verifier: _Name = Field(min_length=1)


class TicketRoutes:
    """The routes over one `Books`."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def add_to(self, router: APIRouter) -> None:
        """Adds every route, below /jobs/{job_id}."""
        job = "/jobs/{job_id}"
        letter = job + "/dead-letters/{letter_id}"
        body = {"requestBody": {"required": True, "content": {"application/json": {"schema": _VERDICT_SCHEMA}}}}
        reads: dict[str, Any] = {"methods": ["GET"], "tags": ["tickets"], "responses": READS}
        asks: dict[str, Any] = {"methods": ["POST"], "tags": ["tickets"], "status_code": 202}
        add = router.add_api_route
        add(job + "/ledger", self.ledger, operation_id="ledger", **reads)
        add(job + "/verdicts", self.judge, operation_id="judge", openapi_extra=body, responses=TAKES, **asks)
        add(job + "/dead-letters", self.letters, operation_id="dead_letters", **reads)
        add(letter, self.letter, operation_id="dead_letter", **reads)
        add(letter + "/requeue", self.requeue, operation_id="requeue", responses=STEERS, **asks)

    async def ledger(self, job: ViewedJob) -> LedgerView:
        """The state of every ticket that the job has issued, by site."""
        return await self._books.ledger(job)

    async def judge(self, job: SteeredJob, request: Request) -> Accepted:
        """Hands in a verdict that came after its rollout. 404: no such ticket is out. 409: it awaits none."""
        body = await read_model(request, VerdictBody)
        verdict = Verdict(body.reward, body.verifier, body.breakdown, reason=body.reason)
        await self._books.judge(job, body.ticket, verdict)
        return {"accepted": body.ticket}

    async def letters(
        self,
        job: ViewedJob,
        after: Annotated[str, Query(max_length=100)] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_LETTERS)] = 100,
    ) -> LetterPage:
        """Tickets that came to nothing and rollouts that were refused, oldest first, after the letter `after`."""
        return {"letters": await self._books.letters(job, after, limit)}

    async def letter(self, job: ViewedJob, letter_id: str) -> WholeLetter:
        """One dead letter, with what came."""
        return await self._books.letter(job, letter_id)

    async def requeue(self, job: SteeredJob, letter_id: str) -> Accepted:
        """Has the letter's task attempted again, as a new group. 409: nobody knows its task, or the job has ended."""
        await self._books.requeue(job, letter_id)
        return {"accepted": letter_id}


_VERDICT_SCHEMA = VerdictBody.model_json_schema()
