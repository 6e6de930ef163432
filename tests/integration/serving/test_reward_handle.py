"""The reward deployment as a training run uses it: the same scores, quick enough, and not lost with a replica."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator

import pytest
import ray
from ray import serve

from mmrl_ray.config.load import parse_config
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.base import RewardFailure, score_with_retry
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir
from mmrl_ray.training.serve_apps import RunReward, app_name
from tests.integration.serving.conftest import REFERENCES, replica_pids, wait_for

pytestmark = pytest.mark.usefixtures("local_ray")

CORPUS = CorpusStatistics.from_references(REFERENCES)
CONFIG = """
run: {name: r, root: %s}
model: {path: none}
data: {train: none}
reward:
  parts: {caption: {kind: caption}, cider: {kind: cider_d}}
  weights: {caption: 0.7, cider: 0.3}
learner: {steps: 1}
serving: {reward: {health_check_period_s: 0.5}}
"""
SAMPLES = [Sample(f"s{i}", (b"png" * 1000,), "p", tuple(r)) for i, r in enumerate(REFERENCES)]
BATCH = [SAMPLES[i % 3] for i in range(128)]
CAPTIONS = [f"a {['red', 'green', 'blue'][i % 3]} {['circle', 'star', 'squares'][i % 5 % 3]} {i}" for i in range(128)]


@pytest.fixture(scope="module")
def hosted(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunReward]:
    folder = tmp_path_factory.mktemp("reward")
    cfg = parse_config(CONFIG % folder, "test")
    run = RunDir.create(folder, "r")
    run.write_text(STATISTICS, CORPUS.to_json())
    with RunReward(cfg, run, CORPUS) as entered:
        entered.wait()
        yield entered
    wait_for(lambda: app_name(run) not in serve.status().applications, "end of the reward application")
    serve.shutdown()


def inline(section: RewardSection | None = None) -> list[object]:
    reward = build_reward(section or parse_config(CONFIG % "x", "test").reward, CORPUS)
    return list(reward.score_batch(BATCH, CAPTIONS))


def test_the_scores_are_those_of_the_reward_itself(hosted: RunReward) -> None:
    assert hosted.reward.score_batch(BATCH, CAPTIONS) == inline()


def test_it_works_from_another_process(hosted: RunReward) -> None:
    @ray.remote(num_cpus=0)
    def score(pickled: bytes) -> object:
        return pickle.loads(pickled).score_batch(BATCH, CAPTIONS)

    assert ray.get(score.remote(pickle.dumps(hosted.reward)), timeout=60) == inline()


def test_a_caption_that_cannot_be_scored_masks_its_sample_alone(hosted: RunReward) -> None:
    samples = [SAMPLES[0], Sample("bare", (), "p"), SAMPLES[1]]
    with pytest.raises(RewardError, match="'bare' has no references"):
        hosted.reward.score_batch(samples, ["a", "b", "c"])
    scores = score_with_retry(hosted.reward, samples, ["a", "b", "c"], timeout_s=20, retries=0)
    assert [isinstance(score, RewardFailure) for score in scores] == [False, True, False]


def test_a_replica_that_dies_costs_no_score(hosted: RunReward) -> None:
    """Killed while four threads score all the time: every call gets its scores."""
    expected, stop, wrong = inline(), threading.Event(), []
    done = [0] * 4

    def score(number: int) -> None:
        while not stop.is_set():
            try:
                if hosted.reward.score_batch(BATCH, CAPTIONS) != expected:
                    wrong.append("other scores")
            except RewardError as error:
                wrong.append(str(error))
            done[number] += 1

    threads = [threading.Thread(target=score, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: min(done) > 3, "scores")
        (replica,) = replica_pids(os.getpid(), "reward")
        os.kill(replica, signal.SIGKILL)
        before = list(done)
        wait_for(lambda: all(now > then + 3 for now, then in zip(done, before, strict=True)), "scores afterwards")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert wrong == []
