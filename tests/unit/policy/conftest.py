from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from tests.support.tiny_models import build_family, section_of


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads, and results do not depend on how many cores are free."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of the named family, made once a session: read only."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = build_family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def load(family_folder: Callable[[str], Path]) -> Callable[..., Policy]:
    """A fresh policy of the named family (float32, CPU): a copy of one that is loaded once, which takes an eighth."""
    loaded: dict[str, Policy] = {}

    def load_fresh(name: str = "llava", **section: Any) -> Policy:
        asked = section_of(name, family_folder(name), **section)
        key = asked.model_dump_json()
        if key not in loaded:
            loaded[key] = load_policy(asked, device="cpu")
        return copy.deepcopy(loaded[key])

    return load_fresh


@pytest.fixture
def copied(family_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's folder that a test may damage."""

    def copy(name: str = "llava") -> Path:
        return Path(shutil.copytree(family_folder(name), tmp_path / name))

    return copy
