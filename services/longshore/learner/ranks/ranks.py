"""The processes of one learner: rank 0 leads, the others do what it says.

with ranks.command("snapshot"):       # the leader says it, and does its own part
    ...
message = ranks.heard()               # another rank hears it, and does the same

A learner of one process has `ALONE`, whose every operation is the obvious one. Between two commands the leader says
every so often that there is nothing to do, so that each wait has a deadline however long rollouts take to come home.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longshore.errors import ConfigError, Unavailable
from longshore.learner.ranks.environment import RENDEZVOUS, rank
from longshore.learner.ranks.messages import Json, Message, decode, encode, payload_bytes

# For any one exchange: a train step's longest pass, a checkpoint's slowest shard, the import of torch.
PATIENCE = timedelta(minutes=30)
IDLE_S = 60.0
IDLE, END = "idle", "end"


class Ranks:
    """This process among those of its learner."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        """With a `size` above 1 the process group must be there; all ranks call this."""
        self.rank = rank
        self.size = size
        self._lock = threading.RLock()
        self._broken = False
        self._ended = threading.Event()
        if size == 1:
            return
        self.mesh: DeviceMesh = init_device_mesh(device, (size,))
        self.cpu_mesh: DeviceMesh = self.mesh if device == "cpu" else init_device_mesh("cpu", (size,))
        # Commands, sums and checkpoints do not get between each other or between a pass's own exchanges.
        self._commands, self._sums, self.checkpoints = (
            dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(3)
        )
        if self.is_leader:
            threading.Thread(target=self._beat, name="ranks", daemon=True).start()

    @property
    def is_leader(self) -> bool:
        """Whether this is the process that speaks to the broker, and to all others."""
        return self.rank == 0

    @contextlib.contextmanager
    def command(
        self, kind: str, told: Json | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """The leader's: tells the other ranks to do something, and meanwhile does its own part in the block.

        Raises:
            Unavailable: another rank is gone.
        """
        assert self.is_leader
        if self.size == 1:
            yield
            return
        with self._lock:
            try:
                self._tell(Message(kind, told or {}, tensors or {}))
                yield
            except BaseException:
                # The others may be waiting in the middle of it: nothing that is said now would be heard.
                self._broken = True
                raise

    def heard(self) -> Message:
        """The others': the leader's next command; blocks until there is one, without those that only say it lives.

        Raises:
            Unavailable: the leader is gone.
        """
        while (message := self.shared(None)).kind == IDLE:
            pass
        return message

    def shared(self, message: Message | None) -> Message:
        """What the leader gives here, on every rank; the others give None. For use within a command."""
        if self.size == 1 or message is not None:
            assert message is not None
            self._tell(message)
            return message
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        header = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(header)
        payload = torch.empty(payload_bytes(header), dtype=torch.uint8)
        self._broadcast(payload)
        return decode(header, payload)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same on each; on the CPU."""
        if self.size == 1:
            return tensor
        total = tensor.detach().cpu().clone()
        dist.all_reduce(total, group=self._sums)
        return total

    def gathered(self, numbers: Tensor) -> list[Tensor]:
        """Every rank's [L] float64 numbers, in the order of ranks; each may have another length."""
        if self.size == 1:
            return [numbers]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([numbers.numel()]), group=self._sums)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.float64)
        padded[: numbers.numel()] = numbers
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=self._sums)
        return [row[: int(length)] for row, length in zip(rows, lengths, strict=True)]

    def end(self) -> None:
        """The leader's last word; harmless when repeated, and when the others are gone."""
        self._ended.set()
        with self._lock:
            if self.size == 1 or self._broken:
                return
            self._broken = True
            with contextlib.suppress(Unavailable):
                self._tell(Message(END))

    def _tell(self, message: Message) -> None:
        if self.size == 1:
            return
        header, payload = encode(message)
        for part in (torch.tensor([header.numel()]), header, payload):
            self._broadcast(part)

    def _broadcast(self, tensor: Tensor) -> None:
        """From the leader to all, in place."""
        if not tensor.numel():
            return
        try:
            dist.broadcast(tensor, 0, group=self._commands)
        except RuntimeError as error:
            raise Unavailable(f"another process of this learner is gone: {error}") from None

    def _beat(self) -> None:
        while not self._ended.wait(IDLE_S):
            if self._lock.acquire(blocking=False):
                try:
                    if not self._broken and not self._ended.is_set():
                        self._tell(Message(IDLE))
                except Unavailable:
                    # Whoever started us sees it too, and ends all.
                    self._broken = True
                finally:
                    self._lock.release()


ALONE = Ranks()


def join(processes: int, device: str) -> Ranks:
    """Finds the other ranks of this learner; returns once all are there.

    Args:
        processes: how many there are to be.
        device: "cpu", or "cuda": each rank then sees the one device that is its own.

    Raises:
        ConfigError: there are more or fewer ranks, or not a device for each.
    """
    number, size = rank(), int(os.environ["WORLD_SIZE"])
    if size != processes:
        raise ConfigError(f"train.processes is {processes}, and {size} processes were started")
    backend = "gloo"
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        _take_device(int(os.environ.get("LOCAL_RANK", number)), processes)
    name = loopback()
    # What the ranks tell each other stays on this machine.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    where = os.environ.get(RENDEZVOUS, "env://")
    dist.init_process_group(backend, init_method=where, rank=number, world_size=size, timeout=PATIENCE)
    return Ranks(number, size, device)


def _take_device(local_rank: int, processes: int) -> None:
    """Hides the other ranks' devices, before anything has looked for one: a thread of ours uses the first by itself."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # How many there are is not asked: whoever asks may keep what it sees.
    names = visible.split(",") if visible else [str(number) for number in range(processes)]
    if len(names) < processes:
        raise ConfigError(
            f"train.processes is {processes}, and CUDA_VISIBLE_DEVICES names {len(names)} devices for them"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank]


def loopback() -> str:
    """The name of the network interface that leads nowhere: "lo" on Linux."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])
