"""Which keys of a config name places, and what they mean from another folder or another machine."""

from __future__ import annotations

import difflib
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mmrl_ray.config.reward import LearnedPart, RewardSection
from mmrl_ray.config.schema import Config
from mmrl_ray.config.sections import ModelSection, RunSection
from mmrl_ray.config.serving import ServeConfig
from mmrl_ray.errors import ConfigError

Whole = TypeVar("Whole", Config, ServeConfig)
Keys = tuple[str, ...]
"""The way to a value of a config: its sections' names, then its own."""
RUN_CONFIG = "config.yaml"
"""What makes a folder a run's."""
_BUILTIN = "builtin:"
_SQLITE = "sqlite:///"
_MEMORY = ":memory:"
_CODE = ("reward", "code")
"""It travels with a job, so that nobody else need see it."""
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


def refuse_taken(out: Path) -> None:
    """Raises ConfigError where a folder that is to be written is there already, and holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: name another folder with --out, or remove it")


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


def find_run(target: str, root: str = _ROOT) -> str:
    """Where the run lies that a path, a URI or a bare name means; of a name it is the one in the folder `root`.

    Raises:
        ConfigError: there is none; with the nearest folder that there is.
    """
    is_name = not os.path.dirname(target) and target not in (".", "..")
    inside = f"{root.rstrip('/')}/{target}"
    if is_run(target) or (is_name and is_run(inside)):
        return target if is_run(target) else inside
    place = os.path.expanduser(target)
    if os.path.isdir(place):
        raise ConfigError(f"{target} is no run folder: it has no {RUN_CONFIG}")
    if os.path.exists(place):
        raise ConfigError(f"{target} is a file: a run is a folder with a {RUN_CONFIG}; name that")
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


def with_places(cfg: Whole, places: Mapping[Keys, str]) -> Whole:
    """A copy of `cfg` with other places under the keys that name them."""
    for keys, place in places.items():
        cfg = _put(cfg, keys, place)
    return cfg


def _put(holder: Any, keys: Keys, place: str) -> Any:
    """A copy of `holder`, a section or a mapping, with `place` where the keys lead to."""
    if not keys:
        return place
    if isinstance(holder, Mapping):
        return {**holder, keys[0]: _put(holder[keys[0]], keys[1:], place)}
    return holder.model_copy(update={keys[0]: _put(getattr(holder, keys[0]), keys[1:], place)})


def with_absolute_paths(cfg: Config) -> Config:
    """The same config, meaning the same files from whichever folder: that of a Ray worker, or of a later resume."""
    python, adapters = cfg.rollout.engine.python, cfg.rollout.engine.adapters
    places = _places(cfg)
    if adapters is not None:
        places["rollout", "engine", "adapters"] = adapters
    if python is not None and os.sep in python:  # a bare name is looked for on each node's own path
        places["rollout", "engine", "python"] = python
    return with_places(cfg, _absolute_all(places))


def with_absolute_places(cfg: ServeConfig) -> ServeConfig:
    """`with_absolute_paths` of a config of `mmrl serve`: its replicas work in folders of Ray's."""
    places = {**_served_places(cfg), **_filled_places(cfg)}
    python = cfg.serving.policy.engine.python
    if python is not None and os.sep in python:
        places["serving", "policy", "engine", "python"] = python
    return with_places(cfg, _absolute_all(places))


def refuse_missing_places(cfg: ServeConfig) -> None:
    """Refuses places of a config of `mmrl serve` that are not on this machine, which is to serve.

    Folders that fill up later (`serving.adapters_root`, `serving.runs_root`, the root of jobs) may be missing.

    Args:
        cfg: with absolute paths.

    Raises:
        ConfigError: one line a place, with the nearest folder that there is.
    """
    places = {".".join(keys): place for keys, place in _served_places(cfg).items()}
    missing = {key: place for key, place in places.items() if "://" not in place and not Path(place).exists()}
    if missing:
        raise ConfigError(
            "\n".join(f"{key}={place} does not exist{nearest_folder(place)}" for key, place in missing.items())
        )


def _served_places(cfg: ServeConfig) -> dict[Keys, str]:
    """Places that a server reads, by the keys that name them."""
    places: dict[Keys, str] = {("adapters", name): place for name, place in cfg.adapters.items()}
    places |= {(key,): place for key in ("agent", "statistics") if (place := getattr(cfg, key)) is not None}
    places |= _model_place((), cfg.model)
    if cfg.reward is not None:
        places |= _reward_places(("reward",), cfg.reward)
    if (tuning := cfg.serving.fine_tuning) is not None:
        where = ("serving", "fine_tuning")
        places |= {(*where, "datasets", name): place for name, place in tuning.datasets.items()}
        for name, recipe in tuning.models.items():
            places |= _reward_places((*where, "models", name, "reward"), recipe.reward)
            places |= _model_place((*where, "models", name), recipe.model)
    return places


def _filled_places(cfg: ServeConfig) -> dict[Keys, str]:
    """Places that fill up while a server runs."""
    serving = cfg.serving
    places: dict[Keys, str | None] = {
        ("serving", key): getattr(serving, key) for key in ("adapters_root", "runs_root", "database")
    }
    if (tuning := serving.fine_tuning) is not None:
        where = ("serving", "fine_tuning")
        places[*where, "root"] = tuning.root
        places |= {(*where, "models", name, "sft", "cache"): r.sft.cache for name, r in tuning.models.items() if r.sft}
    return {keys: place for keys, place in places.items() if place is not None}


def _places(cfg: Config) -> dict[Keys, str]:
    """Places of a run, by the keys that name them."""
    data = cfg.data
    places: dict[Keys, str] = {("run", "root"): cfg.run.root, ("data", "train"): data.train}
    if data.eval is not None:
        places["data", "eval"] = data.eval
    if data.preferences is not None:
        places["data", "preferences", "store"] = data.preferences.store
    if data.rollouts is not None:
        places["data", "rollouts", "run"] = data.rollouts.run
    places |= _model_place((), cfg.model)
    if cfg.sft is not None:
        places["sft", "cache"] = cfg.sft.cache
    if cfg.teacher is not None:
        if not is_hub_id(cfg.teacher.path):
            places["teacher", "path"] = cfg.teacher.path
        if cfg.teacher.adapter is not None:
            places["teacher", "adapter"] = cfg.teacher.adapter
    return places | _reward_places(("reward",), cfg.reward)


def _model_place(where: Keys, model: ModelSection) -> dict[Keys, str]:
    """A hub id and a built-in model are none."""
    is_path = not model.path.startswith(_BUILTIN) and not is_hub_id(model.path)
    return {(*where, "model", "path"): model.path} if is_path else {}


def _reward_places(where: Keys, reward: RewardSection) -> dict[Keys, str]:
    learned = {name: part.model for name, part in reward.parts.items() if isinstance(part, LearnedPart)}
    places: dict[Keys, str] = {(*where, "parts", name, "model"): place for name, place in learned.items()}
    return places | ({(*where, "code"): reward.code or "."} if reward.functions else {})


def sqlite_file(url: str) -> str | None:
    """The file that an SQLite URL names; None of any other database."""
    file = url.removeprefix(_SQLITE)
    return file if file not in (url, "", _MEMORY) else None


def local_paths(cfg: Config) -> dict[str, str]:
    """Paths of a file system, by the keys that name them; not the URIs, nor the ids of a hub."""
    places = {keys: sqlite_file(place) or place for keys, place in _places(cfg).items() if keys != _CODE}
    return {".".join(keys): place for keys, place in places.items() if "://" not in place}


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
    """Refuses (one line a path) what is not there, where the job will see the same files as this process."""
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
        "teacher.path": "name a hub id, or a folder on storage that every node sees",
        "teacher.adapter": shared_folder,
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


def place_name(place: str | None) -> str:
    """What a place is called for readers elsewhere: the last part of a path, without options and passwords of a URI."""
    if place is None or place.startswith(_BUILTIN) or is_hub_id(place):
        return place or ""
    parts = urlsplit(place) if "://" in place else None
    return posixpath.basename((place if parts is None else parts.path or parts.netloc).rstrip("/")) or "."


def without_places(cfg: Config) -> Config:
    """A copy that says nothing of where files lie (`place_name`)."""
    places = _places(cfg)
    if cfg.rollout.engine.python is not None:
        places["rollout", "engine", "python"] = cfg.rollout.engine.python
    return with_places(cfg, {keys: place_name(place) for keys, place in places.items()})


def _absolute_all(places: Mapping[Keys, str]) -> dict[Keys, str]:
    return {keys: _absolute(place) for keys, place in places.items()}


def _absolute(location: str) -> str:
    if (file := sqlite_file(location)) is not None:
        return f"{_SQLITE}{_absolute(file)}"
    return location if "://" in location else str(Path(location).expanduser().absolute())
