"""The wide-area part of the weight sync benchmark: 100 Mbit/s, 50 ms each way, 0.1 % loss, TLS, BBR.

The real origin at home; at the site a client, or a real relay and eight clients behind it, each a process of its own.
The peers send the same versions over the same link, with the same settings.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks import wan
from benchmarks.common_broker import PrivateBroker
from benchmarks.weight_sync_far import JOB
from longshore.settings import JobFile
from longshore.signing import SigningKey

ROUND_TRIP_MS, MBIT, LOSS = 100.0, 100.0, 0.001
ORIGIN_PORT, RELAY_PORT, SINK_PORT, HTTP_PORT, RSYNC_PORT = 7201, 7202, 7203, 7204, 7205
FOLLOWERS = 8
WAIT_S = 900.0


@dataclass(frozen=True)
class Sync:
    """One version's way: from the call of publish until it is held, proven, at each follower."""

    version: int
    seconds: list[float]
    wan_bytes: int


class Talker:
    """A process that answers with lines of JSON."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], log: Path) -> None:
        self._log_path = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def ask(self, line: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """Its next line. Raises RuntimeError when it has ended."""
        line = _stdout(self.process).readline()
        if not line:
            raise self._ended()
        said: dict[str, Any] = json.loads(line)
        return said

    def check(self) -> None:
        """Raises RuntimeError when it has ended: who waits for it by other means would wait in vain."""
        if self.process.poll() is not None:
            raise self._ended()

    def _ended(self) -> RuntimeError:
        return RuntimeError(f"{self._log_path.stem} ended: {self._log_path.read_text()[-1500:]}")

    def end(self) -> None:
        # With what it has started itself, as vLLM does. The group's number is the leader's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _stdout(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


class World:
    """The link and what runs at its two ends."""

    def __init__(self, link: wan.Link, folder: Path, chain: Path, versions: int) -> None:
        self.link = link
        self.folder = folder
        self.env = {**os.environ, **_certificates(folder), "PYTHONPATH": os.pathsep.join(["services", "."])}
        self.env |= {"LONGSHORE_METRICS_LISTEN": "127.0.0.1:0", "LONGSHORE_LOG_LEVEL": "warning"}
        self.env["OMP_NUM_THREADS"] = "1"
        key = SigningKey.create(folder / "key.pem")
        self.public_key = key.public_key.hex()
        self._running: list[Talker] = []
        self._settings()
        self.origin = f"{wan.HOME}:{ORIGIN_PORT}"
        store = {"LONGSHORE_LISTEN": self.origin, "LONGSHORE_STORE_URL": str(folder / "origin")}
        self._serve("weights", link.home, store)
        argv = ["publish", self.origin, str(chain), str(versions), str(folder / "key.pem")]
        self.publisher = self.talk(link.home, "publisher", argv)
        self.raw = int(self.publisher.hear()["raw"])
        self.published = -1

    def talk(self, end: Sequence[str], name: str, words: Sequence[str]) -> Talker:
        argv = [*end, sys.executable, "-m", "benchmarks.weight_sync_far", *words]
        self._running.append(Talker(argv, self.env, self.folder / f"{name}.log"))
        return self._running[-1]

    def follower(self, address: str, name: str) -> Talker:
        follower = self.talk(self.link.site, name, ["follow", address, self.public_key])
        follower.hear()
        return follower

    def sync(self, followers: Sequence[Talker]) -> Sync:
        """Publishes the next version and waits until every follower holds it."""
        self.published += 1
        before = self.received()
        told = self.publisher.ask(self.published)
        times = []
        for follower in followers:
            while (said := follower.hear())["version"] != self.published:
                pass
            times.append(said["at"] - told["began"])
        return Sync(self.published, times, self.received() - before)

    def received(self) -> int:
        """Bytes that have come to the site over the link."""
        path = "/sys/class/net/wan0/statistics/rx_bytes"
        done = subprocess.run([*self.link.site, "cat", path], capture_output=True, text=True, check=True)
        return int(done.stdout)

    def relay(self, broker: PrivateBroker) -> str:
        """Starts the site's relay; returns its address."""
        spec = {
            "name": "weight-sync",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "sites": [{"name": "west"}],
        }
        document = {"project": JOB.project, "job": JOB.job, "spec": spec, "learner_public_key": self.public_key}
        job_file = self.folder / "job.json"
        job_file.write_text(JobFile.model_validate(document).model_dump_json())
        address = f"{wan.SITE}:{RELAY_PORT}"
        settings = {
            "LISTEN": address,
            "JOB_FILE": str(job_file),
            "SITE": "west",
            "BROKER_URL": broker.url,
            "HOME_BROKER_URL": f"redis://{wan.HOME}:9",
            "HOME_WEIGHTS": self.origin,
            "WEIGHTS_DIR": str(self.folder / "mirror"),
            "SPOOL_DIR": str(self.folder / "spool"),
        }
        self._serve("relay", self.link.site, {f"LONGSHORE_{name}": value for name, value in settings.items()})
        return address

    def close(self) -> None:
        for talker in reversed(self._running):
            talker.end()

    def _serve(self, service: str, end: Sequence[str], settings: dict[str, str]) -> None:
        argv = [*end, sys.executable, "-m", "longshore", "serve", service]
        self._running.append(Talker(argv, {**self.env, **settings}, self.folder / f"{service}.log"))
        wait_for(end, settings["LONGSHORE_LISTEN"])

    def _settings(self) -> None:
        """The same for everybody: BBR, since CUBIC makes little of such a link, and rates kept over pauses."""
        for end in (self.link.home, self.link.site):
            for setting in (
                "net.ipv4.tcp_congestion_control=bbr",
                "net.ipv4.tcp_slow_start_after_idle=0",
                "net.ipv4.tcp_rmem=4096 1048576 33554432",
                "net.ipv4.tcp_wmem=4096 1048576 33554432",
            ):
                subprocess.run([*end, "sysctl", "-qw", setting], check=True)


@contextlib.contextmanager
def world(chain: Path, versions: int) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="ls-bench-") as name, wan.link(ROUND_TRIP_MS, MBIT, LOSS) as link:
        made = World(link, Path(name), chain, versions)
        try:
            yield made
        finally:
            made.close()


def goodput(world: World, count: int) -> tuple[float, float]:
    """Bytes a second of one warm plain TCP connection from home to the site, and seconds of its round trip."""
    sink = world.talk(world.link.site, "sink", ["sink", wan.SITE, str(SINK_PORT)])
    sink.hear()
    source = world.talk(world.link.home, "source", ["source", wan.SITE, str(SINK_PORT)])
    source.hear()
    for _ in range(3):
        source.ask(4 << 20)
    round_trip = statistics.median(source.ask(0)["seconds"] for _ in range(5))
    rates = [count / (source.ask(count)["seconds"] - round_trip) for _ in range(3)]
    return statistics.median(rates), round_trip


def over_http(world: World, file: Path) -> float:
    """Seconds to fetch the whole file by HTTP."""
    argv = [*world.link.home, sys.executable, "-m", "http.server", str(HTTP_PORT), "--bind", wan.HOME]
    server = subprocess.Popen(argv, cwd=file.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(world.link.home, f"{wan.HOME}:{HTTP_PORT}")
        url = f"http://{wan.HOME}:{HTTP_PORT}/{file.name}"
        began = time.monotonic()
        subprocess.run([*world.link.site, "curl", "-sfo", str(world.folder / "whole"), url], check=True, timeout=WAIT_S)
        return time.monotonic() - began
    finally:
        server.kill()
        server.wait()


def lacks_rsync() -> str:
    """Why rsync cannot be measured; "" when it can."""
    return "" if shutil.which("rsync") else "rsync is not installed"


def by_rsync(world: World, old: Path, new: Path) -> float:
    """Seconds for `rsync -z --inplace` to turn the old file at the site into the new one."""
    config = world.folder / "rsyncd.conf"
    config.write_text(f"[files]\npath = {new.parent}\nuse chroot = no\nread only = yes\nuid = root\ngid = root\n")
    argv = [*world.link.home, "rsync", "--daemon", "--no-detach", f"--config={config}", f"--port={RSYNC_PORT}"]
    server = subprocess.Popen([*argv, f"--address={wan.HOME}"], stderr=subprocess.DEVNULL)
    try:
        wait_for(world.link.home, f"{wan.HOME}:{RSYNC_PORT}")
        there = world.folder / "there"
        shutil.copyfile(old, there)
        url = f"rsync://{wan.HOME}:{RSYNC_PORT}/files/{new.name}"
        began = time.monotonic()
        fetch = [*world.link.site, "rsync", "-z", "--inplace", "--ignore-times", url, str(there)]
        subprocess.run(fetch, check=True, timeout=WAIT_S)
        took = time.monotonic() - began
        assert there.read_bytes() == new.read_bytes()
        return took
    finally:
        server.terminate()
        server.wait()


def wait_for(end: Sequence[str], address: str) -> None:
    """Until something listens on an address at one end."""
    host, _, port = address.rpartition(":")
    code = (
        "import socket,sys,time\n"
        "end=time.time()+60\n"
        "while time.time()<end:\n"
        "    try: socket.create_connection((sys.argv[1],int(sys.argv[2])),1).close(); sys.exit(0)\n"
        "    except OSError: time.sleep(.1)\n"
        "sys.exit(1)"
    )
    subprocess.run([*end, sys.executable, "-c", code, host, port], check=True)


def _certificates(folder: Path) -> dict[str, str]:
    """A certificate that both ends show and trust, as anything that leaves a machine needs one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])
    now = datetime.datetime.now(datetime.UTC)
    addresses = [x509.IPAddress(ipaddress.ip_address(host)) for host in (wan.HOME, wan.SITE, "127.0.0.1")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    pem = str(folder / "tls.pem")
    return {"LONGSHORE_TLS_CA": pem, "LONGSHORE_TLS_CERT": pem, "LONGSHORE_TLS_KEY": str(folder / "tls.key")}
