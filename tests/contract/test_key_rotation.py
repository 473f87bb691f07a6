"""A job's signing key is handed over: by the gateway's code, to a real store, with readers who know the old one."""

from __future__ import annotations

from pathlib import Path

import pytest

from longshore.errors import Conflict, Fenced
from longshore.gateway.keys import rotate_key
from longshore.gateway.prepare import job_paths, prepare
from longshore.gateway.states import JobState
from longshore.gateway.store import Job
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.types import JobRef

SPEC = {"name": "rotated", "tasks": {"source": "jsonl"}, "verifier": {"name": "exact-match"}, "train": {"steps": 1}}


class Files:
    """What the gateway keeps of a job."""

    def __init__(self, folder: Path, weights) -> None:
        self.key, self.job = folder / "learner.key", folder / "job.json"
        weights.job, weights.key = JobRef("default", "rotated"), SigningKey.create(self.key)
        document = {
            "project": weights.job.project,
            "job": weights.job.job,
            "spec": SPEC,
            "learner_public_key": weights.key.public_key.hex(),
        }
        self.job.write_text(JobFile.model_validate(document).model_dump_json())


@pytest.fixture
def files(tmp_path: Path, weights) -> Files:
    return Files(tmp_path, weights)


async def published(weights, key: SigningKey, version: int) -> None:
    client = weights.client()
    await client.register_key(5)
    await client.publish(key, weights.draft(version), weights.tensors(version), weights.assets)


async def test_a_reader_with_the_old_key_believes_what_the_new_one_signs(weights, files: Files) -> None:
    old = weights.key
    reader = weights.client()
    await published(weights, old, 0)
    assert (await reader.fetch(0)).version == 0
    key_id = await rotate_key(weights.address, files.key, files.job)
    new = SigningKey.load(files.key)
    assert new.key_id == key_id != old.key_id
    await published(weights, new, 1)
    assert (await reader.fetch(1)).version == 1
    assert (await reader.fetch(0)).version == 0
    assert await reader.head() == 1
    with pytest.raises(Fenced):
        await published(weights, old, 2)


async def test_an_attempt_that_was_cut_off_is_finished_by_the_next(weights, files: Files) -> None:
    old = weights.key
    await published(weights, old, 0)
    # As if it had ended after the store took the rotation and before the file was replaced.
    new = SigningKey.create(files.key.with_suffix(".next"))
    await weights.client().rotate_key(old, new)
    assert await rotate_key(weights.address, files.key, files.job) == new.key_id
    assert SigningKey.load(files.key).key_id == new.key_id
    assert await rotate_key(weights.address, files.key, files.job) != new.key_id


async def test_only_the_newest_key_hands_over(weights, files: Files) -> None:
    old = weights.key
    await published(weights, old, 0)
    await rotate_key(weights.address, files.key, files.job)
    with pytest.raises(Conflict, match="not the newest"):
        await weights.client().rotate_key(old, SigningKey.generate())


async def test_a_job_that_was_never_started_has_no_key(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="not been started"):
        await rotate_key("127.0.0.1:9", tmp_path / "learner.key", tmp_path / "job.json")


def test_a_job_that_is_prepared_again_still_trusts_its_first_key(tmp_path: Path) -> None:
    job = Job(
        id="j-1",
        project="default",
        name="rotated",
        state=JobState.QUEUED,
        error="",
        created_at=0.0,
        updated_at=0.0,
        progress={},
        cursor="",
        revision=0,
        queued_at=0.0,
        generators=1,
        gpus=0,
        parent_job=None,
        parent_version=None,
        idempotency_key=None,
        spec=SPEC,
    )
    paths = job_paths(tmp_path / "runs", tmp_path / "state", job.id)
    first = prepare(job, paths).learner_public_key
    assert first == SigningKey.load(paths.signing_key_file).public_key.hex()
    paths.signing_key_file.unlink()
    rotated = SigningKey.create(paths.signing_key_file).public_key.hex()
    assert prepare(job, paths).learner_public_key == first != rotated
