"""What a step is made of: K samples of the stream, each with a seed of its own. Decided by the step alone.

Only the pump thread touches it. Samples of the next step are read ahead while workers are busy; when a sample was
quarantined since, they are read again, so that reading ahead never changes what a step is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RolloutError
from mmrl_ray.experience.carriers import GroupKey, SamplingParams
from mmrl_ray.experience.seeds import group_seed
from mmrl_ray.rollouts.assignments import GroupRequest
from mmrl_ray.rollouts.protocols import SampleSource


@dataclass(frozen=True, slots=True)
class _Ahead:
    step: int
    samples: Sequence[Sample]
    quarantined: int


class StepComposer:
    """Steps in order, from any step whose place in the stream is known."""

    def __init__(self, source: SampleSource, cfg: Config) -> None:
        self.groups_per_step = cfg.learner.groups_per_step
        self.next_step = 0
        self._source = source
        self._seed = cfg.run.seed
        self._completions = cfg.rollout.group_size
        self._sampling = SamplingParams(temperature=cfg.rollout.temperature, max_new_tokens=cfg.rollout.max_new_tokens)
        self._before: dict[int, dict[str, Any]] = {0: source.state()}
        self._ahead: _Ahead | None = None

    @property
    def quarantined(self) -> int:
        """Samples left out so far."""
        return len(self._source.quarantine)

    def read_ahead(self) -> None:
        """Takes the next step's samples out of the stream, if that was not done yet."""
        if self._ahead is None:
            self._before[self.next_step] = self._source.state()
            samples = self._source.take(self.groups_per_step)
            self._ahead = _Ahead(self.next_step, samples, self.quarantined)

    def compose(self) -> tuple[GroupRequest, ...]:
        """The groups of `next_step`, which advances.

        Raises:
            DataError: the stream cannot be read, or too much of it is broken.
        """
        if self._ahead is not None and self._ahead.quarantined != self.quarantined:
            self._source.restore(self._place(self.next_step))
            self._ahead = None
        self.read_ahead()
        assert self._ahead is not None
        step, samples = self._ahead.step, self._ahead.samples
        self._ahead = None
        self.next_step = step + 1
        return tuple(
            GroupRequest(
                key=GroupKey(step, index),
                sample=sample,
                sampling=replace(self._sampling, seed=group_seed(self._seed, step, index)),
                completions=self._completions,
            )
            for index, sample in enumerate(samples)
        )

    def quarantine(self, sample: Sample, reason: str) -> None:
        """A worker could not use this row: it does not come again, while others of the same id do.

        Raises:
            QuarantineError: more than the run tolerates.
        """
        self._source.quarantine.add(sample.id, reason, sample.place)

    def state(self, step: int) -> dict[str, Any]:
        """Where the stream stands before `step`, with everything quarantined by now. JSON-able.

        Raises:
            RolloutError: that was long ago, and forgotten.
        """
        if step == self.next_step and self._ahead is None:
            return self._source.state()
        return self._place(step)

    def seek(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Goes on with `step`, from `state` or from where the stream was before it, with what was quarantined then.

        Raises:
            RolloutError: no `state`, and the place is not known.
            DataError: the state is of another data set or seed.
        """
        state = dict(state) if state is not None else self._known(step)
        self._source.restore(state)
        self._before = {0: self._before[0], step: state}
        self._ahead = None
        self.next_step = step

    def forget_before(self, step: int) -> None:
        """Places before `step` will not be asked for again; the very first one is kept."""
        self._before = {s: state for s, state in self._before.items() if s >= step or s == 0}

    def _known(self, step: int) -> dict[str, Any]:
        if step not in self._before:
            raise RolloutError(f"where the samples of step {step} begin is not known here; restore its checkpoint")
        return self._before[step]

    def _place(self, step: int) -> dict[str, Any]:
        return {**self._known(step), "quarantine": self._source.quarantine.state()}
