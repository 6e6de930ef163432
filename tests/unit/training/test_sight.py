"""Looks of a run: what is asked of the pool, what becomes of the answers, who is told, and what ends a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmrl_ray.data.samples import Sample
from mmrl_ray.report.page import write_report
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.telemetry.terminal import RunProgress
from mmrl_ray.training.sight import SightCheck, sight_json
from tests.unit.rollouts.fakes import config, png

SAMPLES = [Sample(f"s{i}", (png(i),), "?", (f"thing {i}",)) for i in range(12)]


class Pool:
    """A controller whose policy sees so much at each step."""

    def __init__(self, run: RunDir, gaps: Mapping[int, float]) -> None:
        self.run, self.gaps, self.asked = run, dict(gaps), 0
        self.watched: Any = None
        self.fatal: list[str] = []

    def watch_held_out(self, samples: Sequence[Sample], sampling: Any, purpose: str, others: Sequence[Sample]) -> None:
        assert purpose == "blind"
        assert sampling.greedy
        self.watched = list(zip(samples, others, strict=True))

    def _answer(self, step: int) -> Any:
        gap, count = self.gaps.pop(step), len(self.watched)
        figures = [
            {
                "reference/own": -1.0,
                "reference/other": -1.0 - gap - 0.001 * i,
                "caption/own": -0.2,
                "caption/other": -0.9 - 0.001 * i,
                "reward/own": 0.5,
                "reward/other": 0.1 * (i % 2),
            }
            for i in range(count)
        ]
        return SimpleNamespace(groups=[*(SimpleNamespace(sight=each) for each in figures[1:]), None], failures=())

    def generate(self, samples: Sequence[Sample], sampling: Any, *, others: Sequence[Sample]) -> Any:
        assert list(zip(samples, others, strict=True)) == self.watched
        return self._answer(min(self.gaps))

    def evaluated(self, purpose: str) -> Any:
        step = min((step for step in self.gaps if 0 < step < 8), default=None)
        return None if step is None else (step, self._answer(step))

    def status(self) -> Any:
        return {"looks": {"open": [step for step in self.gaps if 0 < step < 8]}}

    def judge(self, line: Mapping[str, Any], purpose: str, fatal: str) -> bool:
        assert purpose == "blind"
        self.run.append_line("eval/blind.jsonl", line)
        self.fatal += [fatal] if fatal else []
        return True


def check(run: RunDir, tmp_path: Path, samples: Sequence[Sample] = SAMPLES, **section: Any) -> SightCheck:
    learner = {"steps": 8, "blind_check": {"every": 2, "samples": 9, **section}}
    return SightCheck(config(tmp_path, data={"eval": "held-out"}, learner=learner), run, samples, RunProgress())


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "r")


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]


def test_a_policy_that_stops_looking_is_told_once_and_everywhere(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sight, pool = check(run, tmp_path), Pool(run, {0: 0.5, 2: 0.0, 4: 0.0, 6: 0.0, 8: 0.0})
    controller: Any = pool
    sight.watch(controller)
    assert len(pool.watched) == 9
    sight.look_before(controller)
    sight.look_before(controller)  # as in a run that is resumed at its beginning
    sight.look(controller)
    sight.finish_looking(controller, 8)
    sight.finish_looking(controller, 8)
    lines = run.read_lines("eval/blind.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    assert [line["running"] for line in lines] == [0, 1, 2, 3, 4]
    assert {line["samples"] for line in lines} == {8}, "one could not be captioned"
    (warned,) = warnings_of(capsys)
    assert "does not look at its pictures (step 4, 2 looks running): references are no likelier with their" in warned
    assert "lower learner.lr" in warned, "it saw before"
    assert pool.fatal == []
    (event,) = run.read_lines("events.jsonl")
    assert (event["kind"], event["step"]) == ("blind", 4)
    assert event["gap_logprob"]["value"] == pytest.approx(lines[2]["blind/gap_logprob"])
    told = sight_json(run)
    assert (told["looks"], told["first"]["step"], told["last"]["step"], told["last"]["blind"] != []) == (5, 0, 8, True)
    write_report(run)
    page = run.read_text("report.html")
    assert "The policy does not look at its pictures (step 8, 4 looks running)" in page
    assert "What the own picture is worth to references" in page
    assert "looks that found the policy blind" in page


def test_a_policy_that_never_saw_is_told_before_it_learns(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sight, pool = check(run, tmp_path), Pool(run, {0: 0.0, 2: 0.5})
    controller: Any = pool
    sight.watch(controller)
    sight.look_before(controller)
    (warned,) = warnings_of(capsys)
    assert "(before learning)" in warned
    assert "sft.train_vision" in warned
    sight.look(controller)
    assert not warnings_of(capsys), "it learned to look"


def test_stop_ends_the_run_with_its_reason_but_not_when_all_is_learned(run: RunDir, tmp_path: Path) -> None:
    sight, pool = check(run, tmp_path, on_blind="stop"), Pool(run, {0: 0.5, 2: 0.0, 4: 0.0})
    controller: Any = pool
    sight.watch(controller)
    sight.look_before(controller)
    sight.look(controller)
    (fatal,) = pool.fatal
    assert "step 4, 2 looks running" in fatal
    assert fatal.endswith("(learner.blind_check.on_blind=stop)")
    pool.gaps = {6: 0.0, 8: 0.0}
    sight.finish_looking(controller, 8)
    assert len(pool.fatal) == 1


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (SAMPLES[:1], "of 1 held-out samples no two have different pictures and different references"),
        ([replace(s, images=()) for s in SAMPLES], "12 samples without a picture are left out"),
        ([replace(s, images=(png(3),)) for s in SAMPLES], "no two have different pictures"),
        ([replace(s, references=("the same",)) for s in SAMPLES], "no two have different pictures"),
    ],
)
def test_what_nobody_can_look_at_is_said(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], samples: list[Sample], told: str
) -> None:
    sight, controller = check(run, tmp_path, samples), SimpleNamespace()
    sight.watch(controller)  # type: ignore[arg-type]
    sight.look_before(controller)  # type: ignore[arg-type]
    sight.finish_looking(controller, 8)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert told in said
    assert "is not known" in said
    assert sight_json(run) == {}


def test_few_samples_have_gaps_and_no_verdict(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sight, pool = check(run, tmp_path, SAMPLES[:5]), Pool(run, {0: 0.0})
    controller: Any = pool
    sight.watch(controller)
    sight.look_before(controller)
    (line,) = run.read_lines("eval/blind.jsonl")
    assert (line["samples"], line["blind"]) == (4, [])
    assert "blind_check: 5 samples are too few to tell by" in capsys.readouterr().err


def test_without_held_out_samples_or_with_every_0_nothing_is_said(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sight in (check(run, tmp_path, []), check(run, tmp_path, every=0)):
        sight.watch(SimpleNamespace())  # type: ignore[arg-type]
        assert not sight.looks
    assert capsys.readouterr().err == ""
