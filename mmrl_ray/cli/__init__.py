"""`mmrl …`: parses the command line, then imports what the command needs.

Nothing heavy is imported at the top: `mmrl --help` and `mmrl config schema` answer at once. Exit codes: 0 done, 1 a
failure, 2 a wrong config or command line (of `mmrl check`: any failure), 130 interrupted.
"""

import atexit
import logging
import os
import sys
from contextlib import suppress

# Read when torch is loaded, which commands do later; see `training/cluster.py`.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# These register their commands, in the order in which help lists them.
from mmrl_ray.cli import training  # noqa: F401

# isort: split
from mmrl_ray.cli import data, jobs, serving  # noqa: F401
from mmrl_ray.cli.program import app

__all__ = ["app", "main"]


def main() -> None:
    """The `mmrl` program.

    It ends without the interpreter taking itself apart: threads of Ray's and gRPC's that still run by then crash now
    and then, and a run that is whole would end with the code of a crash.
    """
    code = 1

    def end() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or nobody reads on
                stream.flush()
        os._exit(code)

    atexit.register(end)  # what is registered first is called last
    try:
        app()
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        raise
