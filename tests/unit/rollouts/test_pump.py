from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from mmrl_ray.errors import DataError, RolloutError
from mmrl_ray.rollouts.loop import Pump


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.001)


def test_calls_run_on_the_pump_thread_between_turns() -> None:
    threads: list[str] = []
    pump = Pump(lambda: pump.rest(60.0))
    pump.start()
    assert pump.call(lambda: threads.append(threading.current_thread().name) or 5, 10.0) == 5
    assert threads == ["pump"]

    def wrong() -> None:
        raise DataError("not this run's data")

    with pytest.raises(DataError, match="not this run"):
        pump.call(wrong, 10.0)
    assert pump.call(lambda: 6, 10.0) == 6
    pump.stop(10.0)


def test_what_a_turn_raises_reaches_everybody() -> None:
    broken = threading.Event()

    def turn() -> None:
        if broken.is_set():
            raise ValueError("boom")
        pump.rest(0.005)

    pump = Pump(turn)
    pump.start()
    pump.check()
    broken.set()
    until(lambda: pump.failure is not None)
    with pytest.raises(RolloutError, match="ValueError: boom"):
        pump.check()
    with pytest.raises(RolloutError, match="boom"):
        pump.call(lambda: 1, 10.0)
    pump.fail(DataError("later"))
    assert "boom" in str(pump.failure)


def test_a_command_that_waits_when_the_pump_dies_is_answered() -> None:
    entered, leave = threading.Event(), threading.Event()

    def turn() -> None:
        entered.set()
        leave.wait(10)
        raise DataError("the disk is gone")

    pump = Pump(turn)
    pump.start()
    entered.wait(10)
    threading.Timer(0.05, leave.set).start()
    with pytest.raises(DataError, match="disk"):
        pump.call(lambda: 1, 10.0)


def test_a_call_does_not_wait_for_ever() -> None:
    leave = threading.Event()
    pump = Pump(lambda: leave.wait(10) and None)
    pump.start()
    ran: list[int] = []
    with pytest.raises(RolloutError, match=r"within 0\.05 s"):
        pump.call(lambda: ran.append(1), 0.05)
    leave.set()
    pump.stop(10.0)
    assert ran == []


def test_a_wake_before_a_rest_is_not_lost() -> None:
    pump = Pump(lambda: None)
    pump.wake()
    began = threading.Event()
    done = threading.Event()

    def rest() -> None:
        began.set()
        pump.rest(60.0)
        done.set()

    threading.Thread(target=rest, daemon=True).start()
    assert done.wait(10)
