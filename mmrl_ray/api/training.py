"""`train`: a run from a config, begun or gone on with; what `mmrl train` calls, and notebooks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrl_ray.api.host import leaves_no_trace
from mmrl_ray.config.load import as_overrides, config_of, parse_config
from mmrl_ray.errors import ConfigError, Interrupted, RunError
from mmrl_ray.run_records.run_dir import RunDir

if TYPE_CHECKING:
    from mmrl_ray.api.run import Run
    from mmrl_ray.config import Config

__all__ = ["train"]


@leaves_no_trace
def train(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    resume: bool | str | os.PathLike[str] | Run = False,
    resume_or_start: bool = False,
    address: str | None = None,
    debug: bool = False,
) -> Run:
    """Trains until the run is finished, and returns it.

        run = train({"run": {"name": "mine"}, "model": {...}, "data": {...}, "learner": {"steps": 200}})
        run = train("my.yaml", overrides={"learner.lr": 5e-5, "run.name": "again"})
        run = train(resume="runs/again")

    Where this process is in a Ray (`ray.init`), the run uses it and leaves it open; else it starts one and ends it.
    In a notebook the stop button is Ctrl-C: once finishes the step, checkpoints and raises `Interrupted`, again stops
    at once. Environment variables, logging and signal handlers are afterwards what they were.

    Args:
        config: a `Config`, a mapping of its sections, or the path of a YAML file. Not with a `resume` that names a run.
        overrides: `{"learner.lr": 5e-5}`, or `["learner.lr=5e-5"]` as after `--set`.
        resume: a run (its folder, a URI, or a `Run`) to go on with from its newest valid checkpoint; with True the run
            that the config names.
        resume_or_start: goes on where there is a run of that name, else begins it.
        address: a Ray to train on; by default `RAY_ADDRESS`, the one this process is in, or one of its own.
        debug: shows what workers log.

    Raises:
        ConfigError: the config is wrong: one line a problem, all of them at once.
        Interrupted: it was stopped, and can be gone on with.
        MMRLError: what else stopped it; the run folder, if it came to that, says so too.
    """
    cfg, is_resumed = run_config(config, overrides=overrides, resume=resume, resume_or_start=resume_or_start)
    from mmrl_ray.api.run import Run
    from mmrl_ray.training.train import train as run_whole

    try:
        return Run(RunDir.at(run_whole(cfg, resume=is_resumed, address=address, debug=debug)))
    except Interrupted as error:
        error.add_note(f"In Python: train(resume={_location(cfg)!r})")
        raise


def run_config(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    resume: bool | str | os.PathLike[str] | Run = False,
    resume_or_start: bool = False,
) -> tuple[Config, bool]:
    """The config that `train` would train, and whether that goes on with a run; arguments and errors are its."""
    overrides = as_overrides(overrides)
    if not isinstance(resume, bool):
        if config is not None:
            raise ConfigError(
                f"config and resume={str(resume)!r} both name a run: to change what it goes on with, give overrides, "
                "or its config with resume=True"
            )
        return _of_run(str(resume), overrides), True
    if config is None:
        raise ConfigError("there is nothing to train: give a config, or the run to go on with as resume=")
    if resume and isinstance(config, str | os.PathLike) and not _is_file_of_yaml(Path(config)):
        return _of_run(os.fspath(config), overrides), True
    cfg = config_of(config, overrides)
    return cfg, resume or (resume_or_start and _is_there(cfg))


def _is_file_of_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") and not path.is_dir()


def _is_there(cfg: Config) -> bool:
    try:
        RunDir.open(cfg.run.root, cfg.run.name)
    except RunError:
        return False
    return True


def _of_run(target: str, overrides: Sequence[str]) -> Config:
    """The resolved config of the run folder that is resumed, wherever it lies now."""
    run = RunDir.at(target)
    if not run.exists("config.yaml"):
        raise RunError(
            f"{run.location} has no config.yaml: its run was stopped before it began, or it is none; begin it with "
            "mmrl train CONFIG"
        )
    cfg = parse_config(run.read_text("config.yaml"), f"{target.rstrip('/')}/config.yaml", overrides)
    with contextlib.suppress(RunError):  # its folder was renamed or is reached by another path
        if RunDir.open(cfg.run.root, cfg.run.name).location == run.location:
            return cfg
    root = run.location[: -len(run.name)].rstrip("/")
    return cfg.model_copy(update={"run": cfg.run.model_copy(update={"root": root, "name": run.name})})


def _location(cfg: Config) -> str:
    with contextlib.suppress(RunError):
        return RunDir.open(cfg.run.root, cfg.run.name).location
    return f"{cfg.run.root}/{cfg.run.name}"
