"""Calls `mmrl` inside the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import Mock

from typer.testing import CliRunner, Result

from mmrl_ray.cli import app

Patch = Callable[..., Mock]


def mmrl(*arguments: object) -> Result:
    """What the program printed, and its exit code."""
    return CliRunner().invoke(app, [str(a) for a in arguments])
