"""A Ray of several nodes on this machine.

head      learners, the controller, Serve, the driver        labelled part=head
nodes     a rollout worker each, one CPU                     labelled part=rollouts
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmrl_ray.training.cluster import configure_ray, read_token_again
from tests.support.faults.inside import VARIABLE
from tests.support.forks import forked_workers
from tests.support.local_ray import without_idlers

ROOT = Path(__file__).parents[3]
STORE_BYTES = 80 * 2**20
"""A small object store: filling it is one of the faults."""
HEAD, ROLLOUTS = {"part": "head"}, {"part": "rollouts"}


class Machines:
    """The cluster. Its token and where faults are told are in the environment while it is up."""

    def __init__(self, folder: Path, nodes: int, *, forked: bool) -> None:
        self.forked = forked
        self.faults = folder / "faults"
        self.faults.mkdir(parents=True)
        configure_ray()
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1",
            VARIABLE: str(self.faults),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        os.environ.update(self.environment)
        read_token_again()
        with self._forking():
            self.cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 2, "labels": HEAD, "object_store_memory": STORE_BYTES, "include_dashboard": False,
                },
            )  # fmt: skip
        self.address: str = self.cluster.address
        # Left there, it would draw in whoever starts a Ray of their own on this machine.
        Path(get_ray_address_file(None)).unlink(missing_ok=True)
        self.nodes = [self.add_node() for _ in range(nodes)]
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR", namespace="faults")

    def add_node(self) -> Any:
        """A node that takes one rollout worker."""
        with self._forking():
            return self.cluster.add_node(num_cpus=1, labels=ROLLOUTS, object_store_memory=STORE_BYTES)

    @contextlib.contextmanager
    def _forking(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.forked:
                stack.enter_context(without_idlers())
                stack.enter_context(forked_workers())
            yield

    @property
    def up(self) -> list[Any]:
        """The nodes, head first; Ray itself finds only after a while that one is gone."""
        return [self.cluster.head_node, *self.nodes]

    def processes(self, pattern: str) -> list[int]:
        """Pids of this cluster's processes whose titles begin with a pattern."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if re.match(pattern, " ".join(process.cmdline())):
                    found.append(process.pid)
        return found

    def close(self) -> None:
        """Ends every node."""
        ray.shutdown()
        self.cluster.shutdown()


@contextlib.contextmanager
def machines(folder: Path, nodes: int = 2, *, forked: bool = False) -> Iterator[Machines]:
    """A cluster for as long as the block lasts; the environment is then as it was.

    Its workers, and a run's drivers, are `forked`, or as users have them, which is what takes a run its time.
    """
    before = dict(os.environ)
    up = Machines(folder, nodes, forked=forked)
    try:
        yield up
    finally:
        up.close()
        os.environ.clear()
        os.environ.update(before)
        read_token_again()


@contextlib.contextmanager
def full_store(machines: Machines) -> Iterator[None]:
    """No node has room in its object store: what is in there is in use, so that it cannot be spilled either."""
    there = [NodeAffinitySchedulingStrategy(node.node_id, False) for node in machines.up]
    hogs: Any = [ray.remote(_Hog).options(num_cpus=0, scheduling_strategy=place).remote() for place in there]
    try:
        for held in ray.get([hog.fill.remote(STORE_BYTES) for hog in hogs], timeout=60):
            assert held >= STORE_BYTES, f"only {held} bytes are held"
        yield
    finally:
        for hog in hogs:
            ray.kill(hog)


class _Hog:
    def fill(self, nbytes: int) -> int:
        """Puts objects of altogether more than `nbytes` and keeps a view of each."""
        one = 8 * 2**20
        self.held = [ray.get(ray.put(np.zeros(one, np.uint8))) for _ in range(nbytes // one + 1)]
        return sum(array.nbytes for array in self.held)
