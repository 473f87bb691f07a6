"""A server that speaks S3 on loopback: moto's, as a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

DEADLINE_S = 60.0


class S3Server:
    """One empty bucket; everything in it is gone when the server is closed."""

    bucket = "weights"

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        # What obstore reads.
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        self._log = folder / "s3.log"
        argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            self._create_bucket()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _create_bucket(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            assert self._process.poll() is None, self._log.read_text()
            try:
                request = urllib.request.Request(f"{self.url}/{self.bucket}", method="PUT")
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.05)
