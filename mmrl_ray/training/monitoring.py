"""Peak memory of a run over its processes, and where Prometheus finds the metrics of its Ray."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import psutil
import ray

from mmrl_ray.run_records.run_dir import RunDir

_SHARE_OF_A_CORE = 0.02
"""What watching may cost."""
TARGETS = "prometheus.json"
"""In the form of Prometheus's file-based service discovery: `file_sd_configs: [{files: [runs/*/prometheus.json]}]`."""


def give_back_memory() -> None:
    """Hands what the allocator keeps of freed tensors back to the system, where it is glibc's; elsewhere nothing.

    Training in a process that lives on, such as the warm start in the driver, would count for the whole run.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """Samples the resident memory of this process and all its descendants on a thread.

    A local Ray's processes descend from the driver, so this covers them. Pages that processes share (the object store,
    libraries) count once where the kernel tells (PSS, Linux), else once a process (RSS). The kernel walks every page
    for that, on cores that learners and workers want: it is asked less often the longer it takes.
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self.peak_bytes = 0
        self._interval = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        while True:
            began = time.thread_time()
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
            spent = time.thread_time() - began
            if self._stop.wait(max(self._interval, spent / _SHARE_OF_A_CORE)):
                return


def resident_bytes() -> int:
    """Bytes resident now in this process and all its descendants."""
    me = psutil.Process()
    return sum(_process_bytes(process) for process in (me, *me.children(recursive=True)))


def _process_bytes(process: psutil.Process) -> int:
    try:
        try:
            info = process.memory_full_info()
            return int(getattr(info, "pss", info.rss))
        except psutil.AccessDenied:
            return int(process.memory_info().rss)
    except psutil.Error:  # it ended while we looked
        return 0


@contextmanager
def scrape_targets(run: RunDir) -> Iterator[None]:
    """Says where Prometheus finds the metrics of Ray's nodes, while the block lasts.

    Nodes that come later are in Ray's own list, which the head of a cluster keeps.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
    run.write_json(TARGETS, [{"targets": targets, "labels": {"job": "mmrl_ray"}}])
    try:
        yield
    finally:
        run.delete(TARGETS)
