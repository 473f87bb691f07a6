"""Durable checkpoints of the learner: weights, optimizer, random state, ledger. Atomic, verified when loaded.

A checkpoint is a folder `checkpoint_000007/` of safetensors files and `state.json`, with the SHA-256 of each in
`manifest.json`. The trained weights are whole, under their Hugging Face names; of the rest, where ranks share it out,
each has written its share (ranks/shards.py). Any number of ranks can go on from what any other number has written.

It is written under another name, synced, and renamed; a torn one is passed over for the one before. The number only
grows, so that no checkpoint ever replaces another. One of an older learner epoch, whatever its number, is older: a
learner that was superseded while it slept can write one more.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longshore.errors import ConfigError, IntegrityError
from longshore.learner.disk import sync
from longshore.learner.frozen import ANCHOR, REFERENCE
from longshore.learner.ranks.ranks import Ranks
from longshore.learner.ranks.sharding import on_cpu, whole
from longshore.learner.ranks.shards import read_into, sizes, write_shards
from longshore.learner.trainer import Trainer

log = structlog.get_logger()

# What versions of safetensors say of a full disk.
_FULL_TEXTS = ("StorageFull", f"code: {errno.ENOSPC}", f"os error {errno.ENOSPC}")

KEEP = 2
# Of a snapshot's state: the weights that its adapters are adapters of.
_BASE = "base_weights"
_RANDOM = "random_state"


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that the next train step depends on; safe to write while training goes on.

    Where ranks share the policy out it is the leader's: `policy` is whole, the other tensors are its shares. One that
    was found on a disk for them has no tensors: each rank reads its own from the folder.
    """

    step: int
    policy: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random_state: Tensor
    # Weights of earlier policies, by "which|parameter".
    frozen: dict[str, Tensor]
    # JSON-compatible: ledger, cursor, versions, statistics.
    state: dict[str, object]
    # Those that have the other shares; None: there are none.
    ranks: Ranks | None = None
    # Where it was found.
    folder: Path | None = None


def take_snapshot(trainer: Trainer, step: int, state: dict[str, object]) -> Snapshot:
    """Copies the trainer's tensors. `state` must be JSON-compatible and is kept as it is."""
    if trainer.adapters is not None:
        state = {**state, _BASE: trainer.adapters.base_digest}
    ranks = trainer.ranks
    with ranks.command("snapshot"):
        policy, shares = copied_state(trainer)
    random_state = shares.pop(_RANDOM)
    frozen = {key: shares.pop(key) for key in list(shares) if _is_frozen(key)}
    return Snapshot(step, policy, shares, random_state, frozen, state, ranks if ranks.size > 1 else None)


def copied_state(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """On every rank at the same time: the trained weights, whole (the leader's alone), and this rank's shares of all
    else, by "parameter|slot of the optimizer" and "which frozen policy|parameter". Copies, on the CPU."""
    policy = {}
    for name, parameter in trainer.named_parameters():
        value = whole(parameter.detach())
        if trainer.ranks.is_leader:
            policy[name] = value.to("cpu", copy=True)
    names = {parameter: name for name, parameter in trainer.named_parameters()}
    shares = {
        f"{names[parameter]}|{key}": on_cpu(value.detach(), trainer.ranks)
        for parameter, slots in trainer.optimizer.state.items()
        for key, value in slots.items()
        if isinstance(value, Tensor)
    }
    for which, weights in trainer.frozen.weights.items():
        shares |= {f"{which}|{name}": on_cpu(value, trainer.ranks) for name, value in weights.items()}
    return policy, {**shares, _RANDOM: torch.get_rng_state()}


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
    if trainer.ranks.size > 1:
        assert snapshot.folder is not None
        with trainer.ranks.command("restore", {"path": str(snapshot.folder)}):
            read_shares(trainer, snapshot.folder)
        return
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


def read_shares(trainer: Trainer, folder: Path) -> None:
    """On every rank at the same time: puts its shares of a written checkpoint into policy and optimizer, whoever wrote
    it.

    Raises:
        KeyError: it has nothing of a parameter.
    """
    targets: dict[str, Tensor] = {_RANDOM: torch.empty_like(torch.get_rng_state())}
    known = sizes(folder)
    parameters = dict(trainer.named_parameters())
    trainer.frozen.weights = {}
    targets |= {name: parameter.detach() for name, parameter in parameters.items()}
    for key, size in known.items():
        first, _, second = key.partition("|")
        if _is_frozen(key):
            targets[key] = trainer.frozen.weights.setdefault(first, {})[second] = parameters[second].detach().clone()
        elif second and first in parameters:
            like = parameters[first]
            slot = torch.empty(size, device=like.device) if size != like.shape else torch.empty_like(like.detach())
            targets[key] = trainer.optimizer.state[like][second] = slot
    read_into(folder, targets)
    torch.set_rng_state(targets[_RANDOM])


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
    if snapshot.ranks is None:
        save_file({**snapshot.optimizer, _RANDOM: snapshot.random_state}, part / "trainer.safetensors")
        save_file(snapshot.frozen, part / "frozen.safetensors")
    else:
        with snapshot.ranks.command("write", {"path": str(part)}):
            pass
        shares = {**snapshot.optimizer, **snapshot.frozen, _RANDOM: snapshot.random_state}
        write_shards(part, shares, snapshot.ranks)
    (part / "state.json").write_text(json.dumps(snapshot.state), encoding="utf-8")
    sums = {path.name: _sha256(path) for path in sorted(part.iterdir())}
    manifest = {"step": snapshot.step, "epoch": snapshot.state.get("epoch", 0), "sha256": sums}
    (part / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for path in [*part.iterdir(), part]:
        sync(path)


def load_newest(folder: Path, *, tensors: bool = True) -> Snapshot | None:
    """The newest checkpoint whose checksums hold; None when there is none. Without `tensors` they stay on the disk."""
    for path in reversed(_oldest_first(folder)):
        try:
            return _load(path, tensors)
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


def _load(path: Path, wanted: bool) -> Snapshot:
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    for name, expected in manifest["sha256"].items():
        if _sha256(path / name) != expected:
            raise IntegrityError(f"{path / name} does not match its checksum")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    found = Snapshot(manifest["step"], {}, {}, torch.empty(0, dtype=torch.uint8), {}, state, folder=path)
    if not wanted:
        return found
    policy = load_file(path / "model.safetensors")
    if (path / "trainer.safetensors").exists():
        others = {**load_file(path / "trainer.safetensors"), **load_file(path / "frozen.safetensors")}
    else:
        others = {key: torch.empty(size) for key, size in sizes(path).items() if key not in policy}
        others[_RANDOM] = torch.empty(others[_RANDOM].shape, dtype=torch.uint8)
        read_into(path, others)
    random_state = others.pop(_RANDOM)
    frozen = {key: others.pop(key) for key in list(others) if _is_frozen(key)}
    return replace(found, policy=policy, optimizer=others, random_state=random_state, frozen=frozen)


def _is_frozen(key: str) -> bool:
    return key.partition("|")[0] in (REFERENCE, ANCHOR)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
