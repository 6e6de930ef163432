"""Small parts of a learner's step: a clock by phase, the flat gradient, the check for NaN."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mmrl_ray.errors import NonFiniteError
from mmrl_ray.experience.carriers import PlannedGroup

_SHOWN_SAMPLES = 8


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(
            ("seconds/fetch", "seconds/forward_backward", "seconds/reduce", "seconds/optimizer"), 0.0
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def flat_gradient(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """One buffer whose pieces are the parameters' `.grad`: backward adds into it, one reduction sums it over ranks."""
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


def check_finite(metric: str, value: float, step: int, groups: Sequence[PlannedGroup]) -> None:
    """Stops a step whose `metric` is NaN or infinite.

    Raises:
        NonFiniteError: it is; the message names the step, the metric and the samples.
    """
    if math.isfinite(value):
        return
    ids = [group.sample_id for group in groups]
    more = f" and {len(ids) - _SHOWN_SAMPLES} more" if len(ids) > _SHOWN_SAMPLES else ""
    raise NonFiniteError(
        f"step {step}: {metric} is {value} on samples {', '.join(ids[:_SHOWN_SAMPLES])}{more}; this update was "
        "not made and the last checkpoint is good: lower learner.lr, or look at these samples"
    )
