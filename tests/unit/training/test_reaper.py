"""What a driver that is killed leaves behind, as real processes without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from mmrl_ray.training.reaper import reaped

_DRIVER = """
import os, subprocess, sys, time
from mmrl_ray.training.reaper import reaped
with reaped():
    if os.fork() == 0:  # it holds the driver's end of the pipe open
        time.sleep(600)
    below = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
    subprocess.run([sys.executable, "-c", below])
    print("begun", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    """A process of this test's own, which no reaper has to do with."""
    process = subprocess.Popen(["sleep", "600"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def test_what_a_killed_driver_has_started_is_killed_wherever_it_is(bystander: psutil.Process) -> None:
    """Also a grandchild in a session of its own, whose parent is long gone."""
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    orphan = psutil.Process(int(driver.stdout.readline()))
    assert driver.stdout.readline() == "begun\n"
    below = psutil.Process(driver.pid).children()
    forked, reaper = sorted(below, key=lambda child: "reaper.py" in str(child.cmdline()))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as a service manager does to all of a service
        reaper.send_signal(number)
    assert orphan.is_running()
    driver.kill()
    driver.wait()
    try:
        assert psutil.wait_procs([orphan, reaper], timeout=15)[1] == []
        assert bystander.is_running()
    finally:
        forked.kill()
        driver.stdout.close()


_DYING = """
import os, subprocess, time
from mmrl_ray.training.reaper import reaped
with reaped():
    print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
    os.closerange(3, 256)  # as the kernel does first with a process that ends
    time.sleep(1.5)
    os.kill(os.getpid(), 9)
"""


def test_a_driver_whose_files_are_closed_long_before_it_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", _DYING], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        child = psutil.Process(int(driver.stdout.readline()))
    assert psutil.wait_procs([child], timeout=15)[1] == []


_RETITLED = """
import os, subprocess, sys, time
from mmrl_ray.training.reaper import reaped
child = "import time, ray._raylet as ray; ray.setproctitle('ray::Other'); print(flush=True); time.sleep(600)"
with reaped():
    inherited = dict(sorted(os.environ.items(), key=lambda item: not item[0].startswith("MMRL_RAY_")))  # its mark first
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, env=inherited)
    process.stdout.readline()
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_a_process_that_gave_itself_another_title() -> None:
    """Which setproctitle writes over the arguments and, where nobody forbids it, over the environment behind them."""
    driver = subprocess.Popen([sys.executable, "-c", _RETITLED], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    child = psutil.Process(int(driver.stdout.readline()))
    assert child.name().startswith("ray::Other")
    driver.kill()
    driver.communicate()
    assert psutil.wait_procs([child], timeout=15)[1] == []


def orphan_and_child() -> tuple[psutil.Process, subprocess.Popen[bytes]]:
    begin = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)"
    orphan = int(subprocess.check_output([sys.executable, "-c", begin]))
    return psutil.Process(orphan), subprocess.Popen(["sleep", "600"])


def test_at_the_end_of_the_block_orphans_are_killed_and_the_driver_keeps_its_children() -> None:
    before = dict(os.environ)
    with reaped():
        orphan, child = orphan_and_child()
    with reaped():
        second, another = orphan_and_child()
        assert psutil.wait_procs([orphan], timeout=15)[1] == []
        assert second.is_running(), "each block has its own"
    assert psutil.wait_procs([second], timeout=15)[1] == []
    for each in (child, another):
        assert each.poll() is None
        each.kill()
        each.wait()
    assert dict(os.environ) == before
