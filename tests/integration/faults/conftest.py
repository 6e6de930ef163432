from __future__ import annotations

from tests.integration.rollouts.conftest import local_ray

__all__ = ["local_ray"]
