"""What travels between controller, pool and workers.

Controller ── submit ──▶ RayWorkerPool ──▶ Collected, DataFailure
    │ pulls                    │ each worker runs an
 SampleStream                Engine (made by an EngineFactory)

A worker is handed an `Assignment` of `GroupRequest`s and hands back an `AssignmentResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from mmrl_ray.data.row import pickled_by_fields
from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import GroupKey, SamplingParams, ScoredGroup


@pickled_by_fields
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
    """Also the state of the first completion (`analysis/attribution.py`)."""
    other: Sample | None = None
    """Also what the policy makes of the sample beside the pictures of this one (`analysis/sight.py`)."""


Kind = Literal["train", "eval", "aside"]
"""Training; captions that somebody waits for, which come first; captions beside training, which come last."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class Assignment:
    """A fixed list of groups that one worker decodes together; composed by the step, not by who takes it."""

    id: int
    kind: Kind
    groups: tuple[GroupRequest, ...]
    version: int
    """Policy version to sample with."""
    weights: tuple[Any, ...] = ()
    """(reference to the adapter state of `version`,): inside a tuple, so that Ray hands it over unresolved."""
    greedy_baseline: bool = False
    """Also decode each prompt greedily, for the `greedy` advantage."""
    reference_logprobs: bool = False
    """Also score the completions under the reference policy, or the teacher that stands in its place."""
    ahead: tuple[Sample, ...] = ()
    """Of an assignment that may come next: their prompts may be made while this one decodes. A hint, and nothing of
    this one."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Those of its groups."""
        return tuple(group.sample for group in self.groups)

    def describe(self) -> str:
        """For the run's status, in a few words."""
        first, last = self.groups[0].key, self.groups[-1].key
        places = f"group {first.index}" if len(self.groups) == 1 else f"groups {first.index} to {last.index}"
        return f"{places} of {f'step {first.step}' if self.kind == 'train' else 'an evaluation'}"


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class DataFailure:
    """A sample that cannot be used: no retry, quarantined with its reason."""

    key: GroupKey
    sample_id: str
    reason: str


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class AssignmentResult:
    """What a worker hands back: light; the groups themselves are behind `ScoredGroup.payload`."""

    assignment_id: int
    version: int
    worker: str
    groups: tuple[ScoredGroup, ...]
    failures: tuple[DataFailure, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase for the whole assignment: load, encode, sample, reference, reward, states, sight."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class Wait:
    """No plan yet: ask again."""

    reason: str
    came: int = 0
    """Of what is waited for, so much is there."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class Stop:
    """No plan for this step or any later one."""

    reason: str
    failed: bool = False
    """The run ended by an error, which `failure()` of the controller returns; False when it is done or was stopped."""
    early: bool = False
    """It is done before all steps were taken: it does not get better any more."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class Generated:
    """What an evaluation on the pool gave, in the order of the samples asked for."""

    groups: tuple[ScoredGroup | None, ...]
    """None where the sample failed; captions are behind `payload`."""
    failures: tuple[DataFailure, ...]
    version: int
    """Policy version that wrote the captions."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class Collected:
    """One finished assignment."""

    result: AssignmentResult
    """Payloads in place: `Parcelled`, or the groups themselves in-process."""
    records: tuple[bytes, ...]
    """Rows without advantages, as `encode_records` makes them, of one parcel each."""


FetchWeights = Callable[[], Mapping[str, torch.Tensor] | None]
"""Gets the weights of an assignment's version; None stands for the adapter as it was made."""


class Engine(Protocol):
    """Turns an assignment into scored groups; no Ray."""

    def run(self, assignment: Assignment, fetch: FetchWeights) -> AssignmentResult:
        """Samples, scores and returns the groups, each `payload` the `RolloutGroup` itself."""
        ...

    def prepare(self, samples: Sequence[Sample]) -> None:
        """These may come next: what can be done for them beside other work may begin. Returns at once."""
        ...


EngineFactory = Callable[[str], Engine]
"""Picklable; makes the engine of the worker of that name, inside its process. An `MMRLError` that it raises says that
model, adapter or reward cannot be used; the run ends with it."""
