"""Where a run would be tracked, and whether it can be: for a dry run and `mmrl check`. Nothing is begun or written."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mmrl_ray.config import Config
from mmrl_ray.errors import TrackerError
from mmrl_ray.run_records.run_dir import run_location
from mmrl_ray.tracking.process import checked
from mmrl_ray.tracking.registry import options_of
from mmrl_ray.tracking.run import about_of


@dataclass(frozen=True, slots=True)
class Place:
    """Of one tracker."""

    tracker: str
    where: str
    """In words."""
    error: TrackerError | None = None
    """Why it cannot be used here."""

    @property
    def told(self) -> str:
        """Where the run will be found, or why not."""
        return self.where if self.error is None else str(self.error)


def places_of(cfg: Config) -> list[Place]:
    """Of each tracker; all are asked at once, each in a process of its own."""
    location = run_location(cfg.run.root, cfg.run.name)
    folder = None if "://" in location else location

    def look(name: str) -> Place:
        if name == "tensorboard" and folder is None:
            return Place(name, f"nowhere: its files need a run.root on this machine, not {cfg.run.root}")
        try:
            about, options = about_of(cfg, folder), options_of(cfg.tracking, name)
            return Place(name, checked(name, options, about, cfg.tracking.timeout_s))
        except TrackerError as error:
            return Place(name, "nowhere", error)

    with ThreadPoolExecutor(max(1, len(cfg.tracking.to))) as pool:
        return list(pool.map(look, cfg.tracking.to))


def tracking_lines(cfg: Config, places: list[Place]) -> Iterator[str]:
    """A line each, and what is looked at while the run runs."""
    for place in places:
        yield f"{place.tracker:<11} {place.where}"
    tracking = cfg.tracking
    if tracking.samples_every is None:
        yield "pictures    none: tracking.samples_every is null"
    else:
        fixed = 0 if cfg.agent is not None else tracking.fixed_pictures
        counts = f"{fixed} fixed and {tracking.fresh_pictures} fresh ones"
        yield f"pictures    every {tracking.samples_every} steps, {counts}, also in mmrl status --watch"
