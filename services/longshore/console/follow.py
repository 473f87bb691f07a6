"""Shows a job from its first event to its end."""

from __future__ import annotations

from pathlib import Path

from longshore.client import ApiClient
from longshore.console.progress import JobProgress
from longshore.console.screen import Screen
from longshore.console.summary import shown, summary_rows

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


async def follow_job(client: ApiClient, job_id: str, screen: Screen, job_file: str | None = None) -> int:
    """Returns the exit code: 0 when the job succeeded, 1 when it failed or was cancelled.

    Raises:
        NotFound, Unavailable: as `ApiClient.events`.
    """
    progress = JobProgress()
    try:
        async for event in client.events(job_id):
            for line in progress.apply(event):
                screen.line(line, "yellow" if "warning" in line or " died " in line else "")
            if not progress.state_is_final:
                screen.status(progress.status)
    finally:
        screen.close()
    job = await client.job(job_id)
    _say_end(screen, progress, job_id, Path(job["run_dir"]), job_file)
    return EXIT_OK if progress.state == "succeeded" else EXIT_FAILED


def _say_end(screen: Screen, progress: JobProgress, job_id: str, run_dir: Path, job_file: str | None) -> None:
    title = f"{job_id} {progress.state}"
    if progress.summary is not None and progress.state == "succeeded":
        screen.line("")
        screen.table(title, summary_rows(progress.summary, run_dir, job_file))
        return
    why = f": {progress.message}" if progress.message else ""
    screen.line(f"{title}{why}", "red" if progress.state == "failed" else "yellow")
    screen.line(f"what there is of it: {shown(run_dir)}")
