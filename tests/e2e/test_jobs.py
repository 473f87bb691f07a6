"""Whole jobs on the local stack, as a person runs them: the reward rises; things are killed and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import yaml

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
LONGSHORE = [sys.executable, "-m", "longshore"]
STEPS = 30
JOB_TIMEOUT_S = 280


def short_first_light(folder: Path, **train: object) -> Path:
    """The first-light job with fewer steps and a smaller evaluation."""
    document = yaml.safe_load((ROOT / "examples" / "first-light.yaml").read_text())
    document["train"].update({"steps": STEPS, "checkpoint_every": 10, **train})
    document["evaluation"]["tasks"] = 100
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def longshore(folder: Path, *args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LONGSHORE, *args], cwd=folder, capture_output=True, text=True, timeout=timeout)


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def processes(folder: Path) -> dict[str, int]:
    """Name -> pid of every live process that was started from this folder's stack."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
            working = (entry / "cwd").resolve()
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue
        if not alive or not working.is_relative_to(folder):
            continue
        names = [
            item.removeprefix(b"LONGSHORE_NAME=").decode()
            for item in environment
            if item.startswith(b"LONGSHORE_NAME=")
        ]
        if b"valkey-server" in command[0] or b"redis-server" in command[0]:
            names = ["broker"]
        if names:
            found[names[0]] = int(entry.name)
    return found


def check_equation(summary: dict[str, object]) -> None:
    assert summary["rollouts_issued"] == summary["rollouts_trained"] + sum(summary["rollouts_accounted"].values())


def test_first_light_learns_and_leaves_its_results(tmp_path):
    job = short_first_light(tmp_path)
    done = longshore(tmp_path, "run", str(job), timeout=JOB_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "succeeded"
    assert summary["job_id"] == run.name
    assert summary["reward_first"] <= 0.45
    assert summary["reward_last"] >= summary["reward_first"] + 0.2
    assert summary["eval_after"] >= summary["eval_before"] + 0.2
    assert summary["rollouts_accounted"]["evaluation"] == 200
    check_equation(summary)
    # Law 6 holds staleness near its target; a generator may take up a version late, by a version or two.
    assert 0 < summary["staleness_mean"] <= 4

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for name in ("reward/mean", "policy/entropy", "mismatch_kl/mean", "off_policy/mean", "time/step"):
        assert all(name in line for line in lines), name
    same = [line["mismatch_kl/same_version"] for line in lines if "mismatch_kl/same_version" in line]
    assert all(value < 1e-4 for value in same), "generator and learner disagree at equal version"
    assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")
    logs = {path.name for path in (run / "logs").iterdir()}
    assert {"learner.log", "generator-0.log", "verifier-0.log", "actor-0.log", "actor-1.log"} <= logs

    check_checkpoint(run / "checkpoint", summary["eval_before"])
    assert processes(tmp_path) == {}, "something was left running"


def check_checkpoint(folder: Path, before: float) -> None:
    """What transformers loads answers held-out words better than the policy did before training."""
    import reasoning_gym
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tasks = reasoning_gym.create_dataset("spell_backward", size=40, seed=12345, min_word_len=3, max_word_len=6)
    score = 0.0
    for task in tasks:
        messages = [{"role": "user", "content": task["question"]}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        reply = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        score += tasks.score_answer(answer=reply, entry=task)
    assert score / 40 > before + 0.2


@pytest.fixture
def stack(tmp_path):
    """`longshore up` in a folder of its own."""
    log = (tmp_path / "up.log").open("wb")
    process = subprocess.Popen([*LONGSHORE, "up"], cwd=tmp_path, stdout=log, stderr=log)
    deadline = time.monotonic() + 90
    while not (tmp_path / ".longshore" / "up.json").exists():
        assert process.poll() is None, (tmp_path / "up.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield tmp_path
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError("the stack did not stop") from None


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def until(condition, timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}"
        time.sleep(0.1)


def ask_as_an_agent(run: Path) -> int:
    """Has the policy go on with a text, by OpenAI's client and what lies in the run directory; the version that did."""
    url, key = ((run / name).read_text().strip() for name in ("openai-generator-0.url", "openai.key"))
    with openai.OpenAI(base_url=url, api_key=key, timeout=60) as agent:
        answer = agent.completions.create(model=run.name, prompt="tale", max_tokens=4)
    return answer.policy_version


def test_learner_actor_and_broker_are_killed_and_nothing_is_lost(stack):
    submitted = longshore(stack, "submit", str(short_first_light(stack)))
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()
    run = stack / "runs" / job_id
    for step, victim in ((4, "actor-0"), (12, "learner"), (20, "broker")):
        until(lambda step=step: steps_done(run) >= step, JOB_TIMEOUT_S, f"step {step}")
        os.kill(processes(stack)[victim], signal.SIGKILL)
        if victim == "actor-0":
            assert ask_as_an_agent(run) >= 1
            # And the job's versions are signed by another key from here on.
            rotated = longshore(stack, "rotate-key", job_id)
            assert rotated.returncode == 0, rotated.stderr
    until((run / "summary.json").exists, JOB_TIMEOUT_S, "the summary")
    watched = longshore(stack, "watch", job_id)
    assert watched.returncode == 0, watched.stdout + watched.stderr

    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "succeeded"
    assert summary["steps"] == STEPS
    check_equation(summary)
    # Exactly what was needed was issued, so nothing was lost and nothing was made up for.
    assert summary["rollouts_issued"] == STEPS * 128 + 200
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, STEPS + 1))
    records = [json.loads(line) for line in (run / "learner" / "batches.jsonl").read_text().splitlines()]
    last = {record["step"]: record for record in records}
    uses = [tuple(use) for record in last.values() for use in record["uses"]]
    assert len(uses) == len(set(uses)) == STEPS * 128, "a rollout was used twice, or never"
    assert summary["reward_last"] > summary["reward_first"]


def test_a_job_is_paused_forked_and_resumed(stack):
    """What a pause stops goes on where it was; a fork begins with the weights that its parent had published."""
    path = short_first_light(stack, steps=10, checkpoint_every=5)
    document = yaml.safe_load(path.read_text())
    document["warm_start"]["steps"], document["evaluation"]["tasks"] = 40, 0
    path.write_text(yaml.safe_dump(document))
    job_id = longshore(stack, "submit", str(path)).stdout.strip()
    run = stack / "runs" / job_id
    until(lambda: steps_done(run) >= 3, JOB_TIMEOUT_S, "step 3")
    paused = longshore(stack, "pause", job_id)
    assert paused.returncode == 0, paused.stderr
    until(lambda: state_of(stack, job_id) == "paused", 60, "the pause")
    at = steps_done(run)
    assert at < 10
    assert not {"learner", "actor-0", "generator-0"} & set(processes(stack))

    changes = stack / "changes.yaml"
    changes.write_text("name: forked\ntrain: {steps: 2, warmup_steps: 0}\n")
    forked = longshore(stack, "fork", job_id, "--version", "2", "--changes", str(changes))
    assert forked.returncode == 0, forked.stderr
    resumed = longshore(stack, "resume", job_id)
    assert resumed.returncode == 0, resumed.stderr
    for name, steps in ((forked.stdout.strip(), 2), (job_id, 10)):
        until(lambda name=name: state_of(stack, name) not in GOING, JOB_TIMEOUT_S, f"the end of {name}")
        summary = json.loads((stack / "runs" / name / "summary.json").read_text())
        assert (summary["state"], summary["steps"]) == ("succeeded", steps)
        check_equation(summary)
        lines = [
            json.loads(line)["step"] for line in (stack / "runs" / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert lines == list(range(1, steps + 1))
    # Nothing that was made before the pause was lost, nor made twice.
    records = [json.loads(line) for line in (run / "learner" / "batches.jsonl").read_text().splitlines()]
    last = {record["step"]: record for record in records}
    uses = [tuple(use) for record in last.values() for use in record["uses"]]
    assert len(uses) == len(set(uses)) == 10 * 128


GOING = ("queued", "starting", "running", "pausing", "paused")


def state_of(folder: Path, job_id: str) -> str:
    listed = longshore(folder, "jobs")
    assert listed.returncode == 0, listed.stderr
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith(job_id)]
    return line.split()[1]
