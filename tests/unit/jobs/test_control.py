"""The client's half of scaling: against folders in which a run, or what is left of one, is played."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from rich.console import Console

from mmrl_ray.errors import ConfigError, RunError
from mmrl_ray.jobs.control import RunControl, render
from mmrl_ray.run_records.control_files import ScaleAnswer, pending_requests, put_answer, read_request, write_status
from mmrl_ray.run_records.run_dir import RunDir
from tests.unit.cli.program import mmrl


def worker(state: str, **more: Any) -> dict[str, Any]:
    pid = None if state in ("placing", "starting") else 77
    facts = {"state": state, "seconds": 12.4, "version": 3, "at": None, "groups": 5, "pid": pid, "node": pid and "n1"}
    return {**facts, **more}


def facts(target: int, requests: int, *states: str, free: dict[str, float] | None = None) -> dict[str, Any]:
    workers = {f"worker-{i}": worker(state) for i, state in enumerate(states)}
    if "busy" in states:
        workers[f"worker-{states.index('busy')}"]["at"] = "groups 0 to 7 of step 4"
    decision = {"time": 1e9, "before": 1, "workers": target, "reason": "me asked for it"}
    return {
        "step": 4,
        "steps": 60,
        "waiting": "the learner waits for step 4: 3 of 16 groups have arrived",
        "stopping": None,
        "error": None,
        "metrics": {"staleness/mean": 0.25, "staleness/max": 1},
        "throughput": {
            "steps": 4,
            "groups_per_second": 8.0,
            "samples_per_second": 64.0,
            "seconds": {"step": 2.0, "wait_plan": 1.5, "sample": 3.25},
        },
        "policy_version": 4,
        "max_staleness": 2,
        "step_groups": {"arrived": 3, "asked": 16},
        "buffer": {"arrived": 3, "held": 32, "capacity": 48},
        "evaluations": 0,
        "quarantined": 2,
        "pool": {
            "workers": workers,
            "ready": sum(s in ("ready", "busy", "retiring") for s in states),
            "target": target,
            "queued_assignments": 6,
            "demand": "{CPU: 1}",
            "free": free,
        },
        "scaling": {
            "mode": "fixed",
            "target": target,
            "min": 1,
            "max": None,
            "useful": 4,
            "requests": requests,
            "finding": "",
            "decisions": [decision],
        },
    }


class Played:
    """A run whose control files are looked after whenever the client sleeps."""

    def __init__(self, folder: Path, turns: list[Callable[[RunDir], None]], run: RunDir | None = None) -> None:
        self.run = run or RunDir.create(folder, "run")
        self.now = 1000.0
        self.turns = turns
        self.control = RunControl(self.run, clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.turns:
            self.turns.pop(0)(self.run)

    def says(self, state: str = "running", *, age: float = 0.0, **more: Any) -> None:
        write_status(self.run, state, 15.0, more)
        said = self.run.read_json("status.json")
        self.run.write_json("status.json", {**said, "time": self.now - age})


def accept(target: int, number: int = 1) -> Callable[[RunDir], None]:
    def turn(run: RunDir) -> None:
        (name,) = pending_requests(run)
        assert read_request(run, name).workers == target
        put_answer(run, name, ScaleAnswer(accepted=True, message="1 → 3", target=target, number=number))

    return turn


def say(played: list[Played], *arguments: Any, **more: Any) -> Callable[[RunDir], None]:
    return lambda run: played[0].says(**facts(*arguments, **more))


def test_scaling_is_over_when_every_worker_is_ready(tmp_path: Path) -> None:
    me: list[Played] = []
    steps = [
        accept(3),
        say(me, 3, 1, "busy", "placing", "starting"),
        say(me, 3, 1, "busy", "ready", "starting"),
        say(me, 3, 1, "busy", "ready", "ready"),
    ]
    me.append(Played(tmp_path, steps))
    me[0].says(**facts(1, 0, "busy"))
    answer = me[0].control.request(3, by="me", timeout_s=10)
    assert me[0].control.wait_in_effect(answer, timeout_s=10) == "3 rollout workers are ready"
    assert steps == []


def test_a_retiring_worker_is_waited_for(tmp_path: Path) -> None:
    me: list[Played] = []
    steps = [accept(1), say(me, 1, 1, "busy", "retiring"), say(me, 1, 1, "ready")]
    me.append(Played(tmp_path, steps))
    me[0].says(**facts(2, 0, "busy", "busy"))
    answer = me[0].control.request(1, by="me", timeout_s=10)
    me[0].control.wait_in_effect(answer, timeout_s=10)
    assert steps == []


def test_what_does_not_come_about_is_told(tmp_path: Path) -> None:
    me = [Played(tmp_path, [accept(3)])]
    me[0].turns.append(say(me, 3, 1, "busy", "placing", "placing", free={"CPU": 0.5}))
    me[0].says(**facts(1, 0, "busy"))
    answer = me[0].control.request(3, by="me", timeout_s=10)
    with pytest.raises(RunError) as raised:
        me[0].control.wait_in_effect(answer, timeout_s=3)
    assert str(raised.value) == (
        "not in effect after 3 s, but still asked for: 1 of 3 rollout workers are ready; being placed for 12 s: "
        "worker-1, worker-2 (each asks for {CPU: 1}, and {CPU: 0.5} is free in the cluster)"
    )


def test_somebody_else_may_want_another_number(tmp_path: Path) -> None:
    me: list[Played] = []
    me.append(Played(tmp_path, [accept(3), say(me, 2, 2, "busy", "ready")]))
    me[0].says(**facts(1, 0, "busy"))
    answer = me[0].control.request(3, by="me", timeout_s=10)
    with pytest.raises(RunError, match="2 rollout workers are wanted by now, not 3: me asked for it"):
        me[0].control.wait_in_effect(answer, timeout_s=3)


@pytest.mark.parametrize(
    ("state", "age", "more", "told"),
    [
        ("finished", 1.0, {"error": None}, "the run is finished"),
        ("failed", 1.0, {"error": "no worker is left"}, "the run is failed: no worker is left"),
        ("running", 60.0, {}, "the run has died: it last said something 60 s ago"),
        ("ending", 1.0, {}, "the run has taken its last step"),
    ],
)
def test_only_a_run_in_progress_is_asked(
    tmp_path: Path, state: str, age: float, more: dict[str, Any], told: str
) -> None:
    played = Played(tmp_path, [])
    played.says(state, age=age, **more)
    with pytest.raises(RunError, match=told):
        played.control.request(3, by="me", timeout_s=10)
    assert played.run.list("control") == []


def test_a_run_that_does_not_answer_is_left_alone(tmp_path: Path) -> None:
    played = Played(tmp_path, [])
    played.says("starting")
    with pytest.raises(RunError, match="did not answer within 2 s, and was not changed; it is still starting"):
        played.control.request(3, by="me", timeout_s=2)
    assert played.run.list("control") == [], "nothing to come upon later"


def test_a_refusal_is_told_as_it_was_said(tmp_path: Path) -> None:
    def refuse(run: RunDir) -> None:
        (name,) = pending_requests(run)
        put_answer(run, name, ScaleAnswer(accepted=False, message="0 is fewer than rollout.min_workers=1"))

    played = Played(tmp_path, [refuse])
    played.says(**facts(1, 0, "busy"))
    with pytest.raises(ConfigError, match=r"0 is fewer than rollout\.min_workers=1"):
        played.control.request(1, by="me", timeout_s=10)


def test_it_needs_no_local_folder(tmp_path: Path) -> None:
    """A file system that is not this machine's, as far as a run's folder can tell."""
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    run = RunDir.create("bucket", "run", filesystem=remote)
    assert not run.is_local
    played = Played(tmp_path, [accept(2)], run)
    played.says(**facts(1, 0, "busy"))
    assert played.control.request(2, by="me", timeout_s=10).target == 2


# -- what a user sees --------------------------------------------------------------------------------------------------


def test_the_view_shows_everything_that_was_promised(tmp_path: Path) -> None:
    played = Played(tmp_path, [])
    played.says(**facts(3, 1, "busy", "ready", "placing", free={"CPU": 0.0}))
    text = io.StringIO()
    Console(file=text, width=160).print(render(played.control.status()))
    shown = text.getvalue()
    for wanted in (
        "run: running",
        "4 of 60, policy version 4",
        "the learner waits for step 4: 3 of 16 groups have arrived",
        "mean 0.25, max 1 in the last step; at most 2",
        "6 assignments wait for a worker",
        "64 completions, 8 groups a second",
        "worker-0  busy",
        "groups 0 to 7 of step 4",
        "worker-2  placing",
        "wait plan",
        "1.500",
        "1 → 3",
        "me asked for it",
        "free in the cluster",
        "2 samples quarantined",
    ):
        assert wanted in shown, shown


def test_names_in_the_view_are_no_markup(tmp_path: Path) -> None:
    said = facts(1, 0, "busy", free={"CPU": 1.0})
    said["pool"]["workers"]["worker-0"] |= {"node": "[/x]", "at": "[b]groups"}
    said["pool"]["demand"] = ":dog: [b]CPU"
    said["scaling"]["decisions"][0]["reason"] = "[/x] <b>"
    played = Played(tmp_path, [])
    played.says(**said)
    text = io.StringIO()
    Console(file=text, width=160).print(render(played.control.status()))
    for wanted in ("[/x], pid", "[b]groups", "asks for :dog: [b]CPU", "[/x] <b>"):
        assert wanted in text.getvalue()


@pytest.mark.parametrize("state", ["starting", "running", "finished", "failed"])
def test_a_status_without_figures_shows_too(tmp_path: Path, state: str) -> None:
    played = Played(tmp_path, [])
    played.says(state, age=100.0, error="why" if state == "failed" else None)
    text = io.StringIO()
    Console(file=text, width=160).print(render(played.control.status()))
    assert ("dead" in text.getvalue()) == (state in ("starting", "running"))
    assert ("why" in text.getvalue()) == (state == "failed")


def test_the_runs_of_a_folder_are_listed(tmp_path: Path) -> None:
    for name, state in (("b-done", "finished"), ("a-new", None), ("c-killed", "running")):
        run = RunDir.create(tmp_path, name)
        run.write_text("config.yaml", "")
        if state is not None:
            write_status(run, state, 0.0, {"step": 3, "steps": 4})
    measures = {side: {"measures": {"reward": {"value": value}}} for side, value in (("before", 0.25), ("after", 0.5))}
    RunDir.open(tmp_path, "b-done").write_json("summary.json", {"status": "finished", "eval": measures})
    RunDir.open(tmp_path, "c-killed").write_text("summary.json", "{torn")
    (tmp_path / "no-run").mkdir()
    listed = mmrl("runs", "list", tmp_path)
    assert listed.exit_code == 0, listed.output
    _, new, done, killed = listed.stdout.splitlines()
    assert new.split() == ["a-new", "unknown"]
    assert done.split()[:3] == ["b-done", "finished", "3/4"]
    assert done.split()[-2:] == ["0.2500", "0.5000"]
    assert killed.split()[:3] == ["c-killed", "dead", "3/4"]
    told = json.loads(mmrl("runs", "list", tmp_path, "--json").stdout)
    assert [(run["run"], run["state"], run["reward_after"]) for run in told] == [
        ("a-new", "unknown", None),
        ("b-done", "finished", 0.5),
        ("c-killed", "dead", None),
    ]
    assert mmrl("runs", "list", tmp_path / "none").stderr == (
        f"error: there is no folder {tmp_path}/none: name the one of run.root\n"
    )


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_leaving_a_watch_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...]) -> None:
    played = Played(tmp_path, [])
    played.says("running", age=played.now - time.time(), **facts(1, 0, "ready"))  # just now
    slept: list[float] = []

    def leave(seconds: float) -> None:
        slept.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr("mmrl_ray.cli.jobs.time.sleep", leave)
    left = mmrl("status", played.run.location, "--watch", *form)
    assert (left.exit_code, left.stderr, len(slept)) == (0, "", 1)
    assert "running" in left.stdout


def test_the_commands(tmp_path: Path) -> None:
    played = Played(tmp_path, [])
    played.says("finished", **facts(1, 0, "ready"))
    shown = mmrl("status", played.run.location)
    assert shown.exit_code == 0
    assert "finished" in shown.stdout
    assert json.loads(mmrl("status", played.run.location, "--json", "--watch").stdout)["state"] == "finished"
    refused = mmrl("scale", played.run.location, "--rollout-workers", 3)
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"error: {played.run.location}: the run is finished; only a run in progress can be scaled\n"
    )
    for wrong in ("0", "-1", "many", "1.5", "9" * 30):
        done = mmrl("scale", played.run.location, f"--rollout-workers={wrong}")
        assert (done.exit_code, done.stderr.split(":")[0]) == (2, "error")
    assert mmrl("status", tmp_path / "none").exit_code == 1
