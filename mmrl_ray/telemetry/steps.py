"""A step's line of `metrics.jsonl` as measurements: every number of it goes somewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrl_ray.config.reward import RESERVED_NAMES
from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.meter import Meter
from mmrl_ray.telemetry.table import Metric

_GAUGES: Mapping[str, Metric] = {
    "policy_version": table.POLICY_VERSION,
    "reward/mean": table.REWARD_MEAN,
    "reward/std": table.REWARD_STD,
    "loss": table.LOSS,
    "kl": table.KL,
    "entropy": table.ENTROPY,
    "grad_norm": table.GRAD_NORM,
    "lr": table.LEARNING_RATE,
    "sampler_gap/max": table.SAMPLER_GAP_MAX,
    "sampler_gap/mean": table.SAMPLER_GAP_MEAN,
    "staleness/mean": table.STALENESS_MEAN,
    "staleness/max": table.STALENESS_MAX,
    "completion/length_mean": table.COMPLETION_LENGTH,
    "completion/finish_fraction": table.COMPLETION_FINISHED,
    "shared_prefix": table.SHARED_PREFIX,
}
_COUNTERS: Mapping[str, Metric] = {
    "masked": table.MASKED_GROUPS,
    "masked_captions": table.MASKED_CAPTIONS,
    "dropped": table.DROPPED_GROUPS,
    "quarantined": table.QUARANTINED_SAMPLES,
}


def measure_step(meter: Meter, line: Mapping[str, Any]) -> None:
    """What a step's line says, but for its `step`."""
    for name, value in line.items():
        if name != "step" and isinstance(value, int | float):
            _measure(meter, name, float(value))


def _measure(meter: Meter, name: str, value: float) -> None:
    group, _, rest = name.partition("/")
    if name in _GAUGES:
        meter.set(_GAUGES[name], value)
    elif name in _COUNTERS:
        meter.add(_COUNTERS[name], value)
    elif name == "seconds/step":
        meter.observe(table.STEP_SECONDS, value)
    elif group == "seconds":
        meter.add(table.PHASE_SECONDS, value, phase=rest)
    elif group == "loss":
        meter.set(table.LOSS_TERM, value, term=rest)
    elif group == "reward" and rest not in RESERVED_NAMES:
        meter.set(table.REWARD_PART, value, part=rest)
    else:
        meter.set(table.FIGURE, value, name=name)
