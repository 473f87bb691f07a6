"""What is wrong with a job beyond its document: files that are not there, plug-ins that are not installed, parts that
do not fit each other.

Runs where the plug-ins are: in the gateway, before a job is accepted. It may take seconds and raises nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from longshore.config import JobSpec, parse_what_stands
from longshore.config_model import DirectoryModel, GgufModel
from longshore.errors import Fault, InvalidJobSpec, PluginError
from longshore.job_faults import is_told
from longshore.model_files import checkpoint_faults, gguf_fault
from longshore.tasks import registry
from longshore.tasks.environment import declaration_fault
from longshore.tasks.examples import open_source
from longshore.tasks.source import TaskSource, scan_heldout, scan_limit, too_few
from longshore.types import Task

SAMPLE_TASKS = 20
MAX_SCAN_SECONDS = 5.0


def check_document(document: object, check: Callable[[JobSpec], list[Fault]] | None = None) -> JobSpec:
    """Parses a job's document and checks it against what is installed here.

    Args:
        check: does what `check_job` does, elsewhere.

    Raises:
        InvalidJobSpec: with every fault, those of the document and those of the world in one list.
    """
    spec, faults = parse_what_stands(document)
    told = {fault.path for fault in faults}
    more = [fault for fault in (check or check_job)(spec) if not is_told(fault.path, told)] if spec else []
    if spec is None or faults or more:
        raise InvalidJobSpec(faults + more)
    return spec


def check_job(spec: JobSpec) -> list[Fault]:
    """Everything that would make the job fail at its start; empty: nothing found."""
    faults = _guarded("model", spec.model.kind, lambda: _check_model(spec))
    faults += _check_plugin(registry.ENVIRONMENTS, "environment", spec.environment.name, spec.environment.options)
    faults += _check_plugin(registry.VERIFIERS, "verifier", spec.verifier.name, spec.verifier.options)
    try:
        registry.load(registry.SOURCES, spec.tasks.source)
    except PluginError as error:
        return [*faults, Fault("tasks.source", spec.tasks.source, str(error))]
    return faults + _guarded("tasks", spec.tasks.source, lambda: _check_tasks(spec))


def _check_model(spec: JobSpec) -> list[Fault]:
    model = spec.model
    if isinstance(model, DirectoryModel):
        return [Fault("model.path", str(model.path), text) for text in checkpoint_faults(model.path)]
    if isinstance(model, GgufModel) and (text := gguf_fault(model.path)):
        return [Fault("model.path", str(model.path), text)]
    # What the hub has is for the learner to find out: a gateway may be without a network.
    return []


def _check_plugin(group: str, part: str, name: str, options: dict[str, object]) -> list[Fault]:
    try:
        kind = registry.load(group, name)
    except PluginError as error:
        return [Fault(f"{part}.name", name, str(error))]
    if group == registry.ENVIRONMENTS and (wrong := declaration_fault(kind)):
        return [Fault(f"{part}.name", name, f"the environment {wrong}")]
    check = getattr(kind, "check_options", None)
    if check is None:
        return []
    where = f"{part}.options"
    return _guarded(where, options, lambda: [Fault(where, options, text) for text in check(options)])


def _guarded(path: str, value: object, check: Callable[[], list[Fault]]) -> list[Fault]:
    """Runs a check that calls a plug-in: whatever it raises becomes a fault."""
    try:
        return check()
    except InvalidJobSpec as error:
        return error.faults
    except MemoryError:
        return [Fault(path, value, "needs more memory than there is for checking a job")]
    except Exception as error:  # noqa: BLE001 - plug-ins may raise anything, and the gateway must outlive them
        return [Fault(path, value, f"the plug-in failed: {error or type(error).__name__}")]


def _check_tasks(spec: JobSpec) -> list[Fault]:
    source = open_source(spec.tasks, spec.seed, spec.environment.name)
    sample = []
    for ordinal in range(SAMPLE_TASKS):
        if (task := source.task(ordinal)) is None:
            break
        sample.append(task)
    if not sample:
        return [Fault("tasks.source", spec.tasks.source, "has no tasks")]
    return [*_check_fit(spec, sample), *_check_heldout(spec, source), *_check_curriculum(spec, source)]


def _check_fit(spec: JobSpec, sample: list[Task]) -> list[Fault]:
    """Whether the verifier can score the tasks, and the warm start show their answers."""
    faults = []
    for task in sample:
        if task.answer is None and spec.warm_start is not None:
            message = f"needs answers to demonstrate, and task {task.task_id} has none; remove warm_start"
            faults.append(Fault("warm_start", spec.warm_start.steps, message))
            break
    try:
        check = getattr(registry.load(registry.VERIFIERS, spec.verifier.name), "check_task", None)
    except PluginError:
        # Reported with the verifier itself.
        return faults
    if check is None:
        return faults
    for task in sample:
        if lacks := check(task):
            message = f"cannot score these tasks: task {task.task_id} {lacks}"
            return [*faults, Fault("verifier.name", spec.verifier.name, message)]
    return faults


def _check_curriculum(spec: JobSpec, source: TaskSource) -> list[Fault]:
    """Whether tasks come again at all."""
    told = spec.tasks.curriculum
    if told is None or told.pool is not None or source.size is not None:
        return []
    message = f"source {spec.tasks.source} is endless, so no task would come again: say how many of its first tasks"
    return [Fault("tasks.curriculum.pool", None, message)]


def _check_heldout(spec: JobSpec, source: TaskSource) -> list[Fault]:
    """Whether enough tasks can be held out; a source too slow to tell in seconds is believed."""
    wanted, fraction = spec.evaluation.tasks, spec.tasks.heldout_fraction
    if not wanted or not fraction:
        return []
    found, deadline = 0, time.monotonic() + MAX_SCAN_SECONDS
    for _ in scan_heldout(source, fraction, scan_limit(fraction, wanted)):
        found += 1
        if found == wanted or time.monotonic() > deadline:
            return []
    if time.monotonic() > deadline:
        return []
    return [Fault("evaluation.tasks", wanted, too_few(found, wanted, fraction))]
