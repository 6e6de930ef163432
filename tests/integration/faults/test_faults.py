"""A run of `mmrl train` on a Ray of three nodes, to which one fault after the other is done.

The judge is the rollout log, against what data and seeds say of each group; and the report, which must tell of it all.
Faults that have a test on a real Ray elsewhere are not repeated here:

    a rollout worker killed idle, killed at its work, stopped (SIGSTOP) idle and at its work; a sample that kills
    whoever takes it; too few workers for too long; workers that come and go        rollouts/test_rollouts_on_ray.py
    a learner killed in the middle of a step, one of two; NaN; no room              learner/test_group.py
    the driver killed, and `mmrl train --resume`: bit for bit; a damaged checkpoint  training/test_train.py
    the driver of a job killed, and `mmrl jobs resume`                               jobs/test_jobs.py
    a reward replica killed under load, without a run                                serving/test_reward_handle.py
    all of them at random, for minutes                                               benchmarks/chaos.py
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import yaml

from mmrl_ray.config.load import load_config
from mmrl_ray.run_records.run_dir import RunDir
from tests.integration.training.conftest import prepare
from tests.support.faults.judge import judge
from tests.support.faults.machines import HEAD, ROLLOUTS, machines
from tests.support.faults.run import FaultyRun, NotSurvivedError

pytestmark = pytest.mark.timeout(600)

SURVIVED = (
    "handover",
    "reward_timeout",
    "reward_nan",
    "reward_few",
    "replica_killed",
    "node_killed",
    "store_full",
    "learner_killed",
    "controller_killed",
)
"""The run goes on; in this order. The last one ends it within a minute, it says why, and goes on when it is resumed."""


@dataclass
class Story:
    """What became of the run."""

    config: Path
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("faults")
    settings = prepare(folder)
    settings["run"] = {"name": "faulted", "seed": 3, "root": str(folder / "runs")}
    del settings["data"]["eval"]
    settings["rollout"] |= {"workers": 2, "assignment_timeout_s": 20.0}
    settings["reward"] = {"timeout_s": 3.0, "retries": 1}
    settings["serving"] = {"reward": {"health_check_period_s": 0.5}}
    settings["learner"] |= {"steps": 10_000, "checkpoint_every": 4}
    settings["resources"] = {
        "learner": {"threads": 1, "node_labels": HEAD},
        "rollout": {"threads": 1, "node_labels": ROLLOUTS},
        "reward": {"cpus": 0.0, "node_labels": HEAD},
    }
    config = folder / "faulted.yaml"
    config.write_text(yaml.safe_dump(settings))
    told = Story(config, folder / "runs" / "faulted")
    with (
        machines(folder, forked=True) as up,
        closing(FaultyRun(up, config, told.folder, Random(0), pause_s=0.2)) as run,
    ):
        run.begin()
        for fault in SURVIVED:
            try:
                told.seconds[fault] = run.suffer(fault)
            except NotSurvivedError as error:
                told.failures[fault] = str(error)
                break  # what comes after it would be blamed on the wrong fault
        if not told.failures:
            run.end_by_full_disk()  # within a minute, and with what is finished in the log; chaos.py resumes it
        yield told


@pytest.mark.parametrize("fault", SURVIVED)
def test_a_run_gets_over(story: Story, fault: str) -> None:
    assert fault not in story.failures, story.failures[fault]
    assert fault in story.seconds, f"it did not come to that: {story.failures}"
    print(f"{fault}: {story.seconds[fault]:.1f} s")


def test_every_group_of_every_step_is_in_the_log_once(story: Story) -> None:
    verdict = judge(story.folder, load_config(story.config))
    assert verdict.steps > len(SURVIVED)
    assert (verdict.lost, verdict.duplicated, verdict.wrong) == ([], [], [])
    assert verdict.quarantined == []


def test_a_reward_that_failed_is_told_with_its_reason(story: Story) -> None:
    told = [event["detail"] for event in RunDir.at(story.folder).read_lines("events.jsonl") if "detail" in event]
    for words in ("captions within 3 s", "has total=nan", "returned 0 scores for 1 captions"):
        assert any(words in detail for detail in told), words


def test_the_report_tells_of_it(story: Story) -> None:
    page = html.unescape((story.folder / "report.html").read_text())
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for words in (
        r"rollout workers lost \d+ .*ActorDiedError",
        r"rollout workers replaced \d+ ready within",
        r"reward replicas lost 1 ",
        r"learner restarts 1 at step",
        r"groups without a reward [3-9] ",
        r"captions without a reward \d+ ",
        r"ended with an error 2 failed: ",
        r"resumed 1 ",
        r"run ended status: failed: [^ ]*checkpoints/step-\d+: the disk is full",
        r"run ended status: failed: the rollout controller is gone",
    ):
        assert re.search(words, text), words
