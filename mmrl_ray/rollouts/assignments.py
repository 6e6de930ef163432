"""What the controller hands to a rollout worker, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import GroupKey, SamplingParams, ScoredGroup


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One group to sample."""

    key: GroupKey
    sample: Sample
    sampling: SamplingParams
    """Its seed is the group's own."""
    completions: int
    """G; 1 for an evaluation."""
    wants_state: bool = False
    """Also the state of the first completion (`analysis/states.py`)."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A fixed list of groups that one worker decodes together; composed by the step, not by who takes it."""

    id: int
    kind: Literal["train", "eval"]
    groups: tuple[GroupRequest, ...]
    version: int
    """Policy version to sample with."""
    weights: tuple[Any, ...] = ()
    """(reference to the adapter state of `version`,): inside a tuple, so that Ray hands it over unresolved."""
    greedy_baseline: bool = False
    """Also decode each prompt greedily, for the `greedy` advantage."""
    reference_logprobs: bool = False
    """Also score the completions under the reference policy."""

    def describe(self) -> str:
        """For the run's status, in a few words."""
        first, last = self.groups[0].key, self.groups[-1].key
        places = f"group {first.index}" if len(self.groups) == 1 else f"groups {first.index} to {last.index}"
        return f"{places} of {f'step {first.step}' if self.kind == 'train' else 'an evaluation'}"


@dataclass(frozen=True, slots=True)
class DataFailure:
    """A sample that cannot be used: no retry, quarantined with its reason."""

    key: GroupKey
    sample_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class AssignmentResult:
    """What a worker hands back: light; the groups themselves are behind `ScoredGroup.payload`."""

    assignment_id: int
    version: int
    worker: str
    groups: tuple[ScoredGroup, ...]
    failures: tuple[DataFailure, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase for the whole assignment: load, encode, sample, reference, reward, states."""
