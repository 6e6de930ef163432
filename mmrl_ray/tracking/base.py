"""What a tracker is. Subclass `Tracker`, name it in a config as `module:Class`, and override what you want to hear of.

    check ──▶ open ──▶ metrics · table · histogram, in the order of the run ──▶ artifact ──▶ close
                  ▲                              │
                  └── again, with the same id ───┘ after a resume, or when its process had to be ended

An instance lives in a process of its own: what it raises, hangs on or leaks is no harm to the run. The calls come from
one thread, one at a time. What raises is called again a little later, and left out in the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrl_ray.errors import TrackerError

__all__ = ["SIDE", "About", "Cell", "Picture", "Table", "Tracker", "TrackerError"]


@dataclass(frozen=True, slots=True)
class About:
    """The run that a tracker is told of."""

    run: str
    """Its name."""
    project: str
    """Of `tracking.project`."""
    config: Mapping[str, Any]
    """The whole config, resolved, as plain values."""
    folder: str | None
    """The run's folder; None where it is not on this machine's file system."""
    id: str | None = None
    """What `Tracker.open` gave the first time; None then."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture in a cell of a table."""

    png: bytes
    """At most `SIDE` pixels a side."""
    caption: str = ""


SIDE = 384
"""Pixels that pictures are scaled down to: a table is for looking at."""
Cell = str | float | int | None | Picture


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of equal length, a value for each column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]] = field(default_factory=list)

    def texts(self) -> list[dict[str, Any]]:
        """Without the pictures: an object a row."""
        return [
            {
                name: cell
                for name, cell in zip(self.columns, row, strict=True)
                if cell is not None and not isinstance(cell, Picture)
            }
            for row in self.rows
        ]

    def pictures(self) -> list[Picture]:
        """Those of all rows, in order."""
        return [cell for row in self.rows for cell in row if isinstance(cell, Picture)]


class Tracker:
    """Hears of one run. Every method may raise, or do nothing, which is what it does here."""

    rewinds: bool = False
    """Whether `rewind` takes back what was told. Without it, a step that is done again after a resume is not told
    again: nothing of it stands there twice."""

    def __init__(self, about: About, **options: Any) -> None:
        """`options` are of its section of `tracking:`, `tracking.own` for a user's class. `self.about` is replaced
        before `open`: by then it has the `id`, if there is one, and the config as it is kept.

        Imports of the tracker's own library belong into methods, or into the file of a user's class.
        """
        self.about = about
        if options:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(options)}")

    def check(self) -> str:
        """Says where the run will be found, in a few words, before anything begins.

        Raises:
            TrackerError: it cannot be used: no key, no network. Whatever else it raises is shown just so.
        """
        return ""

    def open(self) -> str | None:
        """Begins, or goes on with the run of `about.id`; returns the id by which it is found again."""
        return self.about.id

    def next_step(self) -> int | None:
        """The first step that is not there yet, where it can be asked; None where it cannot."""
        return None

    def rewind(self, step: int) -> None:
        """Takes back what was told of `step` and later ones, which are done again. See `rewinds`."""

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one step: finite numbers by name, such as `reward/mean`."""

    def table(self, name: str, step: int, table: Table) -> None:
        """Captions, with pictures: `samples`, or `eval/captions`; `step` counts finished steps."""

    def histogram(self, name: str, step: int, values: Sequence[float]) -> None:
        """All values of a step, such as each caption's reward; `step` counts finished steps."""

    def summary(self, figures: Mapping[str, Any]) -> None:
        """What the run came to: `status`, and measures by name."""

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """A file or folder of the run: `adapter` (of kind `model`), `report`."""

    def close(self, failed: bool) -> None:
        """The run has ended; when this returns, all of it is written or sent."""
