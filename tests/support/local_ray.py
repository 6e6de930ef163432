"""A Ray for tests: with a token of its own, and without the processes that no test asks anything."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import ray

from mmrl_ray.training import cluster
from tests.support.forks import forked_workers

STORE_BYTES = 100 * 2**20


def without_idlers(*, logs: bool = False) -> AbstractContextManager[None]:
    """A node that is started meanwhile has no dashboard and without `logs` no monitor of logs, as a run's own Ray."""
    return cluster._without_idlers(dashboard=False, logs=logs)


@contextmanager
def local_ray(cpus: int, *, gpus: int = 0, logs: bool = False, **environment: str) -> Iterator[str]:
    """Its address; this process has joined it, and has the environment of before when it has ended.

    `gpus` are only said to be there. With `logs` it brings what workers print to drivers that ask for it.
    """
    before = dict(os.environ)
    cluster.configure_ray()
    os.environ.update(environment, RAY_AUTH_TOKEN=secrets.token_hex(32))
    cluster.read_token_again()  # a module before may have had another
    try:
        with without_idlers(logs=logs), forked_workers():
            context = ray.init(
                "local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
                log_to_driver=False,
            )
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)
