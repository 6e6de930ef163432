"""Which keys of a config name places, and what they mean from another folder or another machine."""

from __future__ import annotations

import difflib
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmrl_ray.config.reward import LearnedPart, RewardSection
from mmrl_ray.config.schema import Config
from mmrl_ray.config.sections import ModelSection, RunSection, Section, SftSection
from mmrl_ray.config.serving import ServeConfig
from mmrl_ray.errors import ConfigError

RUN_CONFIG = "config.yaml"
"""What makes a folder a run's."""
_BUILTIN = "builtin:"
_SQLITE = "sqlite:///"
_MEMORY = ":memory:"
_ROOT = str(RunSection.model_fields["root"].default)


def is_run(target: str) -> bool:
    """Whether it names a run: a folder with a `config.yaml`, or a location that is no path."""
    return "://" in target or (Path(target).expanduser() / RUN_CONFIG).is_file()


def is_hub_id(path: str) -> bool:
    """Whether it names a model of the hub, `name` or `owner/name`; whatever looks like a path of this machine is none.

    An owner that is a folder here, or that runs lie in by default, makes it a path; so does a run of that name.
    """
    expanded = os.path.expanduser(path)
    if path.startswith(_BUILTIN) or expanded.startswith((".", os.sep)) or os.path.exists(expanded):
        return False
    owner, slash, rest = expanded.partition("/")
    if slash:
        return bool(owner and rest) and "/" not in rest and owner != _ROOT and not os.path.isdir(owner)
    return bool(owner) and not is_run(f"{_ROOT}/{path}")


def refuse_unknown(target: str) -> None:
    """Refuses what can be neither a run, nor a model's folder, nor an id of the hub, without asking the hub.

    Raises:
        ConfigError: with the nearest folder that there is.
    """
    if "://" in target or target.startswith(_BUILTIN) or is_hub_id(target):
        return
    if not os.path.isdir(os.path.expanduser(target)):
        raise ConfigError(f"no such run folder: {target}{nearest_folder(target)}")


def refuse_no_run(target: str) -> None:
    """Refuses what is no run folder.

    Raises:
        ConfigError: with the nearest folder that there is.
    """
    if is_run(target):
        return
    if os.path.isdir(os.path.expanduser(target)):
        raise ConfigError(f"{target} is no run folder: it has no {RUN_CONFIG}; for a model write --model {target}")
    raise ConfigError(f"no such run folder: {target}{nearest_folder(target)}")


def nearest_folder(path: str) -> str:
    """`; did you mean …?` with the folder of the nearest name, or which folder on the way is missing; or nothing."""
    place = Path(path).expanduser()
    parent = place.parent
    if not parent.is_dir():
        return f"; there is no folder {parent}{nearest_folder(str(parent))}"
    for folder in (parent,) if parent != Path() else (Path(_ROOT), parent):
        names = [each.name for each in folder.iterdir() if each.is_dir()] if folder.is_dir() else []
        if near := difflib.get_close_matches(place.name, names, n=1):
            return f"; did you mean {folder / near[0]}?"
    return ""


def with_absolute_paths(cfg: Config) -> Config:
    """The same config, meaning the same files from whichever folder: that of a Ray worker, or of a later resume."""
    data: dict[str, Any] = {"train": _absolute(cfg.data.train)}
    if cfg.data.eval is not None:
        data["eval"] = _absolute(cfg.data.eval)
    if (preferences := cfg.data.preferences) is not None and (file := sqlite_file(preferences.store)) is not None:
        data["preferences"] = preferences.model_copy(update={"store": f"{_SQLITE}{_absolute(file)}"})
    if (rollouts := cfg.data.rollouts) is not None:
        data["rollouts"] = rollouts.model_copy(update={"run": _absolute(rollouts.run)})
    sections: dict[str, Section] = {
        "run": cfg.run.model_copy(update={"root": _absolute(cfg.run.root)}),
        "model": _absolute_model(cfg.model),
        "data": cfg.data.model_copy(update=data),
    }
    sections["reward"] = _absolute_reward(cfg.reward)
    if cfg.sft is not None:
        sections["sft"] = _absolute_cache(cfg.sft)
    return cfg.model_copy(update=sections)


def with_absolute_places(cfg: ServeConfig) -> ServeConfig:
    """`with_absolute_paths` of a config of `mmrl serve`: its replicas work in folders of Ray's."""
    serving = cfg.serving
    places: dict[str, Any] = {
        name: _absolute(place)
        for name in ("adapters_root", "runs_root")
        if (place := getattr(serving, name)) is not None
    }
    if serving.database is not None and (file := sqlite_file(serving.database)) is not None:
        places["database"] = f"{_SQLITE}{_absolute(file)}"
    if (tuning := serving.fine_tuning) is not None:
        models = {
            name: recipe.model_copy(
                update={
                    "model": _absolute_model(recipe.model),
                    "reward": _absolute_reward(recipe.reward),
                    "sft": None if recipe.sft is None else _absolute_cache(recipe.sft),
                }
            )
            for name, recipe in tuning.models.items()
        }
        datasets = {name: _absolute(place) for name, place in tuning.datasets.items()}
        root = None if tuning.root is None else _absolute(tuning.root)
        places["fine_tuning"] = tuning.model_copy(update={"models": models, "datasets": datasets, "root": root})
    return cfg.model_copy(
        update={
            "model": _absolute_model(cfg.model),
            "adapters": {name: _absolute(place) for name, place in cfg.adapters.items()},
            "agent": None if cfg.agent is None else _absolute(cfg.agent),
            "reward": None if cfg.reward is None else _absolute_reward(cfg.reward),
            "statistics": None if cfg.statistics is None else _absolute(cfg.statistics),
            "serving": serving.model_copy(update=places),
        }
    )


def refuse_missing_places(cfg: ServeConfig) -> None:
    """Refuses places of a config of `mmrl serve` that are not on this machine, which is to serve.

    Folders that fill up later (`serving.adapters_root`, `serving.runs_root`, the root of jobs) may be missing.

    Args:
        cfg: with absolute paths.

    Raises:
        ConfigError: one line a place, with the nearest folder that there is.
    """
    places = {f"adapters.{name}": place for name, place in cfg.adapters.items()}
    places |= {key: place for key in ("agent", "statistics") if (place := getattr(cfg, key)) is not None}
    if not is_hub_id(cfg.model.path) and not cfg.model.path.startswith(_BUILTIN):
        places["model.path"] = cfg.model.path
    if cfg.reward is not None:
        places |= _reward_places("reward", cfg.reward)
    if (tuning := cfg.serving.fine_tuning) is not None:
        where = "serving.fine_tuning"
        places |= {f"{where}.datasets.{name}": place for name, place in tuning.datasets.items()}
        for name, recipe in tuning.models.items():
            places |= _reward_places(f"{where}.models.{name}.reward", recipe.reward)
            if not is_hub_id(recipe.model.path) and not recipe.model.path.startswith(_BUILTIN):
                places[f"{where}.models.{name}.model.path"] = recipe.model.path
    missing = {key: place for key, place in places.items() if "://" not in place and not Path(place).exists()}
    if missing:
        raise ConfigError(
            "\n".join(f"{key}={place} does not exist{nearest_folder(place)}" for key, place in missing.items())
        )


def _absolute_model(model: ModelSection) -> ModelSection:
    """A hub id and a built-in model stay."""
    is_path = not model.path.startswith(_BUILTIN) and not is_hub_id(model.path)
    return model.model_copy(update={"path": _absolute(model.path)}) if is_path else model


def _absolute_cache(sft: SftSection) -> SftSection:
    return sft.model_copy(update={"cache": _absolute(sft.cache)})


def _absolute_reward(reward: RewardSection) -> RewardSection:
    learned = {name: part for name, part in reward.parts.items() if isinstance(part, LearnedPart)}
    parts = {name: part.model_copy(update={"model": _absolute(part.model)}) for name, part in learned.items()}
    code = _absolute(reward.code or ".") if reward.functions else reward.code
    return reward.model_copy(update={"parts": {**reward.parts, **parts}, "code": code})


def _reward_places(where: str, reward: RewardSection) -> dict[str, str]:
    learned = {name: part.model for name, part in reward.parts.items() if isinstance(part, LearnedPart)}
    places = {f"{where}.parts.{name}.model": place for name, place in learned.items()}
    return places | ({f"{where}.code": reward.code} if reward.functions and reward.code is not None else {})


def sqlite_file(url: str) -> str | None:
    """The file that an SQLite URL names; None of any other database."""
    file = url.removeprefix(_SQLITE)
    return file if file not in (url, "", _MEMORY) else None


def local_paths(cfg: Config) -> dict[str, str]:
    """Paths of a file system, by the keys that name them; not the URIs, nor the ids of a hub."""
    places = {"run.root": cfg.run.root, "data.train": cfg.data.train}
    if cfg.data.eval is not None:
        places["data.eval"] = cfg.data.eval
    if cfg.data.preferences is not None and (file := sqlite_file(cfg.data.preferences.store)) is not None:
        places["data.preferences.store"] = file
    if cfg.data.rollouts is not None:
        places["data.rollouts.run"] = cfg.data.rollouts.run
    if not is_hub_id(cfg.model.path) and not cfg.model.path.startswith(_BUILTIN):
        places["model.path"] = cfg.model.path
    if cfg.sft is not None:
        places["sft.cache"] = cfg.sft.cache
    places |= {k: v for k, v in _reward_places("reward", cfg.reward).items() if k != "reward.code"}  # it travels
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


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).expanduser().absolute())
