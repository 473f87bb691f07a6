"""The learning part of a JobSpec: objectives and credit by name, and what is wrong with their numbers."""

from __future__ import annotations

import pytest

from longshore.config import Json, parse_job, parse_what_stands
from longshore.config_credit import AnyCredit
from longshore.config_objective import AnyObjective

GOOD: Json = {
    "name": "j",
    "tasks": {"source": "reasoning-gym", "dataset": "chain_sum"},
    "verifier": {"name": "reasoning-gym"},
}


def job(**train: object) -> Json:
    return GOOD | {"train": {"steps": 3, **train}}


@pytest.mark.parametrize("objective", AnyObjective.__args__, ids=lambda spec: spec.__name__)
def test_every_objective_is_chosen_by_its_name_alone(objective):
    name = objective.model_fields["name"].default
    short, long = parse_job(job(objective=name)), parse_job(job(objective={"name": name}))
    assert short == long
    assert type(short.train.objective) is objective
    assert short.train.credit == objective.credit
    assert parse_job(short.model_dump(mode="json")) == short


@pytest.mark.parametrize("credit", AnyCredit.__args__, ids=lambda spec: spec.__name__)
def test_every_credit_is_chosen_by_its_name_alone(credit):
    name = credit.model_fields["name"].default
    spec = parse_job(job(advantage=name))
    assert type(spec.train.credit) is credit
    assert parse_job(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(("staleness", "name"), [(0, "dppo"), (15, "dppo"), (16, "topr"), (256, "topr")])
def test_the_default_objective_goes_by_the_target_staleness(staleness, name):
    assert parse_job(job(target_staleness=staleness)).train.objective.name == name
    assert parse_job(job(target_staleness=staleness, objective="clip")).train.objective.name == "clip"


def test_an_impossible_staleness_is_the_only_fault():
    _, faults = parse_what_stands(job(target_staleness=-1))
    assert [fault.path for fault in faults] == ["train.target_staleness"]


def test_the_default_is_what_it_was():
    train = parse_job(job()).train
    assert train.objective.model_dump() == {
        "name": "dppo",
        "normalise": "tokens",
        "max_probability_gap": 0.2,
        "ratio_cap": 20.0,
        "quadratic": 1e-3,
    }
    assert train.credit.name == "group-mean"
    assert (train.kl, train.ess_step, train.optimal_baseline, train.overlong, train.replay) == (None,) * 5
    assert train.zero_variance == "skip"


FAULTS = [
    ({"replay": {"share": 1.0}}, "train.replay.share", "less than or equal to 0.9"),
    ({"replay": {"max_uses": 1}}, "train.replay.max_uses", "greater than or equal to 2"),
    ({"replay": {"priority": "size"}}, "train.replay.priority", "'uniform', 'recency', 'advantage' or 'difficulty'"),
    ({"replay": {"evict": "newest"}}, "train.replay.evict", "'oldest', 'most-used' or 'least-priority'"),
    ({"replay": {"age": 3}}, "train.replay.age", "unknown key; allowed here: admit, ess_floor"),
    ({"zero_variance": "drop"}, "train.zero_variance", "'skip' or 'resample'"),
    (
        {"zero_variance": "resample", "objective": "reinforce++"},
        "train.zero_variance",
        "has no place beside advantage batch-whitened",
    ),
    ({"objective": "nope"}, "train.objective.name", "must be one of dppo, reinforce, rloo, clip"),
    ({"objective": {"name": "clip", "clip_low": 1.5}}, "train.objective.clip_low", "less than or equal to 1"),
    ({"objective": {"name": "dppo", "clip_low": 0.1}}, "train.objective.clip_low", "unknown key; allowed here: max"),
    ({"objective": {"name": "dppo", "max_probability_gap": 0}}, "train.objective.max_probability_gap", "greater"),
    ({"objective": {"name": "grpo", "dual_clip": 1.0}}, "train.objective.dual_clip", "greater than 1"),
    ({"objective": {"name": "dapo", "two_sided": 1.2}}, "train.objective.two_sided", "exceed 1 + clip_high (1.28)"),
    ({"objective": {"name": "reinforce", "level": "word"}}, "train.objective.level", "'token' or 'sequence'"),
    ({"objective": {"name": "reinforce", "ratio_cap": 0.5}}, "train.objective.ratio_cap", "greater than or equal"),
    ({"objective": {"name": "gspo", "normalise": "words"}}, "train.objective.normalise", "'tokens', 'rollouts'"),
    ({"objective": {"name": "decoupled-ppo", "anchor_every": 0}}, "train.objective.anchor_every", "greater"),
    ({"objective": {"name": "m2po", "threshold": -1}}, "train.objective.threshold", "greater than 0"),
    ({"objective": {"name": "icepop", "low": 1.0}}, "train.objective.low", "less than 1"),
    ({"objective": {"name": "sequence-mask", "high": 0.9}}, "train.objective.high", "must exceed 1"),
    (
        {"objective": {"name": "sequence-mask", "statistic": "k3", "low": 0.5}},
        "train.objective.low",
        "has no meaning with statistic k3",
    ),
    ({"objective": {"name": "vespo", "k_negative": 0}}, "train.objective.k_negative", "greater than 0"),
    ({"objective": {"name": "oapl", "beta": float("nan")}}, "train.objective.beta", "finite number"),
    ({"objective": {"name": "kimi", "tau": True}}, "train.objective.tau", "must be a number"),
    ({"advantage": "mean"}, "train.advantage.name", "must be one of group-mean, group-mean-std, leave-one-out"),
    ({"advantage": {"name": "gae", "lam": 1.5}}, "train.advantage.lam", "less than or equal to 1"),
    ({"advantage": {"name": "gigpo", "gamma": -0.1}}, "train.advantage.gamma", "greater than or equal to 0"),
    ({"advantage": {"name": "soft-value", "temperature": 0}}, "train.advantage.temperature", "greater than 0"),
    ({"kl": {"estimator": "k1", "coefficient": 0.1}}, "train.kl.estimator", "pulls nowhere"),
    ({"kl": {"estimator": "k3"}}, "train.kl.coefficient", "is required"),
    ({"ess_step": {"base": 0}}, "train.ess_step.base", "greater than 0"),
    ({"optimal_baseline": "task"}, "train.optimal_baseline", "'group' or 'batch'"),
    ({"optimal_baseline": "group", "advantage": "gae"}, "train.optimal_baseline", "no place beside advantage gae"),
    ({"overlong": {"limit": 5, "buffer": 0}}, "train.overlong.buffer", "greater than or equal to 1"),
]


@pytest.mark.parametrize(("train", "path", "says"), FAULTS)
def test_a_bad_number_is_named_by_its_path(train, path, says):
    spec, faults = parse_what_stands(job(**train))
    assert spec is not None
    assert [fault.path for fault in faults] == [path]
    assert says in faults[0].message
