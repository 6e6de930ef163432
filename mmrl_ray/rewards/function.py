"""A user's own function as a reward part: `fn(captions, states, **kwargs)` gives one number a caption."""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmrl_ray.config.reward import Modality
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, RewardError
from mmrl_ray.rewards.base import RewardBreakdown
from mmrl_ray.rewards.checks import check_pairs
from mmrl_ray.rewards.state import state_value

_FIGURE = "value"


class FunctionReward:
    """Calls `module:function` with captions and, for each, the state of one modality.

    The function is imported where the reward is made, so that a wrong path ends the run before it begins. It travels
    to workers by its path and is imported there at the first call.
    """

    def __init__(self, path: str, state: Modality, kwargs: Mapping[str, Any]) -> None:
        """`state` is what the function is given: see `state_value`.

        Raises:
            ConfigError: the module cannot be imported, has no such function, or that does not take these arguments.
        """
        self._path = path
        self._state: Modality = state
        self._kwargs = dict(kwargs)
        self._function: Callable[..., Any] | None = load_function(path, self._kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption, in order; see `RewardFn`. Whatever the function raises comes out as it is.

        Raises:
            RewardError: it returned anything else than one finite number a caption.
            ConfigError: it cannot be imported in this process.
        """
        check_pairs(samples, captions)
        if self._function is None:
            self._function = load_function(self._path, self._kwargs)
        states = [state_value(sample, self._state) for sample in samples]
        values = self._checked(self._function(list(captions), states, **self._kwargs), len(captions))
        return [RewardBreakdown(value, {_FIGURE: value}, {_FIGURE: 1.0}) for value in values]

    def _checked(self, returned: Any, expected: int) -> list[float]:
        found = returned.tolist() if hasattr(returned, "tolist") else returned  # an array of NumPy, a tensor
        if not isinstance(found, list | tuple):
            raise RewardError(f"{self._path} returned {type(returned).__name__}; return a list of one number a caption")
        if len(found) != expected:
            raise RewardError(f"{self._path} returned {len(found)} numbers for {expected} captions")
        for place, value in enumerate(found):
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise RewardError(f"{self._path} returned {value!r} for caption {place}, which is no finite number")
        return [float(value) for value in found]


def load_function(path: str, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that `module:function` names, if it can be called with captions, states and `kwargs`.

    Raises:
        ConfigError: it cannot.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be imported ({type(error).__name__}: {error}): install the module on every node, or name "
            "its folder in PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"{path}: module {module} has no function {name!r}")
    try:
        inspect.signature(found).bind([], [], **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"{path} cannot be called as {name}(captions, states, **{sorted(kwargs)}): {error}; fix its arguments or "
            "`kwargs`"
        ) from error
    except ValueError:
        pass  # a builtin that tells nothing of its arguments
    return found
