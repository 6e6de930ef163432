"""One Ray for each module, with a token of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import local_ray as rays

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    # Workers unpickle the fakes by their module's name.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Metrics go to each node's agent every second, not every ten.
    with rays.local_ray(cpus=3, RAY_metrics_report_interval_ms="1000", PYTHONPATH=path):
        yield
