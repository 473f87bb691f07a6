"""Hands a job's signing over to a new key, whatever moment an earlier attempt was cut off at."""

from __future__ import annotations

import asyncio
from pathlib import Path

from longshore.errors import Conflict
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.weights.client import WeightsClient


async def rotate_key(weights: str, key_file: Path, job_file: Path) -> str:
    """Makes a key, has the present one sign it over at the weight store, and puts it in the present one's place.

    The learner signs its next version with it. Returns the new key's id.

    Raises:
        Conflict: the job has no key yet, because it was never started.
        Unavailable: the weight store does not answer.
    """
    job, old, new = await asyncio.to_thread(_read, key_file, job_file)
    client = WeightsClient(weights, job.ref, bytes.fromhex(job.learner_public_key))
    try:
        await client.rotate_key(old, new)
    finally:
        await client.close()
    await asyncio.to_thread(_next(key_file).replace, key_file)
    return new.key_id


def _read(key_file: Path, job_file: Path) -> tuple[JobFile, SigningKey, SigningKey]:
    """The job, its present key, and the one to come."""
    if not key_file.exists() or not job_file.exists():
        raise Conflict("the job has not been started: it has no key to rotate")
    # A next key that is there already was made by an attempt that was cut off, and may be the store's newest by now.
    to_come = _next(key_file)
    new = SigningKey.load(to_come) if to_come.exists() else SigningKey.create(to_come)
    return JobFile.model_validate_json(job_file.read_text(encoding="utf-8")), SigningKey.load(key_file), new


def _next(key_file: Path) -> Path:
    return key_file.with_suffix(".next")
