"""The local stack: supervisor, broker, weights and gateway on this machine, for as long as a block runs.

async with Stack(state_dir, runs_dir, http_port=0) as stack:
    ...  # stack.url answers
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import longshore
from longshore.errors import ConfigError, LongshoreError
from longshore.launcher import state_dir as state
from longshore.launcher.broker_server import resolve_broker
from longshore.launcher.plan import STACK_UNIT, StackPaths, plan_stack
from longshore.launcher.ports import LOOPBACK, check_free
from longshore.launcher.probe import probe
from longshore.launcher.service import SupervisorService
from longshore.launcher.spec import ProcessState, UnitState, UnitStatus
from longshore.launcher.supervisor import Supervisor
from longshore.proto.v1.supervisor_pb2_grpc import add_SupervisorServiceServicer_to_server
from longshore.rpc.server import RpcServer
from longshore.rpc.sockets import bind_shared

START_TIMEOUT_S = 120.0


class StackFailed(LongshoreError):
    """A shared service was given up, or did not start in time; everything has been stopped."""


class Stack:
    """Owns a state directory and runs the shared services in it."""

    def __init__(
        self,
        state_dir: Path,
        runs_dir: Path,
        http_port: int = 0,
        jobs_since: float = 0.0,
        on_ready: Callable[[str], None] = lambda name: None,
    ) -> None:
        """
        Args:
            http_port: loopback port of the REST API; 0: any free one.
            jobs_since: Unix seconds; jobs created earlier are left for another stack.
            on_ready: told the name of each shared service when it becomes ready for the first time.
        """
        self.state_dir, self.runs_dir = state_dir.resolve(), runs_dir.resolve()
        self.url = ""
        self.api_key = ""
        self._http_port = http_port
        self._jobs_since = jobs_since
        self._on_ready = on_ready
        self._resources = contextlib.AsyncExitStack()
        self._supervisor = Supervisor(probe)

    async def __aenter__(self) -> Stack:
        """Returns once the gateway answers.

        Raises:
            Conflict: another stack owns the state directory.
            ConfigError: no broker, or the port is taken.
            StackFailed: a service did not become ready; nothing is left running.
        """
        async with contextlib.AsyncExitStack() as resources:
            await self._start(resources)
            # Entered in full: from here on `__aexit__` undoes it.
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.__aexit__(kind, error, trace)

    def hurry(self) -> None:
        """Whatever has to stop, now or later, is killed without time to drain."""
        self._supervisor.hurry()

    async def failure(self) -> str:
        """Waits until a shared service is given up, and returns why."""
        async for units in self._supervisor.watch():
            for unit in units:
                if unit.unit == STACK_UNIT and unit.state is UnitState.FAILED:
                    return unit.message
        raise AssertionError("a watch does not end")

    async def _start(self, resources: contextlib.AsyncExitStack) -> None:
        resources.enter_context(state.locked(self.state_dir))
        self.runs_dir.mkdir(parents=True, exist_ok=True)
        sockets = resources.enter_context(state.socket_dir(self.state_dir))
        port = self._reserve_http_port(resources)
        broker = await resolve_broker(self.state_dir, sockets)
        self.api_key = resources.enter_context(state.api_key(self.state_dir))
        address = f"unix:{sockets / 'supervisor.sock'}"
        await self._serve(address, resources)
        resources.push_async_callback(self._supervisor.close, STACK_UNIT)
        paths = StackPaths(self.state_dir, self.runs_dir, address)
        await self._supervisor.apply(STACK_UNIT, plan_stack(broker, paths, port, self._jobs_since))
        await self._await_ready()
        self.url = f"http://{LOOPBACK}:{port}"
        up = state.UpFile(self.url, os.getpid(), longshore.__version__)
        resources.enter_context(state.announced(self.state_dir, up))

    def _reserve_http_port(self, resources: contextlib.AsyncExitStack) -> int:
        if self._http_port:
            check_free(self._http_port)
        try:
            held = bind_shared(LOOPBACK, self._http_port)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {self._http_port} cannot be had: {error}") from None
        resources.callback(held.close)
        return int(held.getsockname()[1])

    async def _serve(self, address: str, resources: contextlib.AsyncExitStack) -> None:
        server = RpcServer(address)
        add_SupervisorServiceServicer_to_server(SupervisorService(self._supervisor), server.server)
        await server.start()
        resources.push_async_callback(server.drain, 0.0)

    async def _await_ready(self) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._watch_until_ready()
        except TimeoutError:
            raise StackFailed(
                f"the stack was not ready within {START_TIMEOUT_S:.0f} s; logs: {self.state_dir / 'logs'}"
            ) from None

    async def _watch_until_ready(self) -> None:
        told: set[str] = set()
        async for units in self._supervisor.watch():
            stack = next(unit for unit in units if unit.unit == STACK_UNIT)
            self._tell(stack, told)
            if stack.state is UnitState.FAILED:
                raise StackFailed(stack.message)
            if stack.ready:
                return

    def _tell(self, stack: UnitStatus, told: set[str]) -> None:
        for process in stack.processes:
            if process.state is ProcessState.READY and process.name not in told:
                told.add(process.name)
                self._on_ready(process.name)
