"""Files that take longest come first: two processes that share them (`make test`) then end at about the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What has real deadlines is begun with, beside the quickstart, which never takes more than two cores.
LONGEST = [
    "faults/test_faults.py",
    "test_quickstart.py",
    "training/test_train.py",
    "training/test_readme.py",
    "learner/test_group.py",
    "rollouts/test_rollouts_on_ray.py",
    "training/test_value_based.py",
    "serving/test_serve.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {HERE / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)) if HERE in item.path.parents else -1)
