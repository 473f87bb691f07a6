"""The verifier `exact-match`: 1 for the reference answer, 0 for anything else."""

from __future__ import annotations

import re

from longshore.tasks.verification import ScoreRequest, check_pattern, extracted
from longshore.types import Task, Verdict

_OPTIONS = ("ignore_case", "extract")


class ExactMatch:
    """Compares stripped texts. Options: `ignore_case`, and `extract`, a pattern whose group is the answer.

    Example: ExactMatch({"extract": "<answer>(.*?)</answer>"})
    """

    version = "1"

    def __init__(self, options: dict[str, object]) -> None:
        self._ignore_case = bool(options.get("ignore_case", False))
        pattern = options.get("extract")
        self._pattern = re.compile(str(pattern), re.DOTALL) if pattern is not None else None

    @classmethod
    def check_options(cls, options: dict[str, object]) -> list[str]:
        """What is wrong with `verifier.options`."""
        faults = [f"unknown option {key!r}; known: {', '.join(_OPTIONS)}" for key in options if key not in _OPTIONS]
        if not isinstance(options.get("ignore_case", False), bool):
            faults.append("ignore_case must be true or false")
        return faults + check_pattern(options)

    @classmethod
    def check_task(cls, task: Task) -> str | None:
        """What a task lacks."""
        return "has no answer to compare with" if task.answer is None else None

    def score(self, request: ScoreRequest) -> Verdict:
        """Raises ValueError for a task without an answer."""
        if request.task.answer is None:
            raise ValueError(f"task {request.task.task_id} has no answer to compare with")
        given = extracted(request.reply, self._pattern)
        if given is None:
            return Verdict(0.0, "exact-match", {"found": 0.0}, reason="the reply has no match of `extract`")
        wanted = request.task.answer.strip()
        if self._ignore_case:
            given, wanted = given.casefold(), wanted.casefold()
        return Verdict(float(given == wanted), "exact-match")
