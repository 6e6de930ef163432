"""Trackers of a user's, good and bad, which write down what they hear. Their processes import this file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl_ray.errors import TrackerError
from mmrl_ray.tracking.base import About, Table, Tracker


class Diary(Tracker):
    """A line a call. `at` names a step on which `how` goes wrong, once or for as long as a file `broken` is there."""

    def __init__(self, about: About, *, file: str, at: int = -1, how: str = "", broken: str = "") -> None:
        super().__init__(about)
        self._file, self._at, self._how, self._broken = Path(file), at, how, broken

    def check(self) -> str:
        self._refuse()
        return f"a diary at {self._file.name}"

    def open(self) -> str:
        self._refuse()
        self._write("open", self.about.id, self.about.config["learner"]["steps"])
        return self.about.id or "diary-7"

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        self._refuse()
        if step == self._at:
            self._go_wrong()
        self._write("metrics", step, dict(figures))

    def table(self, name: str, step: int, table: Table) -> None:
        self._write("table", step, name, table.texts(), [len(picture.png) > 0 for picture in table.pictures()])

    def histogram(self, name: str, step: int, values: Sequence[float]) -> None:
        self._write("histogram", step, name, list(values))

    def summary(self, figures: Mapping[str, Any]) -> None:
        self._write("summary", dict(figures))

    def artifact(self, name: str, kind: str, path: Path) -> None:
        self._write("artifact", name, kind, sorted(p.name for p in path.iterdir()) if path.is_dir() else path.name)

    def close(self, failed: bool) -> None:
        self._write("close", failed)

    def _go_wrong(self) -> None:
        secret = os.environ["DIARY_API_KEY"]
        if self._how == "raises":
            print(f"the key is {secret}", flush=True)
            raise ValueError(f"no such step, by key {secret}, at https://me:{secret}@host/x?token=abc")
        once = self._file.with_suffix(f".{self._how}")
        if once.exists():
            return
        once.touch()
        if self._how == "hangs":
            time.sleep(1000)
        if self._how == "dies":
            os._exit(3)
        if self._how == "forks" and os.fork() == 0:
            return

    def _refuse(self) -> None:
        if self._broken and Path(self._broken).exists():
            raise TrackerError("the diary is out of reach: find it")

    def _write(self, *what: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(what) + "\n")


class Reticent(Tracker):
    """Overrides nothing."""


class NoTracker:
    """Of another kind."""
