"""Peak memory over a run's processes, against processes that really hold what they say."""

from __future__ import annotations

import subprocess
import sys
import time

from mmrl_ray.training.local_ray import PeakMemory, resident_bytes

MB = 2**20
CHILD = "import sys; held = b'x' * int(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()"


def hold(nbytes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(nbytes)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_childs_memory_counts_and_the_peak_outlives_it() -> None:
    # Libraries that other processes map, too, count by their share, which changes as those come and go: some 100 MB.
    alone, held, about = resident_bytes(), 800 * MB, 400 * MB
    with PeakMemory(interval_s=0.01) as memory:
        child = hold(held)
        try:
            deadline = time.monotonic() + 30
            while memory.peak_bytes < alone + about:
                assert time.monotonic() < deadline, f"{memory.peak_bytes - alone:,} bytes seen of {held:,}"
                time.sleep(0.01)
        finally:
            child.communicate("\n", timeout=30)
    assert resident_bytes() < alone + about
    assert memory.peak_bytes >= alone + about
