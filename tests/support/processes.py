"""Starts real Longshore processes for tests, and ends them by id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """`longshore serve NAME` as a subprocess with its own log; can be killed and started again on the same port."""

    def __init__(self, service: str, folder: Path, **settings: object) -> None:
        self.service = service
        self.log = folder / f"{service}.log"
        self.address = f"127.0.0.1:{free_port()}"
        named = {"listen": self.address, "metrics_listen": f"127.0.0.1:{free_port()}", "name": f"{service}-0"}
        self.metrics_address = named["metrics_listen"]
        values = {f"LONGSHORE_{key.upper()}": str(value) for key, value in {**named, **settings}.items()}
        # What a supervisor would be told to run.
        self.argv = (sys.executable, "-m", "longshore", "serve", service)
        self.env = {"OMP_NUM_THREADS": "1", **values}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Service:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.argv, env={**os.environ, **self.env}, stdout=log, stderr=log)
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)

    def wait(self, timeout: float) -> int:
        """Exit code of a process that ends by itself."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.service} did not end: {self.tail()}") from None

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def wait_serving(self, name: str = "", timeout: float = 60.0) -> Service:
        """Until health says SERVING for `name`."""
        deadline = time.monotonic() + timeout
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                assert self.process is not None
                assert self.process.poll() is None, f"{self.service} ended: {self.tail()}"
                assert time.monotonic() < deadline, f"{self.service} is not serving {name!r}: {self.tail()}"
                try:
                    reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=2)
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return self
                except grpc.RpcError:
                    pass
                time.sleep(0.05)

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
