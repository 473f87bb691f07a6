"""A rollout site of one job: its own supervisor, broker, relay, generator, verifier and actors, behind a link.

With the right to, it lives in a network namespace of its own, and reaches home through a forwarder at each end of one
link; without, it shares loopback with home, and its link cannot be cut.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from chaos.netns import Namespace
from chaos.world import PAUSE_S, Machine, World
from longshore.config import SiteSpec
from longshore.launcher.broker_server import own_broker
from longshore.launcher.client import SupervisorClient
from longshore.launcher.plan import Endpoints, JobPaths, plan_job
from longshore.launcher.spec import ProcessSpec
from longshore.settings import JobFile

# Loopback ports at the site that lead to the home site's broker and weight store.
_BROKER_PORT, _WEIGHTS_PORT = 7101, 7102
# Shorter than the longest partition: then home gives the site's tickets to others, and both come back with them.
SITE_LEASE_S = 15.0
UNIT = "site"


class Site(Machine):
    """One rollout site of one job."""

    def __init__(self, site: SiteSpec, world: World, run_dir: Path, namespace: Namespace | None) -> None:
        """`namespace`: open, or None to share loopback with home."""
        super().__init__(site.name, world.folder / f"{site.name}.log")
        self.spec = site
        self._world = world
        self._run_dir = run_dir
        self._namespace = namespace
        self._socket = world.folder / f"{site.name}.sock"
        self._forwarders: list[subprocess.Popen[bytes]] = []
        self._address_file = world.folder / f"{site.name}-weights"
        self._following = asyncio.create_task(self._follow_weights())

    @property
    def broker_folder(self) -> Path:
        return self._run_dir / "sites" / self.spec.name / "broker"

    async def start(self) -> None:
        if not self._forwarders:
            self._address_file.write_text(self._world.weights_address())
            self._forwarders = self._forward()
        self._socket.unlink(missing_ok=True)
        argv = [*self._inside, sys.executable, "-m", "chaos.site_launcher", str(self._socket)]
        self._process = self._run(argv, _env(), self._world.folder)
        await self._up(self._process, self._socket.exists)
        client = SupervisorClient(f"unix:{self._socket}")
        try:
            await client.apply(UNIT, self._plan())
        finally:
            await client.close()
        self._watch(self._socket)

    async def stop(self) -> None:
        self._following.cancel()
        await super().stop()
        for forwarder in self._forwarders:
            forwarder.kill()
            forwarder.wait()

    async def partition(self) -> Callable[[], Awaitable[None]]:
        """Cuts the link; what it returns joins it again."""
        namespace = self._namespace
        assert namespace is not None
        await asyncio.to_thread(namespace.cut)

        async def heal() -> None:
            await asyncio.to_thread(namespace.join)

        return heal

    @property
    def _inside(self) -> Sequence[str]:
        return self._namespace.prefix if self._namespace else ()

    def _plan(self) -> list[ProcessSpec]:
        """What the launcher's own plan has for this site, with our ends of the link as the way home."""
        job = JobFile.model_validate(json.loads((self._run_dir / "job.json").read_text()))
        job = job.model_copy(update={"spec": job.spec.model_copy(update={"sites": (self.spec,)})})
        # The site has no use for the learner's key.
        paths = JobPaths(self._run_dir, self._run_dir / "no.key")
        home = Endpoints(f"redis://127.0.0.1:{_BROKER_PORT}", f"127.0.0.1:{_WEIGHTS_PORT}")
        broker = own_broker(self.broker_folder, self._world.folder / f"{self.spec.name}-broker.sock")
        specs = plan_job(job, home, paths, {self.spec.name: broker})
        return [spec for spec in specs if spec.name.startswith(f"{self.spec.name}-")]

    def _forward(self) -> list[subprocess.Popen[bytes]]:
        broker, weights = f"unix:{self._world.broker_socket}", f"file:{self._address_file}"
        inside = [f"127.0.0.1:{port}" for port in (_BROKER_PORT, _WEIGHTS_PORT)]
        if self._namespace is None:
            return [self._forwarder([], inside, [broker, weights])]
        outside = [f"{self._namespace.outside}:{port}" for port in (_BROKER_PORT, _WEIGHTS_PORT)]
        return [self._forwarder([], outside, [broker, weights]), self._forwarder(self._inside, inside, outside)]

    def _forwarder(self, prefix: Sequence[str], listen: Sequence[str], to: Sequence[str]) -> subprocess.Popen[bytes]:
        pairs = [part for pair in zip(listen, to, strict=True) for part in pair]
        argv = [*prefix, sys.executable, "-m", "chaos.forwarder", *pairs]
        return self._run(argv, _env(), self._world.folder)

    async def _follow_weights(self) -> None:
        """The home site's weight store has another port whenever its supervisor was killed."""
        while True:
            await asyncio.sleep(PAUSE_S)
            address = self._world.weights_address()
            if address and address != self._address_file.read_text():
                self._address_file.write_text(address)


def _env() -> dict[str, str]:
    """Ours, with this package on the path wherever the command runs."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
