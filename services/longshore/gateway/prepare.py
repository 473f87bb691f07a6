"""What must lie ready before a job's processes start: its folder, its key, its job file."""

from __future__ import annotations

import secrets
from pathlib import Path

from longshore.config import JobSpec
from longshore.gateway.store import Job
from longshore.launcher.plan import JobPaths
from longshore.launcher.state_dir import write_private
from longshore.rpc.key_file import digest_line
from longshore.settings import JobFile
from longshore.signing import SigningKey


def job_paths(runs_dir: Path, state_dir: Path, job_id: str) -> JobPaths:
    """Where a job's files are."""
    return JobPaths(runs_dir / job_id, state_dir / "jobs" / job_id / "learner.key")


def prepare(job: Job, paths: JobPaths) -> JobFile:
    """Makes the folder, the learner's key, a key for agents and job.json, or finds them as an earlier call left them.

    Raises:
        OSError: the folder or job.json cannot be written.
        ConfigError: so with the key, or it is not ours alone.
    """
    paths.logs.mkdir(parents=True, exist_ok=True)
    paths.signing_key_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = _key(paths.signing_key_file)
    _make_openai_key(paths)
    file = JobFile(
        project=job.project,
        job=job.id,
        spec=JobSpec.model_validate(job.spec),
        # The first key stays the one that is trusted, also after rotations: who starts there believes those after it.
        learner_public_key=_first_key(paths.job_file) or key.public_key.hex(),
    )
    part = paths.job_file.with_suffix(".part")
    part.write_text(file.model_dump_json(indent=2) + "\n", encoding="utf-8")
    part.replace(paths.job_file)
    return file


def _make_openai_key(paths: JobPaths) -> None:
    """The key that the job's agents may use, once: whoever has it goes on using it when the job starts again."""
    if paths.openai_keys_file.exists():
        return
    key = secrets.token_urlsafe(32)
    write_private(paths.openai_key_file, key + "\n")
    write_private(paths.openai_keys_file, digest_line("local", key))


def _first_key(job_file: Path) -> str | None:
    """The key that an earlier call wrote; None when there was none, or its file cannot be read any more."""
    try:
        return JobFile.model_validate_json(job_file.read_text(encoding="utf-8")).learner_public_key
    except (FileNotFoundError, ValueError):
        return None


def _key(path: Path) -> SigningKey:
    return SigningKey.load(path) if path.exists() else SigningKey.create(path)
