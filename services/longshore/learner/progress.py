"""What a job has done so far, apart from weights and ledger: the small part of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Progress:
    """Counters of one job; JSON-compatible through `state` and `restore`."""

    step: int = 0
    version: int = 0
    # Ordinal of the next training task in the source.
    cursor: int = 0
    # Id of the newest wish to attempt a dead letter again that was fulfilled; "": none.
    newest_wish: str = ""
    # Unix seconds of the first incarnation's start.
    started_at: float = 0.0
    # "before" and "after" -> mean reward on held-out tasks.
    evaluations: dict[str, float] = field(default_factory=dict)
    # Over the rollouts of all batches.
    staleness_sum: int = 0
    staleness_count: int = 0
    staleness_max: int = 0

    @property
    def staleness_mean(self) -> float | None:
        return self.staleness_sum / self.staleness_count if self.staleness_count else None

    def add_staleness(self, values: list[int]) -> None:
        self.staleness_sum += sum(values)
        self.staleness_count += len(values)
        self.staleness_max = max([self.staleness_max, *values])

    def state(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def restore(state: dict[str, object]) -> Progress:
        return Progress(**state)  # type: ignore[arg-type]
