"""The two ends of a weight sync, each a process that a benchmark talks to by lines of JSON.

    python -m benchmarks.weight_sync_far publish ADDRESS CHAIN_FOLDER COUNT     reads version numbers, publishes them
    python -m benchmarks.weight_sync_far follow ADDRESS                         tells when each version is held, proven
    python -m benchmarks.weight_sync_far sink HOST PORT / source HOST PORT      plain TCP, to know what the link gives

Times are of the machine's monotonic clock, which all processes of one machine share.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from pathlib import Path

from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weights.client import CanaryProbe, Copies, VersionDraft, WeightsClient

JOB = JobRef("default", "weight-sync")
KEEP = 70
COPIES_BYTES = 4 << 30
# One for each direction of a measurement.
BLOCK = bytes(1 << 16)


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


async def publish(address: str, folder: str, count: str, key_file: str) -> None:
    """Holds `count` versions of a chain in memory and publishes the one that each line asks for."""
    from benchmarks.weight_sync_steps import kept

    key = SigningKey.load(Path(key_file))
    versions = [tensors for _, tensors in zip(range(int(count)), kept(Path(folder)).versions(), strict=False)]
    client = WeightsClient(address, JOB, key.public_key)
    await client.register_key(KEEP)
    say(ready=len(versions), raw=sum(len(tensor.data) for tensor in versions[0]))
    while line := await asyncio.to_thread(sys.stdin.readline):
        version = int(line)
        canary = CanaryProbe((1, 2), (-1.0,))
        draft = VersionDraft(version, version, 1, version - 1 if version else None, (canary,), time.time())
        began = time.monotonic()
        await client.publish(key, draft, versions[version], {"config.json": b"{}"}, timeout=600.0)
        say(version=version, began=began, ended=time.monotonic())
    await client.close()


async def follow(address: str, public_key: str) -> None:
    """Follows head, fetches each version, and says when it is held."""
    client = WeightsClient(address, JOB, bytes.fromhex(public_key), Copies(3, COPIES_BYTES))
    say(ready=True)
    async for news in client.watch():
        if news.published:
            policy = await client.fetch(news.version, timeout=600.0)
            say(version=policy.version, at=time.monotonic(), checksum=policy.checksum)


def sink(host: str, port: str) -> None:
    """Takes connections one after another, reads what is sent, and answers each 8-byte length with one byte."""
    with socket.create_server((host, int(port))) as server:
        say(ready=True)
        connection, _ = server.accept()
        with connection:
            while head := connection.recv(8, socket.MSG_WAITALL):
                left = int.from_bytes(head, "big")
                while left:
                    left -= len(connection.recv(min(left, 1 << 18)))
                connection.sendall(b"!")


def source(host: str, port: str) -> None:
    """Sends as many bytes as each line says, and says how long it took until they were acknowledged."""
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        say(ready=True)
        for line in sys.stdin:
            count = int(line)
            began = time.monotonic()
            connection.sendall(count.to_bytes(8, "big"))
            for _ in range(count // len(BLOCK)):
                connection.sendall(BLOCK)
            if count % len(BLOCK):
                connection.sendall(BLOCK[: count % len(BLOCK)])
            connection.recv(1)
            say(seconds=time.monotonic() - began)


def main() -> None:
    role, *rest = sys.argv[1:]
    if role == "publish":
        asyncio.run(publish(*rest))
    elif role == "follow":
        asyncio.run(follow(*rest))
    elif role == "sink":
        sink(*rest)
    else:
        source(*rest)


if __name__ == "__main__":
    main()
