"""The health of learning for Prometheus: a step's line of metrics.jsonl, by name."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Gauge

from longshore.learner.metrics import LABELS


def _gauge(name: str, what: str, *labels: str) -> Gauge:
    return Gauge(f"longshore_learner_{name}", what, (*LABELS, *labels))


# Key of the line -> gauge.
_PLAIN = {
    "off_policy/max": _gauge("staleness_max_versions", "Largest staleness of the last batch, in versions"),
    "policy/entropy": _gauge("entropy_nats", "Mean entropy of the policy at sampled tokens of the last batch"),
    "policy/masked_frac": _gauge("masked_share", "Share of tokens whose gradient was clipped or masked away"),
    "policy/masked_high_frac": _gauge("masked_high_share", "Those among them that had become more probable"),
    "mismatch_kl/mean": _gauge("mismatch_kl_nats", "KL estimate between the engines and the policy, all tokens"),
    "mismatch_kl/same_version": _gauge(
        "mismatch_kl_same_version_nats", "The same over tokens of the policy's own version, KV caches computed anew"
    ),
    "mismatch_kl/same_version_carried": _gauge(
        "mismatch_kl_same_version_carried_nats", "The same over those drawn with a KV cache of older weights"
    ),
    "is_ratio/ess": _gauge("ess_share", "Effective share of the last batch's sequences"),
    "optim/grad_norm": _gauge("gradient_norm", "Norm of the last gradient before it was clipped"),
    "optim/lr": _gauge("learning_rate", "Rate of the last step"),
    "replay/ess": _gauge("replay_ess_share", "Effective share of the last batch's replayed tokens"),
    "replay/kept_frac": _gauge("replay_kept_share", "Share of replayed tokens whose gradient was kept"),
    "replay/groups": _gauge("replay_groups", "Replayed groups of the last batch"),
    "replay/kept_groups": _gauge("replay_buffer_groups", "Groups in the replay buffer"),
    "replay/kept_bytes": _gauge("replay_buffer_bytes", "Bytes of the replay buffer"),
    "replay/reach": _gauge("replay_reach", "How much of the replay that the job allows is in use, from 0 to 1"),
    "tasks/success": _gauge("task_success", "Mean estimated rate of success of the tasks that were attempted"),
}

# Keys are prefix/value, or age/value/name.
_BY_VALUE = {
    "off_policy/mean_by_site": _gauge("site_staleness_versions", "Mean staleness of a site's rollouts", "site"),
    "off_policy/max_by_site": _gauge("site_staleness_max_versions", "Largest staleness of a site's rollouts", "site"),
    "reward/by_staleness": _gauge("reward_by_staleness", "Mean reward by the rollout's staleness", "staleness"),
    "reward/by_length": _gauge("reward_by_length", "Mean reward by the rollout's sampled tokens", "tokens"),
}
_BY_AGE = {
    "tokens": _gauge("age_tokens", "Tokens of the last batch by their age in versions", "age"),
    "is_ratio": _gauge("age_importance_weight", "Their mean importance weight", "age"),
    "ess": _gauge("age_ess_share", "Their effective share", "age"),
    "kept_frac": _gauge("age_kept_share", "Share of them whose gradient was kept", "age"),
}


def observe_line(labels: tuple[str, str], line: Mapping[str, float]) -> None:
    """Sets the gauges to what a step's line says. A bucket that is not in it is not shown."""
    for gauge in (*_BY_VALUE.values(), *_BY_AGE.values()):
        # A learner has one job.
        gauge.clear()
    for key, value in line.items():
        prefix, _, last = key.rpartition("/")
        if key in _PLAIN:
            _PLAIN[key].labels(*labels).set(value)
        elif prefix in _BY_VALUE:
            _BY_VALUE[prefix].labels(*labels, last).set(value)
        elif prefix.startswith("age/") and last in _BY_AGE:
            _BY_AGE[last].labels(*labels, prefix.removeprefix("age/")).set(value)
