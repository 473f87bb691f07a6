"""Launcher values <-> wire messages."""

from __future__ import annotations

from pathlib import Path

from longshore.errors import Rejected
from longshore.launcher.spec import (
    ProcessSpec,
    ProcessState,
    ProcessStatus,
    Ready,
    ReadyKind,
    UnitState,
    UnitStatus,
)
from longshore.proto.v1 import supervisor_pb2 as pb

_READY = {ReadyKind.GRPC: pb.READY_CHECK_GRPC, ReadyKind.REDIS: pb.READY_CHECK_REDIS}
_PROCESS = {
    ProcessState.STARTING: pb.PROCESS_STATE_STARTING,
    ProcessState.READY: pb.PROCESS_STATE_READY,
    ProcessState.BACKOFF: pb.PROCESS_STATE_BACKOFF,
    ProcessState.EXITED: pb.PROCESS_STATE_EXITED,
    ProcessState.GAVE_UP: pb.PROCESS_STATE_GAVE_UP,
}
_UNIT = {
    UnitState.RUNNING: pb.UNIT_STATE_RUNNING,
    UnitState.SUCCEEDED: pb.UNIT_STATE_SUCCEEDED,
    UnitState.FAILED: pb.UNIT_STATE_FAILED,
}
_READY_BACK = {number: kind for kind, number in _READY.items()}
_PROCESS_BACK = {number: state for state, number in _PROCESS.items()}
_UNIT_BACK = {number: state for state, number in _UNIT.items()}


def spec_to_proto(spec: ProcessSpec) -> pb.Process:
    return pb.Process(
        name=spec.name,
        service=spec.service,
        argv=spec.argv,
        env=spec.env,
        log_path=str(spec.log_path),
        ready_check=_READY[spec.ready.kind],
        ready_address=spec.ready.address,
        completes_unit=spec.completes_unit,
    )


def spec_from_proto(message: pb.Process) -> ProcessSpec:
    """Raises Rejected for a process that cannot be run or whose readiness cannot be known."""
    kind = _READY_BACK.get(message.ready_check)
    if not (message.name and message.argv and message.log_path):
        raise Rejected("malformed", "a process needs a name, an argv and a log_path")
    if kind is None or not message.ready_address:
        raise Rejected("malformed", f"process {message.name} does not say how it becomes ready")
    return ProcessSpec(
        name=message.name,
        service=message.service,
        argv=tuple(message.argv),
        env=dict(message.env),
        log_path=Path(message.log_path),
        ready=Ready(kind, message.ready_address),
        completes_unit=message.completes_unit,
    )


def unit_to_proto(unit: UnitStatus) -> pb.UnitStatus:
    return pb.UnitStatus(
        unit=unit.unit,
        state=_UNIT[unit.state],
        message=unit.message,
        processes=[
            pb.ProcessStatus(
                name=process.name,
                state=_PROCESS[process.state],
                pid=process.pid,
                restarts=process.restarts,
                exit_code=process.exit_code,
                log_path=process.log_path,
            )
            for process in unit.processes
        ],
    )


def unit_from_proto(message: pb.UnitStatus) -> UnitStatus:
    return UnitStatus(
        unit=message.unit,
        state=_UNIT_BACK[message.state],
        message=message.message,
        processes=tuple(
            ProcessStatus(
                name=process.name,
                state=_PROCESS_BACK[process.state],
                pid=process.pid,
                restarts=process.restarts,
                exit_code=process.exit_code if process.HasField("exit_code") else None,
                log_path=process.log_path,
            )
            for process in message.processes
        ),
    )
