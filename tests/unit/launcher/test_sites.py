"""What a job may say of its sites."""

from __future__ import annotations

import pytest

from longshore.config import HOME_SITE, JobSpec, parse_job
from longshore.errors import InvalidJobSpec


def job(*sites: dict[str, object], **resources: int) -> JobSpec:
    return parse_job(
        {
            "name": "j",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "resources": resources,
            "sites": list(sites),
        }
    )


def faults(*sites: dict[str, object], **resources: int) -> list[str]:
    with pytest.raises(InvalidJobSpec) as caught:
        job(*sites, **resources)
    return [str(fault) for fault in caught.value.faults]


def test_a_site_has_what_it_says_and_the_rest_as_in_resources() -> None:
    spec = job({"name": "west", "actors": 3, "generator_slots": 16}, rollouts_per_actor=9, generator_slots=99)
    west = spec.resources_at("west")
    assert (west.actors, west.rollouts_per_actor, west.generator_slots) == (3, 9, 16)
    assert spec.resources_at(HOME_SITE) == spec.resources
    assert spec.resources.generator_slots == 99
    assert job({"name": "west"}).resources_at("west").actors == 1


@pytest.mark.parametrize(
    ("sites", "resources", "words"),
    [
        ([{"name": "west"}, {"name": "west"}], {}, "sites: a name is there twice (got 'west')"),
        ([{"name": "home"}], {}, "sites: this is the home site's name"),
        ([], {"actors": 0}, "resources.actors: 0 needs sites"),
        ([{"name": "West Coast"}], {}, "sites.0.name"),
        ([{"name": "west", "actors": 0}], {}, "sites.0.actors"),
        ([{"name": "west", "actor": 1}], {}, "allowed here: actors, allowance, generator_slots, generators, name"),
        ([{"actors": 1}], {}, "sites.0.name: is required"),
    ],
)
def test_what_is_wrong_with_sites_is_said(
    sites: list[dict[str, object]], resources: dict[str, int], words: str
) -> None:
    assert any(words in fault for fault in faults(*sites, **resources))


def test_a_job_may_leave_the_work_to_its_sites() -> None:
    assert job({"name": "west"}, actors=0).resources_at("home").actors == 0
