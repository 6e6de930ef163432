"""What a policy replica's engine says about itself, for whoever measures it every few seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.meter import Meter, Totals

_COUNTERS = {
    "requests": table.POLICY_REQUESTS,
    "failed_requests": table.POLICY_FAILED,
    "tokens": table.POLICY_TOKENS,
}


def watch_engine(meter: Meter, stats: Callable[[], Mapping[str, float]]) -> None:
    """Has `meter` look at `Engine.stats`."""
    totals = Totals(meter)

    def look() -> None:
        found = stats()
        for name, metric in _COUNTERS.items():
            totals.reach(metric, found[name])
        totals.reach(table.POLICY_VISION, found["vision_cache_hits"], result="hit")
        totals.reach(table.POLICY_VISION, found["images_encoded"], result="miss")
        meter.set(table.POLICY_UNDER_WAY, found["waiting_requests"], state="waiting")
        meter.set(table.POLICY_UNDER_WAY, found["running_requests"], state="running")
        meter.set(table.POLICY_ROWS, found["running_rows"])
        meter.set(table.POLICY_CACHE, found["vision_cache_bytes"])

    meter.watch(look)
