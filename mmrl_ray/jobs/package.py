"""What is sent with a job: this very program, and the resolved config. Never data, weights or an environment.

    config.yaml        the config, resolved; not with a resume, which takes the one of its run folder
    mmrl_ray/          the package as it is installed here

The job works in that folder, so that its driver and its workers run the submitter's code, whatever the cluster's image
has of it. Everything else (Python, Ray, torch, …) is the cluster's own.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mmrl_ray
from mmrl_ray.errors import JobError

CONFIG_FILE = "config.yaml"
MAX_BYTES = 16 * 2**20
"""The package has about one megabyte. Ray keeps what is sent in the head node's memory."""
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_NAMED = 3


@contextmanager
def packed(config: str | None, *, source: Path | None = None, max_bytes: int = MAX_BYTES) -> Iterator[Path]:
    """A folder of exactly what is sent, gone afterwards.

    Args:
        config: text of `config.yaml`.
        source: the package's folder; the one that runs here by default.
        max_bytes: more is not sent.

    Raises:
        JobError: it is larger than that, or cannot be read; the message names what is largest in it.
    """
    source = source or Path(mmrl_ray.__file__).parent
    with tempfile.TemporaryDirectory(prefix="mmrl-job-") as scratch:
        folder = Path(scratch)
        try:
            _refuse_large(source, max_bytes)
            shutil.copytree(source, folder / "mmrl_ray", ignore=_LEFT_OUT)
        except (OSError, shutil.Error) as error:
            raise JobError(f"{source} cannot be packed for the job: {error}") from error
        if config is not None:
            (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        yield folder


def _refuse_large(source: Path, max_bytes: int) -> None:
    files = [path for path in source.rglob("*") if path.is_file() and not _is_left_out(path.relative_to(source))]
    sizes = {path: path.stat().st_size for path in files}
    total = sum(sizes.values())
    if total > max_bytes:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:_NAMED]
        named = ", ".join(f"{path.relative_to(source)} ({sizes[path]:,} bytes)" for path in largest)
        raise JobError(
            f"{source} has {total:,} bytes, and a job takes {max_bytes:,} at most: the largest are {named}; "
            "keep data, weights and runs out of the package's folder"
        )


def _is_left_out(path: Path) -> bool:
    return any(part == "__pycache__" or part.startswith(".") for part in path.parts) or path.suffix == ".pyc"
