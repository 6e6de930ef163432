"""What goes wrong inside a run's processes. Told by files in the folder that `MMRL_FAULTS` names.

    handover        the worker that takes it dies when its groups are sampled and scored, and before it hands them over
    poison          the first sample of the next assignment kills every worker that samples it, from then on
    reward_timeout  … reward_nan, reward_few: the reward gives no answer in time for one sample of the next assignment,
                    gives NaN for it, or returns too few scores whenever that sample is in the batch
    disk_full       as long as the file is there, the learners' disk has no room for a checkpoint

All but the last are taken by whoever comes first, and leave NAME.taken. `python -m tests.support.faults.driver` is
`mmrl` with these in place.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.experience.carriers import RewardBreakdown, Score
from mmrl_ray.learner import train_loop as learner
from mmrl_ray.learner.job import LearnerOutcome
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rollouts.engine import RolloutEngine
from mmrl_ray.rollouts.factory import PolicyEngineFactory
from mmrl_ray.rollouts.teacher import TeacherClient
from mmrl_ray.rollouts.types import Assignment, AssignmentResult, FetchWeights

VARIABLE = "MMRL_FAULTS"
PAUSE = "pause"
"""A file with the seconds that each assignment takes longer, so that there is time to hit a worker at its work."""
REWARD_FAULTS = ("reward_timeout", "reward_nan", "reward_few")
_STAGED = re.compile(r"/\.tmp-[0-9a-f]{32}(/|$)")
"""Files and folders of a checkpoint that is being written."""
_fsync = os.fsync


def folder() -> Path:
    """Where faults are told."""
    return Path(os.environ[VARIABLE])


def claim(name: str) -> bool:
    """Whether the fault of that name waits, and this caller is the one that takes it."""
    try:
        os.rename(folder() / name, folder() / f"{name}.taken")
    except FileNotFoundError:
        return False
    return True


class FaultyReward:
    """A reward that fails on one sample, as long as it is told to."""

    def __init__(self, reward: RewardFn, timeout_s: float) -> None:
        self._reward, self._timeout_s = reward, timeout_s
        self.fault, self.sample = "", ""

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> Sequence[Score]:
        scores = list(self._reward.score_batch(samples, captions))
        hit = [i for i, sample in enumerate(samples) if self.fault and sample.id == self.sample]
        if hit and self.fault == "reward_timeout":
            time.sleep(self._timeout_s)
            raise RewardError(f"no answer for {len(captions)} captions within {self._timeout_s:g} s")
        if hit and self.fault == "reward_nan":
            scores[hit[0]] = RewardBreakdown(float("nan"), {}, {})
        return scores[:-1] if hit and self.fault == "reward_few" else scores


class FaultyEngine:
    """The run's own engine, and what happens to it."""

    def __init__(self, engine: RolloutEngine, reward: FaultyReward) -> None:
        self._engine, self._reward = engine, reward

    def prepare(self, samples: Sequence[Sample]) -> None:
        """See `Engine`."""
        self._engine.prepare(samples)

    def run(self, assignment: Assignment, fetch: FetchWeights) -> AssignmentResult:
        """See `Engine`."""
        if assignment.kind == "eval":
            return self._engine.run(assignment, fetch)
        time.sleep(float((folder() / PAUSE).read_text()))
        ids = [request.sample.id for request in assignment.groups]
        poisoned = folder() / "poisoned"
        if claim("poison"):
            poisoned.write_text(ids[0])
        if poisoned.exists() and poisoned.read_text() in ids:
            os._exit(1)
        self._reward.fault = next((fault for fault in REWARD_FAULTS if claim(fault)), "")
        self._reward.sample = ids[0]
        result = self._engine.run(assignment, fetch)
        if claim("handover"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result


@dataclass(frozen=True)
class FaultyFactory:
    """Stands in for `PolicyEngineFactory`."""

    cfg: Config
    reward: RewardFn
    teacher: TeacherClient | None = None

    def __call__(self, worker: str) -> FaultyEngine:
        """See `EngineFactory`."""
        reward = FaultyReward(self.reward, self.cfg.reward.timeout_s)
        return FaultyEngine(PolicyEngineFactory(self.cfg, reward, self.teacher)(worker), reward)


def faulty_train_loop(arguments: dict[str, Any]) -> LearnerOutcome:
    """Stands in for `train_loop`."""
    (folder() / "learner").write_text(str(os.getpid()))
    os.fsync = _fsync_on_a_full_disk  # type: ignore[assignment]
    return learner.train_loop(arguments)


def _fsync_on_a_full_disk(descriptor: int) -> None:
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if _STAGED.search(name) and (folder() / "disk_full").exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    _fsync(descriptor)
