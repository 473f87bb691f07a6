"""Makes and scores one problem of every data set that a job may name: what slim.sh took out must not be missed.

Says nothing where reasoning-gym is not installed.
"""

import importlib.util
import sys

from longshore.tasks.reasoning_gym import usable_datasets


def broken() -> list[str]:
    """What fails, a line each."""
    import reasoning_gym

    found = []
    for name in usable_datasets():
        try:
            dataset = reasoning_gym.create_dataset(name, size=1, seed=1)
            entry = dataset[0]
            dataset.score_answer(entry["answer"], entry)
        except Exception as error:  # noqa: BLE001 - whatever a library lacks, it is to be named with the others
            found.append(f"{name}: {error!r}")
    return found


if __name__ == "__main__" and importlib.util.find_spec("reasoning_gym") is not None:
    faults = broken()
    sys.exit("\n".join(faults) if faults else None)
