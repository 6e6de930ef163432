"""Weights & Biases, online or in its offline mode, whose folder lies in the run's.

Every row has its own `step`, which is the x axis of all charts: evaluations come later than the steps they are of, and
W&B's own counter would drop them.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmrl_ray.errors import TrackerError, first_line
from mmrl_ray.tracking.base import About, Picture, Table, Tracker

_CHECK_S = 10
_OFFLINE = "set WANDB_MODE=offline, and send it later with `wandb sync`"


class Wandb(Tracker):
    """A run of a project."""

    def __init__(self, about: About, *, entity: str | None, group: str | None, tags: list[str], mode: str | None):
        import wandb

        super().__init__(about)
        self._wandb: Any = wandb
        self._entity, self._group, self._tags = entity, group, tags
        self._mode = mode or os.environ.get("WANDB_MODE") or "online"
        self._run: Any = None

    def check(self) -> str:
        """Asks the server who the key belongs to.

        Raises:
            TrackerError: no key, one that is refused, or no network.
        """
        if self._mode != "online":
            return f"{self._mode}, in {self._folder() or 'the working directory'}/wandb"
        address = self._wandb.setup().settings.base_url
        try:
            who = self._wandb.Api(timeout=_CHECK_S).viewer
        except self._wandb.errors.UsageError as error:
            raise TrackerError(
                f"tracking: wandb has no key for {address}: `wandb login`, or set WANDB_API_KEY; without an account, "
                f"{_OFFLINE}"
            ) from error
        except Exception as error:
            raise TrackerError(
                f"tracking: wandb: {address} is out of reach, or refuses the key ({first_line(error)}): mend that, or "
                f"{_OFFLINE}"
            ) from error
        name = self._entity or getattr(who, "entity", None) or getattr(who, "username", "")
        return f"{address}, {name}/{self.about.project}"

    def open(self) -> str:
        """Begins the run, or goes on with the one of that id."""
        id = self.about.id or uuid.uuid4().hex[:8]
        self._run = self._wandb.init(
            project=self.about.project,
            entity=self._entity,
            group=self._group,
            tags=self._tags or None,
            name=self.about.run,
            id=id,
            resume="allow",
            mode=self._mode,
            dir=self._folder(),
            config=dict(self.about.config),
            allow_val_change=True,
            settings=self._wandb.Settings(console="off"),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return id

    def next_step(self) -> int | None:
        """As the server has it: a step's `policy_version` is the one after it."""
        if self._mode != "online" or not self._run.resumed:
            return None
        version = self._run.summary.get("policy_version")
        return int(version) if isinstance(version, int | float) else None

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """A row."""
        self._run.log({"step": step, **figures})

    def table(self, name: str, step: int, table: Table) -> None:
        """A `wandb.Table`, and the same pictures as a gallery with their captions."""
        rows = [[self._image(cell) if isinstance(cell, Picture) else cell for cell in row] for row in table.rows]
        made = self._wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
        pictures = [self._image(picture) for picture in table.pictures()]
        self._run.log({"step": step, name: made, **({f"{name}/pictures": pictures} if pictures else {})})

    def histogram(self, name: str, step: int, values: Sequence[float]) -> None:
        """A `wandb.Histogram`."""
        if values:
            self._run.log({"step": step, name: self._wandb.Histogram(list(values))})

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Below `final/`."""
        self._run.summary.update({f"final/{name}": value for name, value in figures.items()})

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """Called by the run's id and its name; equal content is no new version."""
        made = self._wandb.Artifact(f"{name}-{self._run.id}", type=kind)
        if path.is_dir():
            made.add_dir(str(path))
        else:
            made.add_file(str(path))
        logged = self._run.log_artifact(made)
        if self._mode == "online":
            logged.wait()

    def close(self, failed: bool) -> None:
        """Returns when all of it is sent or written."""
        self._run.finish(exit_code=int(failed))

    def _folder(self) -> str | None:
        """Where `wandb/` goes: as the user says, or into the run's folder."""
        return os.environ.get("WANDB_DIR") or self.about.folder

    def _image(self, picture: Picture) -> Any:
        with Image.open(io.BytesIO(picture.png)) as image:
            return self._wandb.Image(image.convert("RGB"), caption=picture.caption)
