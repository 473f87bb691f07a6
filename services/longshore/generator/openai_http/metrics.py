"""What the OpenAI-compatible interface counts."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from longshore.types import JobRef

_JOB = ("project", "job")

REQUESTS = Counter(
    "longshore_generator_openai_requests_total",
    "Requests by route and by what became of them: the status, or `gone` where the caller left first",
    (*_JOB, "route", "outcome"),
)
FIRST_TOKEN_SECONDS = Histogram(
    "longshore_generator_openai_first_token_seconds",
    "From a streamed request's head to the first token of its first reply",
    _JOB,
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
TOKENS = Counter("longshore_generator_openai_tokens_total", "Tokens by kind: prompt, completion", (*_JOB, "kind"))


class OpenAiMetrics:
    """The metrics of one job's generator."""

    def __init__(self, job: JobRef) -> None:
        self._labels = (job.project, job.job)
        self.first_token_seconds = FIRST_TOKEN_SECONDS.labels(*self._labels)
        self.prompt_tokens = TOKENS.labels(*self._labels, "prompt")
        self.completion_tokens = TOKENS.labels(*self._labels, "completion")

    def count(self, route: str, outcome: str) -> None:
        """One request has come to its end."""
        REQUESTS.labels(*self._labels, route, outcome).inc()
