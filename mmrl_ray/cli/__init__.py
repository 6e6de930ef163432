"""`mmrl …`: parses the command line, then imports what the command needs.

Nothing heavy is imported at the top: `mmrl --help` and `mmrl config schema` answer at once. Exit codes: 0 done, 1 a
failure, 2 a wrong config or command line (of `mmrl check`: any failure), 130 interrupted.
"""

import atexit
import os

# Read when torch is loaded, which commands do later; see `training/cluster.py`.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# These register their commands, in the order in which help lists them.
from mmrl_ray.cli import training  # noqa: F401

# isort: split
from mmrl_ray.cli import data, jobs, serving  # noqa: F401
from mmrl_ray.cli.program import app
from mmrl_ray.processes import leave

__all__ = ["app", "main"]


def main() -> None:
    """The `mmrl` program, which ends by `processes.leave`."""
    code = 1
    atexit.register(lambda: leave(code))
    try:
        app()
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        raise
