"""Trackio: a local store (`trackio show`), or a Space on the Hub that gets the same."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from PIL import Image

from mmrl_ray.errors import TrackerError
from mmrl_ray.tracking.base import About, Picture, Table, Tracker


class Trackio(Tracker):
    """A run of a project; its id is its name there."""

    def __init__(self, about: About, *, space: str | None) -> None:
        import trackio

        super().__init__(about)
        self._trackio: Any = trackio
        self._space = space or os.environ.get("TRACKIO_SPACE_ID")
        self._run: Any = None

    def check(self) -> str:
        """Where it is kept.

        Raises:
            TrackerError: a Space is named, and there is no token for it.
        """
        if self._space is None:
            return f"{self._trackio.TRACKIO_DIR}, project {self.about.project}"
        if get_token() is None:
            raise TrackerError(
                f"tracking: trackio: Space {self._space} needs a token of the Hub: `hf auth login`, or set HF_TOKEN; "
                "without tracking.trackio.space all of it stays on this machine"
            )
        return f"Space {self._space}, project {self.about.project}"

    def open(self) -> str:
        """Begins the run, or goes on with the one of that name."""
        id = self.about.id or f"{self.about.run}-{uuid.uuid4().hex[:6]}"
        self._run = self._trackio.init(
            self.about.project,
            name=id,
            resume="allow",
            space_id=self._space,
            config=dict(self.about.config),
            embed=False,
        )
        return id

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """Of one step."""
        self._run.log(dict(figures), step=step)

    def table(self, name: str, step: int, table: Table) -> None:
        """A `trackio.Table` with pictures."""
        rows = [[self._image(cell) if isinstance(cell, Picture) else cell for cell in row] for row in table.rows]
        self._run.log({name: self._trackio.Table(columns=list(table.columns), data=rows)}, step=step)

    def histogram(self, name: str, step: int, values: Sequence[float]) -> None:
        """A `trackio.Histogram`."""
        if values:
            self._run.log({name: self._trackio.Histogram(list(values))}, step=step)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Below `final/`, at the last step."""
        self._run.log({f"final/{name}": value for name, value in figures.items()}, step=figures.get("steps"))

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """Called by the run and its name."""
        made = self._trackio.Artifact(f"{name}-{self._run.name}", type=kind)
        if path.is_dir():
            made.add_dir(str(path))
        else:
            made.add_file(str(path))
        self._run.log_artifact(made)

    def close(self, failed: bool) -> None:
        """Returns when all of it is written."""
        self._run.finish()

    def _image(self, picture: Picture) -> Any:
        with Image.open(io.BytesIO(picture.png)) as image:
            return self._trackio.Image(image.convert("RGB"), caption=picture.caption)
