from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest

from tests.unit.cli.program import Patch

TEXT = """\
run: {name: demo, root: ROOT}
model: {path: builtin:tiny-llava}
data: {train: data/train, scenes: {train: 40, eval: 4}}
sft: {steps: 20}
learner: {steps: 10, groups_per_step: 8}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT.replace("ROOT", str(tmp_path / "runs")))
    return path


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Replaces a function of the package by a mock that refuses what its signature refuses."""

    def patch(place: str, **behaviour: Any) -> Mock:
        module, _, name = place.rpartition(".")
        mock: Mock = create_autospec(getattr(importlib.import_module(module), name), **behaviour)
        monkeypatch.setattr(place, mock)
        return mock

    return patch
