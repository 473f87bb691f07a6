"""The learner process: one alone, or the one that starts several, or one of those.

Heavy modules are imported late: a process that only waits for its ranks needs neither a model nor a broker.
"""

from __future__ import annotations

from longshore.learner.config import LearnerSettings
from longshore.learner.ranks.environment import rank, started_as_rank
from longshore.rpc.process import run_process


def main() -> int:
    """Entry point of `longshore serve learner`. Raises ConfigError for wrong settings."""
    settings = LearnerSettings.from_environment()
    processes = settings.load_job().spec.train.processes
    if processes > 1 and not started_as_rank():
        from longshore.learner.ranks.launch import launch

        return launch(processes)
    if processes > 1 and rank() > 0:
        from longshore.learner.ranks.follower import follow

        return follow(settings)
    from longshore.learner.incarnation import serve

    return run_process("learner", settings, serve)
