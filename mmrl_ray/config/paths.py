"""Which keys of a config name places, and what they mean from another folder or another machine."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmrl_ray.config.base import Section
from mmrl_ray.config.reward import LearnedPart
from mmrl_ray.config.schema import Config
from mmrl_ray.errors import ConfigError

_BUILTIN = "builtin:"
_SQLITE = "sqlite:///"


def with_absolute_paths(cfg: Config) -> Config:
    """The same config, meaning the same files from whichever folder: that of a Ray worker, or of a later resume."""
    data: dict[str, Any] = {"train": _absolute(cfg.data.train)}
    if cfg.data.eval is not None:
        data["eval"] = _absolute(cfg.data.eval)
    if (preferences := cfg.data.preferences) is not None and (file := sqlite_file(preferences.store)) is not None:
        data["preferences"] = preferences.model_copy(update={"store": f"{_SQLITE}{_absolute(file)}"})
    if (rollouts := cfg.data.rollouts) is not None:
        data["rollouts"] = rollouts.model_copy(update={"run": _absolute(rollouts.run)})
    model = _absolute(cfg.model.path) if Path(cfg.model.path).expanduser().exists() else cfg.model.path
    sections: dict[str, Section] = {
        "run": cfg.run.model_copy(update={"root": _absolute(cfg.run.root)}),
        "model": cfg.model.model_copy(update={"path": model}),
        "data": cfg.data.model_copy(update=data),
    }
    learned = {name: part for name, part in cfg.reward.parts.items() if isinstance(part, LearnedPart)}
    if learned:
        parts = {name: part.model_copy(update={"model": _absolute(part.model)}) for name, part in learned.items()}
        sections["reward"] = cfg.reward.model_copy(update={"parts": {**cfg.reward.parts, **parts}})
    if cfg.sft is not None:
        sections["sft"] = cfg.sft.model_copy(update={"cache": _absolute(cfg.sft.cache)})
    return cfg.model_copy(update=sections)


def sqlite_file(url: str) -> str | None:
    """The file that an SQLite URL names; None of any other database."""
    return url.removeprefix(_SQLITE) if url.startswith(_SQLITE) else None


def local_paths(cfg: Config) -> dict[str, str]:
    """Paths of a file system, by the keys that name them; not the URIs, nor the ids of a hub."""
    places = {"run.root": cfg.run.root, "data.train": cfg.data.train}
    if cfg.data.eval is not None:
        places["data.eval"] = cfg.data.eval
    if cfg.data.preferences is not None and (file := sqlite_file(cfg.data.preferences.store)) is not None:
        places["data.preferences.store"] = file
    if cfg.data.rollouts is not None:
        places["data.rollouts.run"] = cfg.data.rollouts.run
    if _is_folder(cfg.model.path):
        places["model.path"] = cfg.model.path
    if cfg.sft is not None:
        places["sft.cache"] = cfg.sft.cache
    for name, part in cfg.reward.parts.items():
        if isinstance(part, LearnedPart):
            places[f"reward.parts.{name}.model"] = part.model
    return {key: place for key, place in places.items() if "://" not in place}


def refuse_unseen(cfg: Config, shared: Sequence[str], cluster: str) -> None:
    """Refuses paths that other machines would look for in vain.

    Args:
        cfg: with absolute paths.
        shared: absolute folders that the machines share, each under the same path.
        cluster: what errors call it.

    Raises:
        ConfigError: one line a path.
    """
    unseen = {key: path for key, path in local_paths(cfg).items() if not _is_below(path, shared)}
    if unseen:
        raise ConfigError(
            "\n".join(
                f"{key}={path} is a path of this machine, which {cluster} is not: {_remedy(key, path)}"
                for key, path in unseen.items()
            )
        )


def refuse_missing(cfg: Config) -> None:
    """Refuses paths that are not there, where the job will see the same files as this process.

    Raises:
        ConfigError: one line a path.
    """
    needed = {key: path for key, path in local_paths(cfg).items() if key not in ("run.root", "sft.cache")}
    if cfg.data.scenes is not None:  # the run makes them
        needed = {key: path for key, path in needed.items() if key not in ("data.train", "data.eval")}
    missing = {key: path for key, path in needed.items() if not Path(path).expanduser().exists()}
    if missing:
        raise ConfigError("\n".join(f"{key}={path} does not exist: check the path" for key, path in missing.items()))


def _remedy(key: str, path: str) -> str:
    shared_folder = "name a folder on storage that every node sees"
    what = {
        "run.root": "name storage that every node sees, such as --set run.root=s3://bucket/runs",
        "model.path": "name a hub id, or a folder on storage that every node sees",
        "sft.cache": shared_folder,
        "data.preferences.store": "name a PostgreSQL database, postgresql+psycopg://user@host/name",
    }.get(
        key,
        shared_folder
        if key.startswith("reward.")
        else f"copy it to storage that every node sees, and name that, such as --set {key}=s3://bucket/data",
    )
    return f"{what}; or, if all nodes have it under this very path, add --shared-paths {PurePosixPath(path).parent}"


def _is_below(path: str, folders: Sequence[str]) -> bool:
    place = PurePosixPath(posixpath.normpath(path))
    return any(place.is_relative_to(posixpath.normpath(folder)) for folder in folders)


def _is_folder(model: str) -> bool:
    """Whether a model is a path: it is there, or it is written as only paths are."""
    return not model.startswith(_BUILTIN) and (
        model.startswith(("/", "./", "../", "~")) or Path(model).expanduser().exists()
    )


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).expanduser().absolute())
