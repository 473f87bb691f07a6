"""Shards of a checkpoint: what each rank holds of it, in safetensors files as distributed checkpoint has them.

    shard-00001-model-00001-of-00001.safetensors    rank 0's share of each tensor, and where it belongs, in the header

Read back by any number of processes: each takes what is its own from whichever files have it.
"""

from __future__ import annotations

import errno
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

import structlog
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from longshore.learner.ranks.ranks import Ranks

log = structlog.get_logger()


def write_shards(folder: Path, shares: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Writes this rank's shares, on all ranks at the same time. They are on the CPU, as DTensors where they are shares.

    Raises:
        OSError: a rank could not write its own.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(shares), storage_writer=writer, process_group=ranks.checkpoints)
    except CheckpointException as failed:
        for rank, (error, _) in failed.failures.items():
            if isinstance(error, OSError):
                raise OSError(error.errno or errno.EIO, f"rank {rank}: {error}", str(folder)) from failed
        raise


def sizes(folder: Path) -> dict[str, torch.Size]:
    """The whole shape of every tensor in a checkpoint's folder, whoever wrote it."""
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in known.items()}


def read_into(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fills tensors in place, each whole or, where it is a DTensor, this rank's share of it. No exchange is needed.

    Raises:
        KeyError: one of them is not in the folder.
    """
    missing = targets.keys() - sizes(folder).keys()
    if missing:
        raise KeyError(f"{folder} has no {min(missing)}")
    with warnings.catch_warnings():
        # That it reads alone is what is meant.
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


class ShardWriter:
    """Writes a following rank's part of a checkpoint beside its train steps."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._shares: Mapping[str, Tensor] = {}
        self._thread: threading.Thread | None = None

    def take(self, shares: Mapping[str, Tensor]) -> None:
        """What is to be written next, perhaps more than once: until a disk has room for it."""
        self.wait()
        self._shares = shares

    def begin(self, folder: Path) -> None:
        """Begins to write it."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(folder,), name="shards")
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is written, or has failed; the leader knows which."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, folder: Path) -> None:
        try:
            write_shards(folder, self._shares, self._ranks)
        except OSError as error:
            log.warning("shards not written", folder=str(folder), reason=str(error))
