"""What a pool and its workers say to each other: one JSON object a line.

The first line to a worker is its job (`{"name", "options"}`), answered by `{"verifier": "name@version"}`; every later
line is a score, answered by `{"verdict"}`. Either may be answered by `{"error", "kind"}` instead.
"""

from __future__ import annotations

import json
import math
from typing import Any

from longshore.errors import Rejected
from longshore.tasks.verification import ScoreRequest
from longshore.types import Message, Task, Verdict

MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_REASON_CHARACTERS = 1024


def dumps(value: dict[str, Any]) -> bytes:
    """One line. JSON escapes newlines and anything beyond ASCII, so that a line is a message."""
    return json.dumps(value).encode("ascii") + b"\n"


def request_to_json(request: ScoreRequest) -> dict[str, Any]:
    task = request.task
    return {
        "task": {
            "task_id": task.task_id,
            "messages": _messages_to_json(task.messages),
            "answer": task.answer,
            "info": task.info,
            "environment": task.environment,
            "num_example_messages": task.num_example_messages,
        },
        "conversation": _messages_to_json(request.conversation),
        "reply": request.reply,
        "turn_info": request.turn_info,
    }


def request_from_json(value: dict[str, Any]) -> ScoreRequest:
    task = value["task"]
    return ScoreRequest(
        task=Task(
            task_id=task["task_id"],
            messages=tuple(_messages_from_json(task["messages"])),
            answer=task["answer"],
            info=task["info"],
            environment=task["environment"],
            num_example_messages=task["num_example_messages"],
        ),
        conversation=_messages_from_json(value["conversation"]),
        reply=value["reply"],
        turn_info=value["turn_info"],
    )


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    """Raises TypeError or ValueError when a plug-in's numbers are not numbers."""
    return {
        "reward": float(verdict.reward),
        "breakdown": {str(key): float(value) for key, value in verdict.breakdown.items()},
        "turn_rewards": [float(value) for value in verdict.turn_rewards],
        "token_rewards": [float(value) for value in verdict.token_rewards],
        "reason": str(verdict.reason)[:MAX_REASON_CHARACTERS],
    }


def verdict_from_json(value: dict[str, Any], verifier: str) -> Verdict:
    """Raises Rejected, reason `not_finite`, for a reward that is no finite number."""
    numbers = [value["reward"], *value["breakdown"].values(), *value["turn_rewards"], *value["token_rewards"]]
    if not all(math.isfinite(number) for number in numbers):
        raise Rejected("not_finite", f"{verifier} gave a reward that is not a finite number")
    return Verdict(
        reward=value["reward"],
        verifier=verifier,
        breakdown=value["breakdown"],
        turn_rewards=tuple(value["turn_rewards"]),
        token_rewards=tuple(value["token_rewards"]),
        reason=value["reason"],
    )


def _messages_to_json(messages: list[Message] | tuple[Message, ...]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _messages_from_json(pairs: list[list[str]]) -> list[Message]:
    return [Message(role, content) for role, content in pairs]
