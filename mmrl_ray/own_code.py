"""Classes of a user's own, named in a config as `module:Class`: where their modules lie, and how one is found."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import mmrl_ray
from mmrl_ray.errors import MMRLError, first_line, raised_at

T = TypeVar("T")
SENT_CODE = "reward_code"
"""Beside the package, where a job brought both: the user's own modules."""


def sent_folder() -> str | None:
    """Of the modules that a job brought; None where it brought none."""
    sent = Path(mmrl_ray.__file__).parents[1] / SENT_CODE
    return str(sent) if sent.is_dir() else None


def find_class(path: str, kind: type[T], *, what: str, error: type[MMRLError]) -> type[T]:
    """The class behind `module:Class`, a kind of `kind`.

    It is looked for among what a job brought, then in the working directory, and both come after what is installed.

    Args:
        path: of the class.
        kind: what it has to derive from.
        what: whatever it is for, the first words of messages.
        error: what is raised.

    Raises:
        MMRLError: an `error`: it cannot be imported, or is no `kind`.
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise error(f"{what} {path} is not module:Class: write the module as in an import, without `.py`")
    folders = [*([sent] if (sent := sent_folder()) else []), os.getcwd()]
    sys.path.extend(folder for folder in folders if folder not in sys.path)
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as problem:
        script = "; what only a script does belongs below `if __name__ == '__main__':`"
        where = raised_at(problem, without=lambda file: file == __file__)
        raise error(
            f"{what} {path} cannot be imported ({first_line(problem)}{where}): it is looked for in the working "
            f"directory, here {os.getcwd()}, and among what is installed"
            f"{script if isinstance(problem, SystemExit) else ''}"
        ) from problem
    found = getattr(loaded, name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise error(
            f"{what} {path}: {module} has no class {name!r} that is an {kind.__module__}.{kind.__name__}"
            f"{_told_other(loaded, folders)}"
        )
    return found


def _told_other(loaded: ModuleType, folders: Sequence[str]) -> str:
    """That a module came from elsewhere than one of that name in the user's folders."""
    file = getattr(loaded, "__file__", None)
    for folder in folders:
        mine = Path(folder, *loaded.__name__.split(".")).with_suffix(".py")
        if mine.is_file() and not (file and mine.samefile(file)):
            return f": it is {file or 'built in'}, which comes before {mine}: choose another name for yours"
    return ""
