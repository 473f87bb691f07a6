"""Health of learning: numbers by hand, by bucket; and a step whose gradient is no number names its rollouts."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from builders import JOB, TASK, rollout
from loss_batches import loss_of, sequence
from prometheus_client import REGISTRY

from longshore.config import TrainSpec
from longshore.config_model import NewModel
from longshore.errors import ConfigError
from longshore.learner.credit.group import Baseline
from longshore.learner.groups import Group, LateMember
from longshore.learner.health import AGE_EDGES, TokenHealth, bucket_names, bucket_of
from longshore.learner.health_metrics import observe_line
from longshore.learner.loop import SPOILT_IN_A_ROW, LearnerLoop
from longshore.learner.model import _new_model, character_tokenizer
from longshore.learner.reporter import Reporter
from longshore.learner.sequences import Credit, sequences_of
from longshore.learner.statistics import batch_metrics
from longshore.learner.trainer import Trainer
from longshore.types import Purpose


def test_buckets_by_hand():
    assert bucket_names((0, 1, 4)) == ["0", "1-3", "4+"]
    assert [bucket_of(value, (0, 1, 4)) for value in (-1, 0, 1, 3, 4, 99)] == [0, 0, 1, 1, 2, 2]


def test_tokens_by_age_and_what_was_replayed_apart():
    health = TokenHealth()
    log = torch.tensor([2.0, 0.5, 1.0]).log()
    health.add(log, torch.tensor([0, 300, 20]), torch.tensor([False, True, False]), None)
    # The second pass: of the same age as the third token above, one of the two replayed.
    health.add(
        torch.tensor([3.0, 1.0]).log(),
        torch.tensor([63, 2]),
        torch.tensor([True, False]),
        torch.tensor([True, False]),
    )
    found = health.metrics()
    assert {key: value for key, value in found.items() if key.endswith("tokens")} == {
        "age/0/tokens": 1,
        "age/1-3/tokens": 1,
        "age/16-63/tokens": 2,
        "age/256+/tokens": 1,
        "replay/tokens": 1,
    }
    assert found["age/16-63/is_ratio"] == pytest.approx(2.0)
    assert found["age/16-63/ess"] == pytest.approx(16 / (2 * 10))
    assert found["age/16-63/kept_frac"] == 0.5
    assert (found["replay/is_ratio"], found["replay/kept_frac"]) == (pytest.approx(3.0), 0.0)
    assert found["age/256+/kept_frac"] == 0.0
    assert TokenHealth().metrics() == {}


def test_ratios_of_any_size_give_numbers():
    health = TokenHealth()
    health.add(torch.tensor([500.0, -500.0]), torch.tensor([0, 0]), torch.zeros(2, dtype=torch.bool), None)
    assert all(math.isfinite(value) for value in health.metrics().values())


@pytest.mark.parametrize("parts", [[[0, 1, 2]], [[2], [0], [1]]])
def test_a_batch_tells_carried_kv_and_replayed_sequences_apart(parts):
    batch = [
        sequence(0, 1.0, [-1.0], version=7),
        sequence(1, 1.0, [-1.0], version=7, carried=True),
        sequence(2, -1.0, [-1.0], version=5, carried=True, use=3),
    ]
    _, _, loss = loss_of(TrainSpec(steps=1), batch, [[-0.9], [-0.5], [-0.8]], parts)
    found = loss.metrics()
    k3 = [math.exp(d) - 1 - d for d in (0.1, 0.5, 0.2)]
    assert found["mismatch_kl/same_version"] == pytest.approx(k3[0], rel=1e-3)
    assert found["mismatch_kl/same_version_carried"] == pytest.approx(k3[1], rel=1e-3)
    assert found["replay/tokens"] == 1
    assert found["replay/is_ratio"] == pytest.approx(math.exp(0.2), rel=1e-5)
    assert (found["age/0/tokens"], found["age/1-3/tokens"]) == (2, 1)


def test_what_is_masked_because_it_became_likelier_is_told_apart():
    batch = [sequence(0, 1.0, [-1.0, -1.0]), sequence(1, -1.0, [-1.0, -1.0])]
    spec = TrainSpec(steps=1, objective="clip")
    _, _, loss = loss_of(spec, batch, [[-0.2, -1.0], [-3.0, -0.2]], [[0, 1]])
    found = loss.metrics()
    # The first became likelier and was rewarded; the third unlikelier and was punished.
    assert (found["policy/masked_frac"], found["policy/masked_high_frac"]) == (0.5, 0.25)


def test_a_batch_by_staleness_by_length_and_by_site():
    def group(group_id, rewards, version, sites):
        made = Group(group_id, Purpose.TRAIN, TASK, len(rewards))
        for index, reward in enumerate(rewards):
            made.rollouts[index] = rollout(group_id, index, reward, version=version)
            made.sites[index] = sites[index]
        return made

    long = rollout(9, 0, 0.5, version=1, reply=tuple([7] * 19 + [1]), logprobs=tuple([-0.5] * 20))
    groups = [group(0, (1.0, 0.0), 20, ("home", "west")), group(1, (1.0, 1.0), 18, ("west", "west"))]
    found = batch_metrics(groups, [LateMember(9, 0, long, Baseline((1.0,)), "east")], 20)
    by = {key: value for key, value in found.items() if "/by_" in key or "_by_" in key}
    assert by == {
        "reward/by_staleness/0": 0.5,
        "reward/by_staleness/1-3": 1.0,
        "reward/by_staleness/16-63": 0.5,
        "reward/by_length/0-15": 0.75,
        "reward/by_length/16-63": 0.5,
        "off_policy/mean_by_site/east": 19.0,
        "off_policy/max_by_site/east": 19.0,
        "off_policy/mean_by_site/home": 0.0,
        "off_policy/max_by_site/home": 0.0,
        "off_policy/mean_by_site/west": pytest.approx(4 / 3),
        "off_policy/max_by_site/west": 2.0,
    }


def test_a_line_is_shown_to_prometheus_and_an_empty_bucket_is_not():
    labels = {"project": "p", "job": "health"}

    def shown(name, **more):
        return REGISTRY.get_sample_value(f"longshore_learner_{name}", labels | more)

    observe_line(("p", "health"), {"policy/entropy": 1.5, "age/0/ess": 0.5, "off_policy/mean_by_site/west": 3.0})
    assert (shown("entropy_nats"), shown("age_ess_share", age="0")) == (1.5, 0.5)
    assert shown("site_staleness_versions", site="west") == 3.0
    observe_line(("p", "health"), {"policy/entropy": 1.0, "reward/by_length/0-15": 0.25})
    assert (shown("entropy_nats"), shown("age_ess_share", age="0")) == (1.0, None)
    assert shown("reward_by_length", tokens="0-15") == 0.25


def test_every_bucket_of_a_line_has_its_gauge():
    health = TokenHealth()
    health.add(torch.zeros(1), torch.tensor([AGE_EDGES[-1]]), torch.tensor([False]), None)
    observe_line(("p", "buckets"), health.metrics())
    labels = {"project": "p", "job": "buckets", "age": "256+"}
    for name in ("age_tokens", "age_importance_weight", "age_ess_share", "age_kept_share"):
        assert REGISTRY.get_sample_value(f"longshore_learner_{name}", labels) == 1.0


# -- what is no number ---------------------------------------------------------------------------------------------


def spoilt_step():
    """A policy that a certain token sends astray, and a batch in which the second rollout has it."""
    torch.set_num_threads(1)
    model = NewModel(
        hidden_size=16, layers=1, heads=2, kv_heads=2, intermediate_size=16, max_context=32, tie_embeddings=False
    )
    trainer = Trainer(_new_model(model, character_tokenizer([TASK]), 0), TrainSpec(steps=10))
    with torch.no_grad():
        trainer.policy.get_input_embeddings().weight[9] = torch.nan
    made = []
    for position, prompt in enumerate([(5, 6), (9, 6), (6, 5)]):
        item = rollout(4, position, prompt=prompt)
        made += sequences_of(item, Credit([1.0, -1.0]), position)
    return trainer, made


def test_a_step_whose_gradient_is_no_number_changes_nothing_and_knows_whose_it_was():
    trainer, batch = spoilt_step()
    before = [parameter.clone() for parameter in trainer.policy.parameters()]
    told = trainer.step(1, batch, 0)
    assert told["optim/skipped"] == 1.0
    assert trainer.not_finite == [1]
    assert all(
        torch.equal(
            a,
            b,
        )
        or a.isnan().any()
        for a, b in zip(before, trainer.policy.parameters(), strict=True)
    )
    # A line of JSON that everybody can read.
    json.dumps(told, allow_nan=False)
    assert trainer.step(2, [batch[0]], 0)["optim/skipped"] == 0.0
    assert trainer.not_finite == []


async def test_the_rollouts_are_named_and_a_job_that_only_spoils_is_given_up(tmp_path):
    (tmp_path / "learner").mkdir()
    events = []

    async def publish(event):
        events.append(event)

    reporter = Reporter(JOB, SimpleNamespace(train=SimpleNamespace(steps=9)), tmp_path, publish)
    trainer = SimpleNamespace(not_finite=[1])
    loop = SimpleNamespace(parts=SimpleNamespace(trainer=trainer), reporter=reporter, _spoilt_in_a_row=0)
    credited = SimpleNamespace(rollout_ids=["4.0", "4.1", "5.0"])
    spoilt, fine = {"optim/skipped": 1.0}, {"optim/skipped": 0.0}
    assert await LearnerLoop._is_spoilt(loop, 3, spoilt, credited)
    assert not await LearnerLoop._is_spoilt(loop, 4, fine, credited)
    trainer.not_finite = []
    assert await LearnerLoop._is_spoilt(loop, 5, spoilt, credited)
    lines = [json.loads(line) for line in (tmp_path / "learner" / "not_finite.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 3, "rollouts": ["4.1"], "in_logprobs": True},
        {"step": 5, "rollouts": ["4.0", "4.1", "5.0"], "in_logprobs": False},
    ]
    assert "log-probs of rollouts 4.1" in events[0]["message"]
    assert "gradient of a batch with rollouts 4.0, 4.1, 5.0" in events[1]["message"]
    for number in range(SPOILT_IN_A_ROW - 2):
        assert await LearnerLoop._is_spoilt(loop, 6 + number, spoilt, credited)
    with pytest.raises(ConfigError, match="lower train"):
        await LearnerLoop._is_spoilt(loop, 20, spoilt, credited)
