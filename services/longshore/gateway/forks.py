"""A new job from a policy version of another one, with changed settings.

The version becomes a Hugging Face checkpoint folder in the new job's own folder: a fork needs its parent no more.
"""

from __future__ import annotations

import asyncio
import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path

from longshore.config import NAME_PATTERN
from longshore.errors import Unavailable
from longshore.gateway.jobs import Jobs, Submission, new_id
from longshore.gateway.store import Job
from longshore.gateway.versions import Export, Versions
from longshore.weight_store.payload import encode_header

Json = dict[str, object]
_FOLDER = "parent"
_MODEL = "model.safetensors"


class Forks:
    """Forks of any job."""

    def __init__(self, jobs: Jobs, versions: Versions, runs_dir: Path) -> None:
        self._jobs = jobs
        self._versions = versions
        self._runs_dir = runs_dir

    async def fork(self, parent: Job, version: int | None, changes: Json, sent: Submission) -> Job:
        """Queues a job that begins with a version of `parent` (None: its newest) instead of the parent's own model.

        Args:
            changes: laid over the parent's spec, as RFC 7396 has it: null takes a setting away.

        Raises:
            NotFound: the version is not on hand.
            Unavailable: the weight store is away, or the version cannot be written.
            And as `Jobs.submit`.
        """
        assert parent.spec is not None
        # What the parent was warmed up to is in its weights.
        spec = {**parent.spec, "project": parent.project, "warm_start": None}
        spec = _merged(spec, changes)
        earlier = await self._jobs.earlier(spec, sent)
        if earlier is not None:
            # Its version may have gone meanwhile, and is not needed any more.
            return earlier
        # A name that is none is refused below; until then it must be no path.
        name = spec.get("name")
        sound = isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)
        job_id = new_id(str(name) if sound else parent.name)
        folder = self._runs_dir / job_id
        spec["model"] = {"kind": "directory", "path": str(folder / _FOLDER)}
        job: Job | None = None
        try:
            async with self._versions.export(parent, version) as export:
                number = export.version.version
                try:
                    await asyncio.to_thread(_write, folder / _FOLDER, export)
                except OSError as error:
                    raise Unavailable(f"version {number} cannot be written: {error.strerror}") from None
            job = await self._jobs.submit(spec, replace(sent, job_id=job_id, parent=(parent.id, number)))
        finally:
            if job is None or job.id != job_id:
                # Refused, or asked for before: then that job has its own.
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return job


def _merged(target: Json, changes: Json) -> Json:
    merged = copy.copy(target)
    for name, value in changes.items():
        present = merged.get(name)
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            merged[name] = _merged(present if isinstance(present, dict) else {}, value)
        else:
            merged[name] = value
    return merged


def _write(folder: Path, export: Export) -> None:
    folder.mkdir(parents=True)
    for name, content in export.assets.items():
        (folder / name).write_bytes(content)
    tensors = export.version.tensors
    assert tensors is not None
    with (folder / _MODEL).open("wb") as file:
        file.write(encode_header(tensors))
        for tensor in tensors:
            file.write(tensor.data)
