"""Signals that ask a run to stop, as real ones to a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mmrl_ray.errors import RolloutError
from mmrl_ray.training import interrupts

_PROGRAM = """
import contextlib, sys, threading, time
from mmrl_ray.training.interrupts import StopOnInterrupt
stop = threading.Event()
mode = sys.argv[1]
with (
    StopOnInterrupt(stop.set if mode != "at once" else None, awaited=lambda: "finishing step 12") as interrupt,
    interrupt.at_once() if mode == "evaluating" else contextlib.nullcontext(),
):
    try:
        print("ready", flush=True)
        while not stop.wait(0.05):
            pass
        print("finished the step", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("stopped at once", flush=True)
"""


_DROPPING = """
import signal, time
from mmrl_ray.training.interrupts import StopOnInterrupt
class Deleted:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
try:
    with StopOnInterrupt():
        for _ in (1, 2):
            try:
                Deleted()
                time.sleep(60)
            except KeyboardInterrupt:
                print("stopped")
                time.sleep(1.1)
finally:
    print("left")
"""


def _ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _blocked() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _heard() -> None:
    """Whatever the tests themselves were started with."""
    for number in interrupts.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def started(mode: str, prepare: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    def prepared() -> None:
        _heard()
        if prepare is not None:
            prepare()

    command = [sys.executable, "-c", _PROGRAM, mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepared)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("prepare", [None, _ignored, _blocked])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_heard_however_the_process_was_started(
    number: signal.Signals, prepare: Callable[[], None] | None
) -> None:
    process = started("at once", prepare)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert output == "stopped at once\n"
    assert process.returncode == 0


def test_signals_close_together_are_one_and_a_later_one_stops_at_once() -> None:
    """`timeout` sends its signal to the child and again to the group."""
    process = started("graceful")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert said(process) == "finished the step\n"
    while process.poll() is None:  # until a second is over
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=interrupts.SAME_S / 4)
        except subprocess.TimeoutExpired:
            continue
        assert output == "stopped at once\n"


def test_what_is_awaited_is_said_when_the_signal_comes() -> None:
    process = started("graceful")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == "stopping: finishing step 12; Ctrl-C again stops at once\n"
    assert said(process) == "finished the step\n"
    process.kill()
    process.communicate()


def test_nothing_is_awaited_of_work_that_is_not_kept() -> None:
    process = started("evaluating")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output == "stopped at once\n"


def test_a_signal_from_before_ends_what_is_not_kept() -> None:
    with interrupts.StopOnInterrupt(lambda: None) as interrupt:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupt.at_once():
            pytest.fail("it began all the same")


def test_one_that_a_library_drops_is_raised_before_the_next_piece_of_work() -> None:
    with interrupts.StopOnInterrupt() as interrupt:
        interrupt.check()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    with interrupts.StopOnInterrupt(lambda: None) as interrupt:
        signal.raise_signal(signal.SIGTERM)
        interrupt.check()  # that one was asked to let the work finish


def test_work_that_cannot_be_asked_to_stop_is_stopped_at_once() -> None:
    """A service manager signals every process: whom it would ask is gone."""

    def ask() -> None:
        raise RolloutError("the controller is gone")

    def work() -> None:
        with interrupts.StopOnInterrupt(ask):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        work()


def test_nohup_means_what_it_says() -> None:
    process = started("graceful", _nohup)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert said(process) == "finished the step\n"
    process.kill()
    process.communicate()


def test_one_that_comes_where_python_drops_exceptions_is_heard_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", _DROPPING], capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("stopped\nstopped\nleft\n", "", 0)
