"""What is sent with a job: this very program, and the resolved config. Never data, weights or an environment.

    config.yaml        the config, resolved; not with a resume, which takes the one of its run folder
    mmrl_ray/          the package as it is installed here
    reward_code/       of the folder with the user's own reward functions or algorithm, where a config has some: its
                       Python files

The job works in that folder, so that its driver and its workers run the submitter's code, whatever the cluster's image
has of it. Everything else (Python, Ray, torch, …) is the cluster's own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mmrl_ray
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.errors import JobError
from mmrl_ray.rewards.isolated import SENT_CODE

CONFIG_FILE = "config.yaml"
MAX_BYTES = 16 * 2**20
"""The package has about one megabyte. Ray keeps what is sent in the head node's memory."""
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_NAMED = 3
_MOST_FILES = 20_000
"""In a folder of reward functions, whatever they are: more are hardly meant."""


@contextmanager
def packed(
    config: str | None, *, source: Path | None = None, code: str = "", max_bytes: int = MAX_BYTES
) -> Iterator[Path]:
    """A folder of exactly what is sent, gone afterwards.

    Args:
        config: text of `config.yaml`.
        source: the package's folder; the one that runs here by default.
        code: folder of the user's own modules, see `own_code`.
        max_bytes: more is not sent.

    Raises:
        JobError: it is larger than that, or cannot be read; the message names what is largest in it.
    """
    source = source or Path(mmrl_ray.__file__).parent
    with tempfile.TemporaryDirectory(prefix="mmrl-job-") as scratch:
        folder = Path(scratch)
        try:
            _refuse_large(
                source, _files_of(source), max_bytes, "keep data, weights and runs out of the package's folder"
            )
            shutil.copytree(source, folder / "mmrl_ray", ignore=_LEFT_OUT)
            if code:
                _copy_code(Path(code), folder / SENT_CODE, max_bytes)
        except (OSError, shutil.Error) as error:
            raise JobError(f"{source} cannot be packed for the job: {error}") from error
        if config is not None:
            (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        yield folder


def own_code(reward: RewardSection, algorithm: str = "") -> str:
    """The folder that a job needs for the user's modules; empty where they are installed, or there are none.

    Args:
        reward: with absolute paths.
        algorithm: of the config; `module:Class` is a module, too.
    """
    folder = Path(reward.code or ".").absolute()
    paths = [part.path for part in reward.functions.values()] + ([algorithm] if ":" in algorithm else [])
    tops = {path.partition(":")[0].partition(".")[0] for path in paths}
    return str(folder) if any((folder / top).is_dir() or (folder / f"{top}.py").is_file() for top in tops) else ""


def _copy_code(source: Path, target: Path, max_bytes: int) -> None:
    """Python files, and whatever lies beside an `__init__.py`: the data that a package brings for itself."""
    files = []
    for seen, path in enumerate(_files_of(source)):
        if seen > _MOST_FILES:
            raise JobError(f"{source} has more than {_MOST_FILES:,} files: name a smaller folder in reward.code")
        if path.suffix == ".py" or (path.parent / "__init__.py").is_file():
            files.append(path)
    _refuse_large(source, files, max_bytes, "name a folder with your reward functions alone in reward.code")
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _files_of(folder: Path) -> Iterator[Path]:
    """All but hidden ones, bytecode, virtual environments, and this package where it lies among others."""
    for where, folders, files in os.walk(folder):
        here = Path(where)
        folders[:] = sorted(
            name
            for name in folders
            if not _is_left_out(Path(name))
            and not (here / name / "pyvenv.cfg").is_file()
            and not (here / name).samefile(Path(mmrl_ray.__file__).parent)
        )
        yield from (here / name for name in sorted(files) if not _is_left_out(Path(name)))


def _refuse_large(source: Path, files: Iterable[Path], max_bytes: int, remedy: str) -> None:
    sizes = {path: path.stat().st_size for path in files}
    total = sum(sizes.values())
    if total > max_bytes:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:_NAMED]
        named = ", ".join(f"{path.relative_to(source)} ({sizes[path]:,} bytes)" for path in largest)
        raise JobError(
            f"{source} has {total:,} bytes, and a job takes {max_bytes:,} at most: the largest are {named}; {remedy}"
        )


def _is_left_out(path: Path) -> bool:
    return any(part == "__pycache__" or part.startswith(".") for part in path.parts) or path.suffix == ".pyc"
