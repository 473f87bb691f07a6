"""Durable checkpoints of the learner: weights, optimizer, random state, ledger. Atomic, verified when loaded.

A checkpoint is a folder `checkpoint_000007/` of safetensors files and `state.json`, with the SHA-256 of each in
`manifest.json`. It is written under another name, synced, and renamed; a torn one is passed over for the one before.
The number only grows, so that no checkpoint ever replaces another. One of an older learner epoch, whatever its number,
is older: a learner that was superseded while it slept can write one more.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longshore.errors import ConfigError, IntegrityError
from longshore.learner.disk import sync
from longshore.learner.trainer import Trainer

log = structlog.get_logger()

# What versions of safetensors say of a full disk.
_FULL_TEXTS = ("StorageFull", f"code: {errno.ENOSPC}", f"os error {errno.ENOSPC}")

KEEP = 2
# Of a snapshot's state: the weights that its adapters are adapters of.
_BASE = "base_weights"


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that the next train step depends on; safe to write while training goes on."""

    step: int
    policy: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random_state: Tensor
    # Weights of earlier policies, by "which|parameter".
    frozen: dict[str, Tensor]
    # JSON-compatible: ledger, cursor, versions, statistics.
    state: dict[str, object]


def take_snapshot(trainer: Trainer, step: int, state: dict[str, object]) -> Snapshot:
    """Copies the trainer's tensors. `state` must be JSON-compatible and is kept as it is."""
    names = {parameter: name for name, parameter in trainer.named_parameters()}
    optimizer = {
        f"{names[parameter]}|{key}": value.detach().to("cpu", copy=True)
        for parameter, slots in trainer.optimizer.state.items()
        for key, value in slots.items()
        if isinstance(value, Tensor)
    }
    policy = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trainer.named_parameters()}
    frozen = {
        f"{which}|{name}": value.to("cpu", copy=True)
        for which, weights in trainer.frozen.weights.items()
        for name, value in weights.items()
    }
    if trainer.adapters is not None:
        state = {**state, _BASE: trainer.adapters.base_digest}
    return Snapshot(step, policy, optimizer, torch.get_rng_state(), frozen, state)


def restore_snapshot(trainer: Trainer, snapshot: Snapshot) -> None:
    """Puts a snapshot's tensors back into the policy and the optimizer.

    Raises:
        ConfigError: it holds adapters of another model.
    """
    if trainer.adapters is not None and snapshot.state.get(_BASE) != trainer.adapters.base_digest:
        raise ConfigError(
            "the job's model has other weights than the one that its adapters were trained beside: put the checkpoint "
            "that job.json names back as it was"
        )
    with torch.no_grad():
        for name, parameter in trainer.named_parameters():
            parameter.copy_(snapshot.policy[name])
            slots = {
                key.rpartition("|")[2]: value.to(parameter.device, copy=True)
                for key, value in snapshot.optimizer.items()
                if key.rpartition("|")[0] == name
            }
            if slots:
                trainer.optimizer.state[parameter] = slots
    trainer.frozen.weights = {}
    for key, value in snapshot.frozen.items():
        which, _, name = key.partition("|")
        trainer.frozen.weights.setdefault(which, {})[name] = value.clone()
    torch.set_rng_state(snapshot.random_state)


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Writes the next checkpoint and returns its folder once it is durable; older ones beyond KEEP are removed.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    final = folder / f"checkpoint_{_next_number(folder):06d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(part, snapshot)
        part.rename(final)
        sync(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    except SafetensorError as error:
        shutil.rmtree(part, ignore_errors=True)
        # The library tells a full disk by text alone.
        code = errno.ENOSPC if any(text in str(error) for text in _FULL_TEXTS) else errno.EIO
        raise OSError(code, str(error), str(part)) from error
    for old in _oldest_first(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(part: Path, snapshot: Snapshot) -> None:
    part.mkdir(parents=True)
    save_file(snapshot.policy, part / "model.safetensors")
    save_file({**snapshot.optimizer, "random_state": snapshot.random_state}, part / "trainer.safetensors")
    save_file(snapshot.frozen, part / "frozen.safetensors")
    (part / "state.json").write_text(json.dumps(snapshot.state), encoding="utf-8")
    sums = {path.name: _sha256(path) for path in sorted(part.iterdir())}
    manifest = {"step": snapshot.step, "epoch": snapshot.state.get("epoch", 0), "sha256": sums}
    (part / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for path in [*part.iterdir(), part]:
        sync(path)


def load_newest(folder: Path) -> Snapshot | None:
    """The newest checkpoint whose checksums hold; None when there is none."""
    for path in reversed(_oldest_first(folder)):
        try:
            return _load(path)
        except (IntegrityError, OSError, ValueError, KeyError) as error:
            log.warning("checkpoint passed over", path=str(path), reason=str(error))
    return None


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_*"), key=lambda path: (_epoch(path), path.name))


def _epoch(path: Path) -> int:
    """-1 when it cannot be told: then it cannot be loaded either."""
    try:
        return int(json.loads((path / "manifest.json").read_text(encoding="utf-8"))["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _next_number(folder: Path) -> int:
    numbers = [int(path.name.rpartition("_")[2]) for path in folder.glob("checkpoint_*")]
    return max(numbers, default=0) + 1


def _load(path: Path) -> Snapshot:
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    for name, expected in manifest["sha256"].items():
        if _sha256(path / name) != expected:
            raise IntegrityError(f"{path / name} does not match its checksum")
    tensors = load_file(path / "trainer.safetensors")
    random_state = tensors.pop("random_state")
    return Snapshot(
        step=manifest["step"],
        policy=load_file(path / "model.safetensors"),
        optimizer=tensors,
        random_state=random_state,
        frozen=load_file(path / "frozen.safetensors"),
        state=json.loads((path / "state.json").read_text(encoding="utf-8")),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
