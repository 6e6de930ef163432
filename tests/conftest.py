"""For every test, and the programs that tests start."""

import atexit
import os
from pathlib import Path

import pytest

from mmrl_ray.processes import leave

# No test depends on the hub, which would be asked again and again for half a minute where it cannot be reached. Read
# when the hub's library is imported, so it comes before any test's imports.
os.environ["HF_HUB_OFFLINE"] = "1"

HERE = Path(__file__).parent
# Files that take longest come first: two processes that share the files (`make test`) then end at about the same time.
LONGEST = [
    "unit/device/test_device.py",
    "unit/reward_model/test_fit.py",
    # What has real deadlines is begun with, beside the quickstart, which never takes more than two cores.
    "integration/faults/test_faults.py",
    "integration/test_quickstart.py",
    "integration/training/test_train.py",
    "integration/training/test_readme.py",
    "integration/training/test_notebook.py",
    "integration/jobs/test_jobs.py",
    "integration/learner/test_group.py",
    "integration/rollouts/test_rollouts_on_ray.py",
    "integration/training/test_value_based.py",
    "integration/serving/test_serve.py",
    "vllm/test_engine.py",
    "vllm/test_serve.py",
    "vllm/test_faults.py",
    "vllm/test_remote.py",
    "vllm/test_serving.py",
]

_SESSIONS: list[pytest.Session] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All unit tests, then all integration tests; of both the longest files first."""
    order = {HERE / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (HERE / "unit" not in item.path.parents, order.get(item.path, len(order))))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Keeps the session, whose exit code `_end` hands on."""
    _SESSIONS.append(session)


def _end() -> None:
    """As the `mmrl` program ends: native threads that Ray has left would crash, and tests that passed be a failure."""
    if _SESSIONS:
        leave(int(_SESSIONS[0].exitstatus))


atexit.register(_end)  # what is registered first is called last
