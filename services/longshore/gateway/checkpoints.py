"""The checkpoints in a job's folder: the learner's durable ones, and the trained model that it leaves at its end.

A pinned one is held by links of its own, so that it stays when the learner removes the older ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from longshore.errors import Conflict, NotFound

FINAL = "final"
_NAME = re.compile(r"checkpoint_\d{6}")
_KEPT, _PINNED = Path("learner", "checkpoints"), Path("pinned")
_FINAL_FOLDER = "checkpoint"


@dataclass(frozen=True)
class CheckpointFile:
    """`sha256` in hex; None where nobody wrote it down."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint. `step` is None for the final model."""

    name: str
    step: int | None
    pinned: bool
    files: tuple[CheckpointFile, ...]


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Newest first; the final model before all."""
    names = {path.name for folder in (_KEPT, _PINNED) for path in (run_dir / folder).glob("checkpoint_*")}
    found = [_read(run_dir, name) for name in [FINAL, *sorted(names, reverse=True)]]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def checkpoint_file(run_dir: Path, name: str, file: str) -> Path:
    """Where a checkpoint's file is. Raises NotFound."""
    checkpoint = _read(run_dir, name) if name == FINAL or _NAME.fullmatch(name) else None
    # Only what was listed: no name of a caller's becomes a path otherwise.
    if checkpoint is None or file not in {item.name for item in checkpoint.files}:
        raise NotFound(f"there is no file {file} of checkpoint {name}")
    return _folder(run_dir, name) / file


def pin(run_dir: Path, name: str) -> Checkpoint:
    """Holds a checkpoint until it is unpinned. Raises NotFound, or Conflict for the final model, which stays anyway."""
    source, target = _checked(run_dir, name, _KEPT), run_dir / _PINNED / name
    if not target.exists():
        part = target.with_name(f".{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            for path in source.iterdir():
                os.link(path, part / path.name)
            part.rename(target)
        except FileNotFoundError:
            # The learner removed it while we looked.
            shutil.rmtree(part, ignore_errors=True)
            raise NotFound(f"there is no checkpoint {name} any more") from None
    checkpoint = _read(run_dir, name)
    assert checkpoint is not None
    return checkpoint


def unpin(run_dir: Path, name: str) -> None:
    """Raises NotFound, or Conflict for the final model."""
    shutil.rmtree(_checked(run_dir, name, _PINNED), ignore_errors=True)


def _checked(run_dir: Path, name: str, folder: Path) -> Path:
    if name == FINAL:
        raise Conflict("the final model stays as long as its job's folder; it cannot be pinned")
    path = run_dir / folder / name
    if not _NAME.fullmatch(name) or not path.is_dir():
        raise NotFound(f"there is no {'pin of' if folder == _PINNED else 'checkpoint'} {name}")
    return path


def _folder(run_dir: Path, name: str) -> Path:
    if name == FINAL:
        return run_dir / _FINAL_FOLDER
    pinned = run_dir / _PINNED / name
    return pinned if pinned.is_dir() else run_dir / _KEPT / name


def _read(run_dir: Path, name: str) -> Checkpoint | None:
    """None when it is not there, or goes while it is looked at."""
    folder = _folder(run_dir, name)
    try:
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8")) if name != FINAL else {}
        sums = manifest.get("sha256", {})
        files = tuple(CheckpointFile(item, size, sums.get(item)) for item, size in sizes.items())
        step = manifest.get("step")
    except (OSError, ValueError, AttributeError):
        return None
    return Checkpoint(name, step, (run_dir / _PINNED / name).is_dir(), files) if files else None
