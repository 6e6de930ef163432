"""For every test, and the programs that tests start."""

import atexit
import os

import pytest

from mmrl_ray.processes import leave

# No test depends on the hub, which would be asked again and again for half a minute where it cannot be reached. Read
# when the hub's library is imported, so it comes before any test's imports.
os.environ["HF_HUB_OFFLINE"] = "1"

_SESSIONS: list[pytest.Session] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    """Keeps the session, whose exit code `_end` hands on."""
    _SESSIONS.append(session)


def _end() -> None:
    """As the `mmrl` program ends: native threads that Ray has left would crash, and tests that passed be a failure."""
    if _SESSIONS:
        leave(int(_SESSIONS[0].exitstatus))


atexit.register(_end)  # what is registered first is called last
