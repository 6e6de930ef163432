"""`run:` — the name of a run and where it lies."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmrl_ray.config.base import Section


class RunSection(Section):
    """Names a run; every random choice in it derives from `seed`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Folder name of the run under `root`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice of the run derives from it."""
    root: str = "runs"
    """Folder, or any pyarrow.fs URI, that every node sees."""
    log_format: Literal["text", "json"] = "text"
    """What the log lines of all its processes are: text for people, or a JSON object each."""
