"""What lies ready for a job's processes."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from longshore.gateway.prepare import job_paths, prepare
from longshore.rpc.key_file import KeyFile

SPEC = {
    "name": "j",
    "tasks": {"source": "jsonl"},
    "verifier": {"name": "exact-match"},
    "train": {"steps": 1},
}


def test_a_job_gets_a_key_for_agents_once(tmp_path: Path) -> None:
    job: Any = SimpleNamespace(id="j-1", project="default", spec=SPEC)
    paths = job_paths(tmp_path / "runs", tmp_path / "state", job.id)
    prepare(job, paths)
    key = paths.openai_key_file.read_text().strip()
    assert len(key) >= 40
    assert stat.S_IMODE(paths.openai_key_file.stat().st_mode) == 0o600
    assert KeyFile(paths.openai_keys_file, "x").name_of(key) == "local"
    assert key not in paths.openai_keys_file.read_text()
    # Started again, and others let in meanwhile.
    before = paths.openai_keys_file.read_text()
    paths.openai_keys_file.write_text(before + f"carol {'ab' * 32}\n")
    prepare(job, paths)
    assert paths.openai_key_file.read_text().strip() == key
    assert "carol" in paths.openai_keys_file.read_text()
