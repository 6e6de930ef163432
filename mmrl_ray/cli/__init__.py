"""`mmrl …`: parses the command line, then imports what the command needs.

Nothing heavy is imported at the top: `mmrl --help` and `mmrl config schema` answer at once. Exit codes: 0 done, 1 a
failure, 2 a wrong config or command line (of `mmrl check`: any failure), 130 interrupted.
"""

import os

# Read when torch is loaded, which commands do later; see `runs/cluster.py`.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# These register their commands, in the order in which help lists them.
from mmrl_ray.cli import training  # noqa: F401

# isort: split
from mmrl_ray.cli import data, deploy, jobs, keys, preferences, reward, scaling, serving  # noqa: F401
from mmrl_ray.cli.groups import app

__all__ = ["app", "main"]


def main() -> None:
    """The `mmrl` program."""
    app()
