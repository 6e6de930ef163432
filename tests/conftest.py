"""For every test, and the programs that tests start."""

import atexit
import os
import sys

import pytest

# No test depends on the hub, which would be asked again and again for half a minute where it cannot be reached. Read
# when the hub's library is imported, so it comes before any test's imports.
os.environ["HF_HUB_OFFLINE"] = "1"

_SESSIONS: list[pytest.Session] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    """See `_end`."""
    _SESSIONS.append(session)


def _end() -> None:
    """Ends without the interpreter taking itself apart, as the `mmrl` program does: native threads that Ray has left
    crash there now and then, and all tests that passed are a failure."""
    if _SESSIONS:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(_SESSIONS[0].exitstatus))


atexit.register(_end)  # what is registered first is called last
