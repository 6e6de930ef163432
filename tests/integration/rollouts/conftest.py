"""One Ray for each module, with a token of its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._raylet import AuthenticationTokenLoader, Config

from mmrl_ray.training.cluster import configure_ray

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        configure_ray()
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Metrics go to each node's agent every second, not every ten.
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        # Workers unpickle the fakes by their module's name.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        # Ray reads both when it is imported, which was long ago, and a module before may have had another token.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        ray.init("local", num_cpus=3, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
