"""What uses a policy on an accelerator, without one: equal to the CPU, nothing mixed, the host waits where it has to.

The tests are those of `on_device.py`. The device has to be known to PyTorch before anything else of the process, and
changes how modules move for the rest of it: they run in a process of their own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TESTS = Path(__file__).with_name("on_device.py")


def test_whatever_uses_a_policy_does_so_on_a_device(tmp_path: Path) -> None:
    alone = ["-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(tmp_path / "inside")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(TESTS), *alone], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
