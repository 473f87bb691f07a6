"""Key names: one hash tag a job, and no two things under one name."""

import re

import pytest

from longshore.rollout_queue.keys import JobKeys
from longshore.types import JobRef


def names(keys):
    own = (keys.tickets, keys.leased, keys.rollouts, keys.live, keys.counts, keys.epoch, keys.dead, keys.reconciled)
    return [*own, keys.events, keys.command, keys.ticket_prefix]


def test_all_keys_of_a_job_share_its_hash_tag():
    for name in names(JobKeys(JobRef("acme", "j1"), "away")):
        assert re.search(r"\{(.*?)\}", name)[1] == "acme/j1"


def test_jobs_and_names_do_not_collide():
    seen = [name for job in ("j1", "j1-2", "j") for name in names(JobKeys(JobRef("p", job)))]
    assert len(set(seen)) == len(seen)


def test_sites_share_nothing_but_what_is_the_jobs():
    home, away = JobKeys(JobRef("p", "j")), JobKeys(JobRef("p", "j"), "away")
    assert (home.events, home.command) == (away.events, away.command)
    assert set(names(home)) & set(names(away)) == {home.events, home.command}


def test_a_brace_in_a_name_is_refused():
    with pytest.raises(ValueError):
        _ = JobKeys(JobRef("p", "j}:x")).tickets
