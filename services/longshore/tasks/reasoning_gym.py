"""Task source and verifier `reasoning-gym`: procedural problems of the reasoning-gym library, scored by itself.

The library takes seconds to import, so it is imported where it is first needed. A task carries the library's whole
entry, so that a verifier needs neither the source nor its seed.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from longshore.config import TasksSpec
from longshore.errors import Fault, InvalidJobSpec, PluginError, Rejected
from longshore.tasks import plain_json
from longshore.tasks.source import MAX_INFO_CHARACTERS
from longshore.tasks.verification import ScoreRequest, check_pattern, extracted
from longshore.types import Message, Task, Verdict

INFO_KEY = "reasoning_gym"
# Their scorers run the answer, or text of the entry, as Python (eval, sympy.parse_expr): law 10.
RUNS_CODE = frozenset(
    {
        "binary_matrix",
        "bitwise_arithmetic",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "number_sorting",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
# Why others cannot be had.
_REFUSED = {
    "composite": "mixes data sets, each of which would need its own check; name one of them",
    # In the gateway too, where a job is checked before it is taken.
    "codeio": "makes its problems by running programs that a model wrote; needs the sandbox",
}
# Data sets that make a table of their whole size at the start; the others make each problem when asked.
_FINITE = {"acre": 2_000, "gsm_symbolic": 200_000, "list_functions": 200_000, "word_ladder": 20_000}
_ENDLESS = 2**31 - 1
_RESERVED = ("seed", "size")


class ReasoningGymSource:
    """Problems of the data set `tasks.dataset`; `tasks.options` are its configuration."""

    def __init__(self, spec: TasksSpec, seed: int, environment: str) -> None:
        faults = _check_spec(spec)
        if faults or spec.dataset is None:
            raise InvalidJobSpec(faults)
        self._dataset, self._options, self._environment = spec.dataset, spec.options, environment
        self.version = _version()
        self.size: int | None = _FINITE.get(spec.dataset)
        try:
            self._problems = _create(spec.dataset, seed=seed, size=self.size or _ENDLESS, **spec.options)
            self.task(0)
        except Exception as error:  # noqa: BLE001 - data sets assert, raise anything, and are given a stranger's options
            text = f"reasoning-gym refuses them: {error or type(error).__name__}"
            raise InvalidJobSpec([Fault("tasks.options", spec.options, text)]) from None

    def task(self, ordinal: int) -> Task | None:
        """Raises TypeError or ValueError for an entry that cannot travel."""
        if self.size is not None and ordinal >= self.size:
            return None
        entry = self._problems[ordinal]
        info = {"dataset": self._dataset, "options": self._options, "entry": plain_json.encode(entry)}
        if len(json.dumps(info)) > MAX_INFO_CHARACTERS:
            raise ValueError(f"problem {ordinal} is larger than {MAX_INFO_CHARACTERS} characters")
        return Task(
            task_id=f"{self._dataset}-{ordinal}",
            messages=(Message("user", str(entry["question"])),),
            answer=None if entry["answer"] is None else str(entry["answer"]),
            info={INFO_KEY: info},
            environment=self._environment,
        )


class ReasoningGymVerifier:
    """Scores with the data set's own `score_answer`. Option `extract`: a pattern whose group is the answer."""

    def __init__(self, options: dict[str, object]) -> None:
        self.version = _version()
        # Paid before the first score, whose deadline it would eat.
        _library()
        pattern = options.get("extract")
        self._pattern = re.compile(str(pattern), re.DOTALL) if pattern is not None else None

    @classmethod
    def check_options(cls, options: dict[str, object]) -> list[str]:
        """What is wrong with `verifier.options`."""
        return [f"unknown option {key!r}; known: extract" for key in options if key != "extract"] + check_pattern(
            options
        )

    @classmethod
    def check_task(cls, task: Task) -> str | None:
        """What a task lacks."""
        return None if INFO_KEY in task.info else "was not made by the task source reasoning-gym"

    def score(self, request: ScoreRequest) -> Verdict:
        """Raises Rejected for a task that the source did not make."""
        dataset, options, entry = _problem(request.task)
        answer = extracted(request.reply, self._pattern)
        if answer is None:
            return Verdict(0.0, "reasoning-gym", {"found": 0.0}, reason="the reply has no match of `extract`")
        return Verdict(float(_scorer(dataset, options).score_answer(answer, entry)), "reasoning-gym")


def _check_spec(spec: TasksSpec) -> list[Fault]:
    faults = []
    if spec.path is not None:
        faults.append(Fault("tasks.path", str(spec.path), "is for file-backed sources, not for reasoning-gym"))
    faults.extend(
        Fault(f"tasks.options.{key}", spec.options[key], "is set by the job (seed) or not at all")
        for key in _RESERVED
        if key in spec.options
    )
    if spec.dataset is None:
        faults.append(Fault("tasks.dataset", None, "source reasoning-gym needs a data set, for example chain_sum"))
    elif refusal := _refusal(spec.dataset):
        faults.append(Fault("tasks.dataset", spec.dataset, refusal))
    return faults


def _refusal(dataset: str) -> str | None:
    """Why a data set cannot be used; None: it can."""
    if dataset in RUNS_CODE:
        return "its scorer evaluates the answer as code; needs the sandbox"
    if dataset in _REFUSED:
        return _REFUSED[dataset]
    try:
        known = _library().factory.DATASETS
    except PluginError as error:
        return str(error)
    return None if dataset in known else f"reasoning-gym has no such data set; it has {', '.join(usable_datasets())}"


def usable_datasets() -> list[str]:
    """Data sets that are not refused, sorted."""
    return sorted(set(_library().factory.DATASETS) - RUNS_CODE - set(_REFUSED))


def _problem(task: Task) -> tuple[str, str, dict[str, Any]]:
    """Data set, options as JSON, and entry of a task that came over a wire."""
    info = task.info.get(INFO_KEY)
    if not isinstance(info, dict) or not isinstance(info.get("dataset"), str):
        raise Rejected("task", f"task {task.task_id} was not made by the task source reasoning-gym")
    if refusal := _refusal(info["dataset"]):
        raise Rejected("task", f"data set {info['dataset']}: {refusal}")
    entry = plain_json.decode(info.get("entry"))
    if not isinstance(entry, dict):
        raise Rejected("task", f"task {task.task_id} has no entry")
    return info["dataset"], json.dumps(info.get("options", {}), sort_keys=True), entry


@functools.lru_cache(maxsize=16)
def _scorer(dataset: str, options: str) -> Any:
    return _create(dataset, seed=0, **json.loads(options))


def _create(dataset: str, **options: object) -> Any:
    return _library().create_dataset(dataset, **options)


def _library() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise PluginError(f"reasoning-gym is not installed ({error}); install longshore[verifier]") from None


def _version() -> str:
    try:
        return version("reasoning-gym")
    except PackageNotFoundError:
        raise PluginError("reasoning-gym is not installed; install longshore[verifier]") from None
