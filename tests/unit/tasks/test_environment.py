"""What an environment's class declares about going on with its rollouts."""

from __future__ import annotations

import pytest
from guessing import Forgetful, Replayed, Restored

from longshore.tasks.environment import Restoring, SingleTurn, declaration_fault, restoring


class OnlySnapshot(Forgetful):
    def snapshot(self) -> bytes:
        return b""


class Wordy(Forgetful):
    deterministic = "yes"


class Both(Restored):
    deterministic = True


@pytest.mark.parametrize(
    ("kind", "declared", "fault"),
    [
        (SingleTurn, Restoring.NONE, None),
        (Forgetful, Restoring.NONE, None),
        (Replayed, Restoring.REPLAY, None),
        (Restored, Restoring.SNAPSHOT, None),
        (Both, Restoring.SNAPSHOT, None),
        (OnlySnapshot, Restoring.NONE, "has snapshot without restore"),
        (Wordy, Restoring.NONE, "`deterministic` must be True or False"),
    ],
)
def test_declarations(kind: type, declared: Restoring, fault: str | None) -> None:
    assert restoring(kind) is declared
    assert declaration_fault(kind) == fault
