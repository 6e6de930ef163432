"""The places that a config names, as pods see them."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.config.deploy import StorageSection
from mmrl_ray.config.sections import Section
from mmrl_ray.config.serving import ServeConfig, ServingSection
from mmrl_ray.errors import ConfigError


def run_in_pods(cfg: Config) -> Config:
    """The same run with its data, models and folder on the storage that all pods share.

    Raises:
        ConfigError: a place that pods cannot see, one line each.
    """
    storage = cfg.deploy.storage
    local = {
        "sft": cfg.sft is not None,
        "data.scenes": cfg.data.scenes is not None,
        f"model.path={cfg.model.path}": cfg.model.path.startswith("builtin:"),
    }
    if storage.uri is not None and any(local.values()):
        what = ", ".join(name for name, holds in local.items() if holds)
        raise ConfigError(f"{what}: makes files that need a volume, but deploy.storage.uri names an object store")
    if cfg.data.preferences is not None:
        _refuse_sqlite("data.preferences.store", cfg.data.preferences.store)
    places = {"run.root": cfg.run.root, "data.train": cfg.data.train, "model.path": _model(cfg.model.path)}
    if cfg.data.eval is not None:
        places["data.eval"] = cfg.data.eval
    if cfg.sft is not None:
        places["sft.cache"] = cfg.sft.cache
    rollouts = cfg.data.rollouts
    if rollouts is not None:
        places["data.rollouts.run"] = rollouts.run
    seen = _seen(places, storage)
    data: dict[str, Any] = {"train": seen["data.train"], "eval": seen.get("data.eval")}
    if rollouts is not None:
        data["rollouts"] = rollouts.model_copy(update={"run": seen["data.rollouts.run"]})
    update: dict[str, Section | None] = {
        "run": cfg.run.model_copy(update={"root": seen["run.root"]}),
        "data": cfg.data.model_copy(update=data),
        "model": cfg.model.model_copy(update={"path": seen.get("model.path", cfg.model.path)}),
        "serving": _serving(cfg.serving, storage) if cfg.serving is not None else None,
    }
    if cfg.sft is not None:
        update["sft"] = cfg.sft.model_copy(update={"cache": seen["sft.cache"]})
    return cfg.model_copy(update=update)


def server_in_pods(cfg: ServeConfig) -> ServeConfig:
    """The same server with its models and adapters on the storage that all pods share, open to other pods.

    Raises:
        ConfigError: a place that pods cannot see, one line each.
    """
    places = {f"adapters.{name}": place for name, place in cfg.adapters.items()}
    seen = _seen({**places, "model.path": _model(cfg.model.path), "statistics": cfg.statistics}, cfg.deploy.storage)
    return cfg.model_copy(
        update={
            "model": cfg.model.model_copy(update={"path": seen.get("model.path", cfg.model.path)}),
            "adapters": {name: seen[f"adapters.{name}"] for name in cfg.adapters},
            "statistics": seen.get("statistics"),
            "serving": _serving(cfg.serving, cfg.deploy.storage),
        }
    )


def _refuse_sqlite(key: str, url: str) -> None:
    if url.startswith("sqlite"):
        raise ConfigError(
            f"{key}={url} is a file of one machine, which pods do not share: name a PostgreSQL database, such as "
            f"--set {key}=postgresql+psycopg://mmrl@postgres/mmrl"
        )


def _serving(serving: ServingSection, storage: StorageSection) -> ServingSection:
    """Open to other pods, too."""
    if serving.preferences is not None:
        _refuse_sqlite("serving.preferences", serving.preferences)
    seen = _seen({"serving.adapters_root": serving.adapters_root}, storage)
    return serving.model_copy(update={"host": "0.0.0.0", "adapters_root": seen.get("serving.adapters_root")})


def _model(path: str) -> str | None:
    """A hub's id stays what it is; a folder is written as only folders are."""
    return path if path.startswith(("/", "./", "../", "~")) else None


def _seen(places: Mapping[str, str | None], storage: StorageSection) -> dict[str, str]:
    """Each place that there is, by its key, as pods see it."""
    problems = []
    found = {}
    for key, place in places.items():
        if place is None:
            continue
        if "://" in place:
            found[key] = place
            continue
        root = PurePosixPath("/" if storage.uri is not None else storage.mount_path)
        full = PurePosixPath(posixpath.normpath(root / place))
        away = full.is_absolute() and not full.is_relative_to(root)
        if place.startswith("~") or away or (storage.uri is not None and place.startswith("/")):
            where = storage.uri or f"the volume at {storage.mount_path}"
            problems.append(
                f"{key}={place} is not on {where}, which is all that pods see: put it there and write a relative path, "
                f"which starts there, such as --set {key}=data/{full.name}"
            )
        elif storage.uri is not None:
            found[key] = f"{storage.uri.rstrip('/')}{full}"
        else:
            found[key] = str(full)
    if problems:
        raise ConfigError("\n".join(problems))
    return found
