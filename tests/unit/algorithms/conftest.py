from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.learner.worlds import tiny_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")
