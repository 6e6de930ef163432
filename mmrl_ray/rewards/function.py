"""A user's own function as a reward part: `fn(captions, states, **kwargs)` gives one number a caption.

It runs in a process of its own (`isolated.py`). Where a batch hangs or ends that process, its captions are tried one by
one, so that only those that do it have no score:

    batch, timeout_s ──hangs──▶ each caption, a quarter of what is left of another timeout_s ──hangs──▶ to the end
                                of the queue ──▶ those that are left, all of what is left
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from mmrl_ray.config.reward import Modality
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.experience.breakdown import RewardBreakdown, RewardFailure, Score
from mmrl_ray.rewards.checks import check_pairs
from mmrl_ray.rewards.isolated import IsolatedFunction, Lost
from mmrl_ray.rewards.state import state_value

TIMEOUT_S = 60.0
_FIGURE = "value"
_SHARE = 0.25
_MOST_RESTARTS = 8
"""After so many captions that hang there is no hope for the others, and each start may load a model."""


class FunctionReward:
    """Calls `module:function` with captions and, for each, the state of one modality.

    The function is imported where the reward is made, in its own process, so that a wrong path ends the run before it
    begins. The reward travels to workers as its path.
    """

    def __init__(
        self,
        path: str,
        state: Modality,
        kwargs: Mapping[str, Any],
        timeout_s: float = TIMEOUT_S,
        code: str | None = None,
    ) -> None:
        """`state` is what the function is given: see `state_value`; `timeout_s` is for a batch; `code` is the folder
        of its module, by default the working directory.

        Raises:
            ConfigError: the module cannot be imported, has no such function, or that does not take these arguments.
        """
        self._state: Modality = state
        self._timeout_s = timeout_s
        self._function = IsolatedFunction(path, kwargs, code)
        self._function.start()

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[Score]:
        """`score_within` the reward's own time."""
        return self.score_within(samples, captions, self._timeout_s)

    def score_within(self, samples: Sequence[Sample], captions: Sequence[str], timeout_s: float) -> list[Score]:
        """One score a caption, in order; a failure for each that the function hangs on, or has no finite number for.

        Returns within twice `timeout_s`, beside the time in which processes start and other calls have their turn.

        Raises:
            RewardError: the function raised, or returned something else than a list of one value a caption.
            ConfigError: it cannot be imported in this process.
        """
        check_pairs(samples, captions)
        if not captions:
            return []
        states = [state_value(sample, self._state) for sample in samples]
        scores = self._function.call(captions, states, timeout_s).scores
        if not isinstance(scores, Lost):
            return [_score(value) for value in scores]
        if len(captions) == 1:
            return [RewardFailure(scores.reason)]
        return self._one_by_one(captions, states, timeout_s)

    def _one_by_one(self, captions: Sequence[str], states: Sequence[Any], timeout_s: float) -> list[Score]:
        scores: dict[int, Score] = {}
        queue, hung = deque(range(len(captions))), set[int]()
        left_s, restarts = timeout_s, 0
        while queue:
            place = queue.popleft()
            if left_s <= 0 or restarts > _MOST_RESTARTS:
                scores.setdefault(place, RewardFailure(f"no time was left for it beside {len(hung)} that hung"))
                continue
            share = 1 / (len(queue) + 1) if place in hung else _SHARE
            began = time.monotonic()
            try:
                answer = self._function.call([captions[place]], [states[place]], left_s * share)
            except RewardError as error:
                scores[place] = RewardFailure(str(error))
                left_s -= time.monotonic() - began
                continue
            left_s -= answer.seconds
            if not isinstance(answer.scores, Lost):
                scores[place] = _score(answer.scores[0])
                continue
            scores[place] = RewardFailure(answer.scores.reason)
            restarts += 1
            if answer.scores.hung and place not in hung:
                hung.add(place)
                queue.append(place)
        return [scores[place] for place in range(len(captions))]


def _score(value: float | str) -> Score:
    if isinstance(value, str):
        return RewardFailure(value)
    return RewardBreakdown(value, {_FIGURE: value}, {_FIGURE: 1.0})
