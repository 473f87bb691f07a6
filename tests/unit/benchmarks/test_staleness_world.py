"""The worlds of the staleness benchmark do what the learner does: its Trainer, given the same rollouts, comes to the
same weights."""

from dataclasses import replace

import pytest
import torch

from benchmarks.staleness_game import GAMES
from benchmarks.staleness_policy import Policies, flat, new_policy
from benchmarks.staleness_reuse import rollouts_of
from benchmarks.staleness_world import Course, Job, Setting, World
from longshore.config import TrainSpec
from longshore.config_curriculum import CurriculumSpec
from longshore.learner.credit.batch import Again, credit_batch
from longshore.learner.trainer import Trainer

PAIR, SORT, SUMS = GAMES
TOLD = ("mismatch_kl/mean", "is_ratio/ess", "policy/masked_frac", "policy/entropy")


def spec(**own):
    common = {"steps": 8, "groups_per_step": 2, "group_size": 4, "learning_rate": 3e-2, "warmup_steps": 3}
    return TrainSpec.model_validate({**common, "weight_decay": 0.01, **own})


SPECS = [
    *(spec(objective=name) for name in ("grpo", "vespo", "oapl", "a-3po")),
    spec(objective="reinforce", ess_step={}, optimal_baseline="group"),
    spec(objective={"name": "m2po", "threshold": 1e-4}, optimal_baseline="batch"),
    spec(objective="topr", replay={"share": 0.5, "max_age": 8, "half_life": 4}),
]


def test_policies_are_those_of_transformers():
    policies = [new_policy(5, 7, seed) for seed in (3, 4)]
    ids = torch.randint(5, (2, 9, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for policy in policies:
            for parameter in policy.parameters():
                parameter.mul_(3.0).add_(0.1 * torch.randn_like(parameter))
        found = Policies(policies[0]).log_probs(torch.stack([flat(policy) for policy in policies]), ids, 3)
        for own, policy, rows in zip(found, policies, ids, strict=True):
            torch.testing.assert_close(own, policy(input_ids=rows).logits.log_softmax(-1)[:, -3:], atol=1e-5, rtol=0)


def test_every_run_goes_the_way_of_the_learners_trainer(tmp_path):
    jobs = tuple(Job(train, (3,)) for train in SPECS)
    world = World(Setting(PAIR, jobs, (0,)), tmp_path)
    trainers = [Trainer(new_policy(PAIR.symbols + 1, 2 * PAIR.length + 1, 0), train, PAIR.length) for train in SPECS]
    again = 0
    for number in range(1, 9):
        drawn = world.draw(number)
        told = world.step(number, drawn)
        for run, trainer in enumerate(trainers):
            count = drawn.rewards.shape[1] // 4
            groups = [drawn.group(run, place, 4) for place in range(count)]
            made = [rollouts_of(group, place, (PAIR.symbols,)) for place, group in enumerate(groups)]
            old = [Again(made[place], 2, groups[place].weight) for place in range(2, count) if groups[place].weight]
            again += len(old)
            credited = credit_batch(made[:2], [], trainer.spec, old)
            metrics = trainer.step(number, credited.sequences, number - 1)
            if credited.sequences and number == 7:
                assert told[run].tolist() == pytest.approx([metrics[name] for name in TOLD], abs=2e-3)
    for run, trainer in enumerate(trainers):
        torch.testing.assert_close(world.weights[run], flat(trainer.policy), atol=1e-3, rtol=0)
    assert again > 4
    # They went somewhere, and each its own way.
    assert float((world.weights[0] - flat(new_policy(5, 5, 0))).abs().max()) > 0.1


@pytest.mark.parametrize(("staleness", "versions"), [(0, [0, 1, 2, 3, 4, 5]), (3, [0, 0, 0, 0, 1, 2])])
def test_every_rollout_is_as_old_as_was_asked_for(staleness, versions):
    # Beside runs of another staleness, whose versions are kept for longer.
    world = World(Setting(PAIR, (Job(spec(), (5, staleness)),), (0,)))
    seen, kl = [], []
    for number in range(1, 7):
        drawn = world.draw(number)
        seen.append(drawn.versions[1].unique().tolist())
        told = float(world.step(number, drawn)[1, 0])
        kl += [told] if told == told else []
    assert seen == [[version] for version in versions]
    # Its log-probs are those of the weights of its version: equal ones on-policy, and there only.
    assert (abs(kl[-1]) < 1e-6) == (staleness == 0)


def test_games_have_the_answers_that_they_say():
    prompts = torch.tensor([[2, 0, 3]])
    assert PAIR.answers(prompts).tolist() == [[3, 0, 2]]
    assert SORT.answers(prompts).tolist() == [[0, 2, 3]]
    assert SUMS.answers(prompts).tolist() == [[2, 2, 1]]
    assert SORT.rewards(prompts, torch.tensor([[0, 2, 2]])).tolist() == [0.0]
    assert SORT.rewards(prompts, torch.tensor([[0, 2, 3]])).tolist() == [1.0]
    assert SUMS.rewards(prompts, torch.tensor([[2, 0, 1]])).tolist() == pytest.approx([1 / 3])
    assert SUMS.rewards(prompts, torch.tensor([[2, 2, 1]])).tolist() == [1.0]


def test_a_look_is_the_mean_of_what_would_be_drawn():
    world = World(Setting(PAIR, (Job(spec(groups_per_step=512), (0,)),), (0,)))
    with torch.no_grad():
        world.weights *= 4.0
    drawn = world.draw(1).rewards
    assert world.look()[0] == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 16)
    assert float(drawn.std()) > 0.1


def test_a_policy_learns_in_it():
    train = spec(steps=96, groups_per_step=4, group_size=8, learning_rate=1e-2, objective="clip", weight_decay=0.0)
    (course,) = World(Setting(PAIR, (Job(train, (0,)),), (0,))).run()
    assert course.steps == list(range(16, 97, 16))
    assert course.final(window=1) > course.rewards[0] + 0.2


def test_a_curriculum_passes_solved_tasks_over(tmp_path):
    job = Job(spec(groups_per_step=64), (0,), CurriculumSpec())
    world = World(Setting(PAIR, (job,), (0,)), tmp_path)
    first = world.draw(1)
    solved = first.prompts[0, 0]
    rewards = (first.prompts[0] == solved).all(-1).double()[None] / 2 + 0.5
    world.step(1, replace(first, rewards=rewards))
    prompts = world.draw(2).prompts[0, ::4]
    # 1 of 16 prompts: among 64 it is there 4 times, and with a tenth of a chance hardly ever.
    assert int((prompts == solved).all(-1).sum()) <= 2


def test_the_target_is_reached_by_the_mean_of_several_looks():
    course = Course(steps=[8, 16, 24, 32], rewards=[0.0, 1.0, 0.8, 0.9])
    assert course.steps_to(0.9, window=2) == 24
    assert course.steps_to(0.9, window=3) == 32
    assert course.steps_to(0.95, window=2) is None
    assert course.final(window=2) == pytest.approx(0.85)
