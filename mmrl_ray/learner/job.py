"""What a learner group is given and gives back.

Apart from the loop that uses it, since driver and Ray Train's own controller have both: they need not import
transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.errors import MMRLError
from mmrl_ray.rollouts.controller_actor import ControllerClient
from mmrl_ray.run_records.run_dir import RunDir


@dataclass(frozen=True)
class LearnerJob:
    """What every learner of a run is given; picklable."""

    cfg: Config
    """`model.path` is the folder (or hub id) that reinforcement learning starts from, as every node sees it."""
    run: RunDir
    controller: ControllerClient


def train_loop(arguments: dict[str, Any]) -> LearnerOutcome:
    """What each learner runs: see there."""
    from mmrl_ray.learner.train_loop import train_loop as run

    return run(arguments)


@dataclass(frozen=True)
class LearnerOutcome:
    """How a learner group ended."""

    step: int
    """Finished steps; a checkpoint holds them."""
    finished: bool
    """Whether no step is left to take, all being taken or held-out captions not getting better, and `adapter/` is
    written."""
    reason: str
    error: MMRLError | None = None
    """What ended it, when that was no request."""
