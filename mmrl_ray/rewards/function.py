"""A user's own function as a reward part: `fn(captions, states, **kwargs)` gives one number a caption.

It runs in a process of its own, where it can be ended whatever it does (`IsolatedFunction`). One is started for each
function and keeps what it loaded at its import from call to call; a batch costs the pickling of its states beside the
round trip. A process that ran past its deadline is killed, and the next call starts another one (`ChildProcess`). What
it prints goes to the owner's standard error.

Where a batch hangs or ends that process, its captions are tried one by one, so that only those that do it have no
score:

    batch, timeout_s ──hangs──▶ each caption, a quarter of what is left of another timeout_s ──hangs──▶ to the end
                                of the queue ──▶ those that are left, all of what is left
"""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_ray.config.reward import Modality
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, ProcessError, RewardError
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure, Score
from mmrl_ray.own_code import sent_folder
from mmrl_ray.processes import ChildProcess, Lost
from mmrl_ray.rewards.base import check_pairs, state_value

TIMEOUT_S = 60.0
_FIGURE = "value"
_SHARE = 0.25
_MOST_RESTARTS = 8
"""After so many captions that hang there is no hope for the others, and each start may load a model."""
START_TIMEOUT_S = 300.0
"""For a function's module to be imported, with whatever models it loads."""
_WORKER = "mmrl_ray.rewards.child:work"


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


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one call."""

    scores: list[float | str] | Lost
    """A number, or why there is none, for each caption."""
    seconds: float
    """From the call's turn, the process being there, to its end."""


class IsolatedFunction:
    """`module:function` of anybody's, called in its own process. Pickles as its path; one call at a time."""

    def __init__(self, path: str, kwargs: Mapping[str, Any], code: str | None = None) -> None:
        """`code` is the folder whose modules come before those that are installed; the working directory else."""
        self.path = path
        self._kwargs = dict(kwargs)
        self._code = code
        self._process: ChildProcess | None = None
        self._turn = threading.Lock()

    def start(self) -> None:
        """Starts the process, unless it runs.

        Raises:
            ConfigError: the function cannot be imported, within `START_TIMEOUT_S`, or not be called with its arguments.
        """
        if self._process is None or not self._process.alive:
            self._process = self._started()

    def call(self, captions: Sequence[str], states: Sequence[Any], timeout_s: float) -> Answer:
        """What the function returns within `timeout_s`.

        The time until it is this call's turn, and until the process is there, does not count.

        Raises:
            RewardError: the function raised, or returned something else than one value a caption; or other calls kept
                the process busy for longer than `START_TIMEOUT_S`.
            ConfigError: as `start`.
        """
        if not self._turn.acquire(timeout=START_TIMEOUT_S):
            raise RewardError(f"{self.path} was busy with other captions for {START_TIMEOUT_S:g} s")
        try:
            self.start()
            assert self._process is not None
            began = time.monotonic()
            found = self._process.ask(pickle.dumps((list(captions), list(states))), timeout_s=timeout_s)
            seconds = time.monotonic() - began
        finally:
            self._turn.release()
        if isinstance(found, Lost):
            return Answer(found, seconds)
        answer = json.loads(found)
        if "error" in answer:
            raise RewardError(answer["error"])
        return Answer(answer["scores"], seconds)

    def close(self) -> None:
        """Ends the process; a later call starts another one."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _started(self) -> ChildProcess:
        try:
            process = ChildProcess(_WORKER, self.path)
        except ProcessError as error:
            raise RewardError(str(error)) from error
        answer = process.ask(pickle.dumps((self.path, self._kwargs, _folder(self._code))), timeout_s=START_TIMEOUT_S)
        if isinstance(answer, Lost):
            raise ConfigError(
                f"{self.path} cannot be imported: {answer.reason}; a function's module loads within that time"
            )
        if "error" in (told := json.loads(answer)):
            process.end()
            raise ConfigError(told["error"])
        return process

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "kwargs": self._kwargs, "code": self._code}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["path"], state["kwargs"], state["code"])  # type: ignore[misc]


def _folder(code: str | None) -> str:
    """Where the user's modules are: what a job brought, else the folder itself; empty for the working directory."""
    if sent := sent_folder():
        return sent
    return "" if code is None else str(Path(code).expanduser())
