"""Where a run is, as it is told: at least every ten seconds, with the time that is left."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from rich.console import Console

from mmrl_ray.telemetry.terminal import SILENT_S, RunProgress


class Clock:
    """Seconds that pass when they are told to, with a look of the ticker's after each half."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines = io.StringIO()
        self.shown = RunProgress(Console(file=self.lines, width=120), clock=lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            self.shown.tick()

    def told(self) -> list[tuple[float, str]]:
        found = [re.fullmatch(r"\[ *([0-9.]+)s\] (.*)", line) for line in self.lines.getvalue().splitlines()]
        return [(float(match[1]), match[2]) for match in found if match is not None]


def test_long_steps_are_told_of_within_them_with_the_time_left() -> None:
    """Ten steps of 45 s."""
    clock = Clock()
    update = clock.shown.phase("warm start")
    clock.pass_by(45)
    for step in range(1, 11):
        update(step, 10, {"loss": 2.0})
        clock.pass_by(45)
    told = clock.told()
    times = [when for when, _ in told] + [450.0]
    assert max(later - sooner for sooner, later in pairwise(times)) <= SILENT_S
    # 3 of 10 are done after 135 s; ten seconds later the other seven take 315 - 10 s.
    line = next(line for when, line in told if 140 < when < 150)
    assert line.startswith("warm start 3/10  5 min left  loss 2")
    assert line.endswith("s in this step")
    assert "left" not in told[-1][1]
    assert all(when <= 450 for when, _ in told), "what is over is not told of any more"


def test_what_was_resumed_counts_from_there() -> None:
    clock = Clock()
    update = clock.shown.phase("warm start")
    clock.pass_by(1)
    update(50, 100, {})
    clock.pass_by(60)
    update(60, 100, {})
    clock.pass_by(10)
    assert clock.told()[-1][1].startswith("warm start 60/100  4 min left")


def test_what_begins_with_its_first_step_has_no_pace_before_its_second() -> None:
    clock = Clock()
    update = clock.shown.phase("warm start", lazily=True)
    update(1, 80, {})
    assert clock.told()[-1][1].rstrip() == "warm start 1/80"
    clock.pass_by(6)
    update(3, 80, {})
    assert clock.told()[-1][1].startswith("warm start 3/80  4 min left")


@pytest.mark.parametrize("within", [False, True])
def test_loading_says_what_it_does(within: bool) -> None:
    clock = Clock()
    with clock.shown.busy("loading the model"):
        if within:
            clock.shown.phase("caption")(1, 2, {})
        clock.pass_by(21)
    clock.pass_by(30)
    lines = [line for _, line in clock.told()]
    if within:
        assert lines[-1].startswith("caption 1/2")
    else:
        assert lines == ["loading the model: 10 s so far", "loading the model: 19 s so far"]


def test_bars_of_phases_that_are_over_stand_still() -> None:
    clock = Clock()
    console = Console(file=clock.lines, force_terminal=True, width=120)
    with RunProgress(console) as shown:
        assert shown._bars is not None
        first = shown.phase("warm start")
        first(1, 2, {})
        shown.phase("learning")(39, 40, {})
        states = {task.description: task.stop_time for task in shown._bars.tasks}
        with shown.busy("starting Ray"):
            shown.phase("evaluate")(1, 2, {})
        over = {task.description: task.stop_time for task in shown._bars.tasks}
    assert states["warm start"] is not None
    assert states["learning"] is None
    assert all(over[name] is not None for name in ("warm start", "evaluate"))
    assert "starting Ray" not in over


def test_what_comes_before_and_after_a_phase_is_told_of_too() -> None:
    """A model is loaded, trained and saved: only the training has steps."""
    clock = Clock()
    with clock.shown.busy("warm start"):
        update = clock.shown.phase("training", lazily=True)
        clock.pass_by(11)
        update(1, 2, {})
        update(2, 2, {})
        clock.pass_by(11)
        clock.shown.phase("looking at captions")
        clock.pass_by(11)
    clock.pass_by(11)
    lines = [line for _, line in clock.told()]
    assert lines[0] == "warm start: 10 s so far"
    assert lines[1:4] == ["training", "training 1/2", "training 2/2"]
    assert lines[4].startswith("warm start: ")
    assert lines[5] == "looking at captions"
    assert lines[6].startswith("looking at captions: ")
    assert len(lines) == 7, "what is over is not told of any more"


def test_work_of_unknown_length_counts_what_is_done() -> None:
    clock = Clock()
    update = clock.shown.phase("import")
    for done in range(1, 31):
        clock.pass_by(1)
        update(done, 0, {})
    assert re.fullmatch(r"import: (\d+) done, \1 s so far", clock.told()[-1][1])
