"""`mmrl serve`: from what the user names to a gateway that answers, until Ctrl-C.

targets ──▶ ServeConfig ──▶ Ray's switches ──▶ Ray ──▶ Serve: gateway, policy, reward ──▶ wait ──▶ drain, stop
"""

from __future__ import annotations

import errno
import functools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config, load_as, parse_as, parse_config
from mmrl_ray.config.paths import (
    RUN_CONFIG,
    is_hub_id,
    is_run,
    refuse_missing_places,
    refuse_unknown,
    with_absolute_places,
)
from mmrl_ray.config.problems import dump_yaml
from mmrl_ray.config.sections import ModelSection
from mmrl_ray.config.serving import APP, ServeConfig, ServingSection
from mmrl_ray.errors import ConfigError, JobError, ServingError
from mmrl_ray.jobs.client import JobsClient, own_address
from mmrl_ray.jobs.submit import stop_jobs
from mmrl_ray.policy.load import load_skeleton, try_quickly
from mmrl_ray.processes import listener
from mmrl_ray.run_records.checkpoint_choice import choose_checkpoint
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir
from mmrl_ray.serving.auth import is_loopback
from mmrl_ray.serving.haproxy import clear_leftovers, set_flags
from mmrl_ray.serving.job_service import recipe_configs
from mmrl_ray.telemetry.terminal import RunProgress, visible
from mmrl_ray.training.cluster import demanded_cpus as demanded_by_run
from mmrl_ray.training.cluster import ray_at
from mmrl_ray.training.interrupts import StopOnInterrupt
from mmrl_ray.training.warm_start import base_for_use, same_base

_START_TIMEOUT_S = 600.0
"""For all deployments to run: mostly the loading of a model."""


def serve(
    targets: Sequence[str],
    *,
    address: str | None = None,
    host: str | None = None,
    port: int | None = None,
    insecure: bool = False,
    checkpoint: str | None = None,
    print_config: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Serves a policy and its reward over HTTP until it is interrupted, then lets what is under way finish.

    Args:
        targets: one config of `mmrl serve`, or a model, or run folders with one base, each an adapter beside it.
        address: a Ray to join; a local one is started otherwise.
        host: in place of `serving.host`.
        port: in place of `serving.port`.
        insecure: without keys, on a loopback address of a local Ray only.
        checkpoint: of each run: `best`, `last` or a step, as it is now; by default the run's newest, always.
        print_config: prints the Serve config file instead.

    Raises:
        ConfigError: the targets do not go together, or `insecure` does not go with the rest.
        ModelError: the model is on this machine and cannot be used.
        ServingError: the port is taken, the key database cannot be used, or a deployment cannot be made.
        PlacementError: Ray has no room for one.
        RunError: the cluster cannot be joined.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    with StopOnInterrupt(say=_show):  # until there is something that a signal may let finish, it ends all at once
        if address is None and not print_config:  # the replicas will be on this machine
            clear_leftovers()
            # Before a base that is gone would be made anew, which takes its time.
            asked = serving_config(
                targets, overrides, host=host, port=port, checkpoint=checkpoint, base=lambda cfg, run: cfg.model.path
            )
            _refuse_unusable(asked, insecure=insecure)
        cfg = serving_config(targets, overrides, host=host, port=port, checkpoint=checkpoint)
        if insecure:
            _refuse_insecure(cfg.serving.host, address)
        if print_config:
            from mmrl_ray.serving.launch import serve_config

            print(dump_yaml(serve_config(cfg, insecure=insecure)), end="")
            return
        _refuse_broken(cfg.model, here=address is None)
        if address is None:
            set_flags(insecure=insecure)
        jobs = cfg.serving.fine_tuning is not None
        show = _show if cfg.reward is not None and cfg.reward.functions else None
        cpus = local_cpus(cfg)
        with ray_at(address, cpus=cpus, object_store_mb=None, namespace=APP, dashboard=jobs, show=show, say=_show):
            _serve_on_ray(cfg, insecure=insecure, joined=address is not None)


def _show(line: str) -> None:
    """What a reward function of the user's prints in a replica."""
    print(visible(line), file=sys.stderr, flush=True)


def _refuse_broken(model: ModelSection, *, here: bool) -> None:
    """A model is looked at before a replica is started for it, and a small one of this machine is tried.

    One of the hub is only where the replicas are `here`, too: elsewhere another hub may be asked.
    """
    is_folder = Path(model.path).expanduser().is_dir()
    if not is_folder and not (here and is_hub_id(model.path)):
        return
    doing = "loading the model for a trial" if is_folder else f"asking for {model.path}"
    with RunProgress() as shown, shown.busy(doing):
        load_skeleton(model)
        if is_folder:
            try_quickly(model)


def _refuse_unusable(cfg: ServeConfig, *, insecure: bool) -> None:
    """What would fail once the model is loaded: places that are not there, the port, the keys."""
    if insecure:
        _refuse_insecure(cfg.serving.host, None)
    refuse_missing_places(cfg)
    _refuse_taken(cfg.serving.host, cfg.serving.port)
    if not insecure:  # a database that takes no key now would take none when the model is loaded
        from mmrl_ray.serving.keys import KeyStore, default_database

        with closing(KeyStore(cfg.serving.database or default_database())) as store:
            store.try_writing()


def _refuse_taken(host: str, port: int) -> None:
    """Refuses an address that the gateway could not listen on."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server: closed connections do not count
            tried.bind(place)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        who = f" ({found})" if taken and (found := listener(port)) is not None else ""
        why = f"another program listens there{who}; end it, or choose another --port" if taken else error.strerror
        raise ServingError(f"the gateway cannot listen on {host}:{port}: {why}") from error


def _serve_on_ray(cfg: ServeConfig, *, insecure: bool, joined: bool) -> None:
    # Imported here: Serve reads its switches when it is imported.
    from mmrl_ray.serving import launch
    from mmrl_ray.serving.deployments import application

    stop = threading.Event()
    say = functools.partial(print, flush=True)
    with StopOnInterrupt(stop.set, awaited=lambda: "what is under way may finish", say=say):
        launch.start_serve(host=cfg.serving.host, port=cfg.serving.port)
        launch.refuse_taken(APP)
        try:
            launch.deploy(application(cfg, insecure=insecure), APP, route_prefix="/")
            demand = f"{demanded_cpus(cfg)} CPUs and {cfg.serving.policy.resources.gpus:g} GPUs a policy replica"
            with RunProgress() as shown, shown.busy("starting the gateway and loading the model"):
                is_up = launch.wait_until_running(APP, _START_TIMEOUT_S, demand=demand, stop=stop)
            if is_up:
                print("\n".join(greeting(cfg, insecure=insecure)), flush=True)
                stop.wait()
            if cfg.serving.fine_tuning is not None and cfg.serving.fine_tuning.address is None and not joined:
                _stop_jobs()
        finally:
            launch.delete(APP, wait=True)
            if joined:  # a local Ray takes it along
                launch.stop_serve()


def _stop_jobs() -> None:
    """Fine-tuning jobs live in this Ray, and end with it."""
    try:
        stop_jobs(JobsClient(own_address()), functools.partial(print, flush=True))
    except JobError as error:
        print(f"whether fine-tuning jobs are under way cannot be told: {error}", flush=True)


# -- what is served ----------------------------------------------------------------------------------------------------


def serving_config(
    targets: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    host: str | None = None,
    port: int | None = None,
    checkpoint: str | None = None,
    base: Callable[[Config, RunDir], str] | None = None,
) -> ServeConfig:
    """The config that the targets stand for, with overrides and absolute paths; `host` and `port` come last.

    `base` says which model a run began with; by default `base_for_use`, which makes it anew where it is gone.
    Raises as `serve`.
    """
    written = [
        *overrides,
        *(f"serving.{k}={json.dumps(v)}" for k, v in (("host", host), ("port", port)) if v is not None),
    ]
    if len(targets) == 1 and Path(targets[0]).suffix in (".yaml", ".yml"):
        if checkpoint is not None:
            raise ConfigError(
                f"--checkpoint {checkpoint} is of a run, and {targets[0]} is a config: name a folder of the run under "
                "`adapters:`, RUN/adapter-last or RUN/checkpoints/step-000040"
            )
        cfg = load_as(ServeConfig, targets[0], written)
    else:
        meant = _of_targets(targets, base or base_for_use, checkpoint)
        cfg = parse_as(ServeConfig, dump_config(meant), "mmrl serve", written)
    cfg = with_absolute_places(cfg)
    if cfg.reward is not None and cfg.reward.needs_statistics and cfg.statistics is None:
        raise ConfigError(
            "reward: its parts need the statistics of the training references: name the file with `statistics:` "
            "(a run has them in reward/statistics.json), or serve no reward with `reward: null`"
        )
    return cfg


def _of_targets(
    targets: Sequence[str], base_of: Callable[[Config, RunDir], str], checkpoint: str | None = None
) -> ServeConfig:
    for target in targets:
        refuse_unknown(target)
    runs = [target for target in targets if is_run(target)]
    models = [target for target in targets if not is_run(target)]
    if len(models) > 1:
        raise ConfigError(f"{' and '.join(models)} are two models: a server has one, and adapters of it")
    base = ServeConfig(model=ModelSection(path=models[0]), reward=None) if models else None
    for target in runs:
        base = _with_run(base, RunDir.at(target), base_of, checkpoint)
    if checkpoint is not None and not runs:
        raise ConfigError(f"--checkpoint {checkpoint} is of a run, and {models[0]} is a model")
    if base is None:
        raise ConfigError("name a run folder, a model or a config to serve")
    return base


def _with_run(
    base: ServeConfig | None, run: RunDir, base_of: Callable[[Config, RunDir], str], checkpoint: str | None
) -> ServeConfig:
    """One more adapter; the first run also brings prompt, reward and how to serve."""
    cfg = parse_config(run.read_text(RUN_CONFIG), run.full_path(RUN_CONFIG))
    if base is not None and (cfg.agent is not None or base.agent is not None):
        raise ConfigError(f"{run.location}: the agent of a value-based run is served by itself, without other targets")
    place = run.location
    if checkpoint is not None:
        if cfg.agent is not None:
            raise ConfigError(f"--checkpoint {checkpoint}: the agent of a value-based run is served as it is")
        place = f"{run.location}/{choose_checkpoint(run, checkpoint).folder}"
    path = base_of(cfg, run)
    if base is not None and base.adapters:
        if not same_base(path, base.model.path):
            raise ConfigError(f"{run.location} was trained on {path}, not on {base.model.path}: serve it by itself")
        if run.name in base.adapters:
            raise ConfigError(f"two runs are called {run.name}: give them ids in a config, under `adapters:`")
        return base.model_copy(update={"adapters": {**base.adapters, run.name: place}})
    alone = config_of_run(cfg, run, path, place)
    return alone if base is None else alone.model_copy(update={"model": base.model})


def config_of_run(cfg: Config, run: RunDir, base: str, place: str | None = None) -> ServeConfig:
    """A run alone: its base model, which lies at `base`, and its adapter, or the one at `place`, under its name."""
    serving = cfg.serving or ServingSection()
    if serving.model_id is None and base != cfg.model.path:  # made by the run, in a folder that is named by a hash
        serving = serving.model_copy(update={"model_id": f"{run.name}-base"})
    known, is_agent = run.exists(STATISTICS), cfg.agent is not None
    if is_agent:
        serving = serving.model_copy(update={"model_id": run.name})
    return ServeConfig(
        model=cfg.model.model_copy(update={"path": base}),
        adapters={} if is_agent else {run.name: place or run.location},
        agent=run.location if is_agent else None,
        prompt=cfg.data.prompt,
        reward=cfg.reward if known else None,
        statistics=f"{run.location}/{STATISTICS}" if known else None,
        serving=serving,
        log_format=cfg.run.log_format,
    )


def demanded_cpus(cfg: ServeConfig) -> int:
    """CPUs that all replicas ask Ray for when there are as many as there may be."""
    serving = cfg.serving
    sections = [serving.gateway, serving.policy, *([serving.reward] if cfg.reward is not None else [])]
    return int(-(-sum(s.max_replicas * s.resources.cpus for s in sections) // 1))


def local_cpus(cfg: ServeConfig) -> int:
    """CPUs of this machine's own Ray: those of all replicas, and of as many fine-tuning jobs as there may be."""
    tuning = cfg.serving.fine_tuning
    jobs = 0 if tuning is None else tuning.max_active * max(map(demanded_by_run, recipe_configs(tuning)))
    return demanded_cpus(cfg) + jobs


# -- who may ask -------------------------------------------------------------------------------------------------------


def greeting(cfg: ServeConfig, *, insecure: bool) -> list[str]:
    """Where the gateway is and how to ask it; makes the first key where there is none."""
    serving = cfg.serving
    host = "127.0.0.1" if serving.host in ("0.0.0.0", "::") else serving.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{serving.port}"
    served = cfg.serving.model_id if cfg.agent is not None else ", ".join(cfg.adapters) or cfg.model.path
    lines = [f"serving {served} at {url}/v1  (docs: {url}/docs)"]
    if insecure:
        return [*lines, "without keys: whoever reaches this address may use it", f"curl {_ask(cfg, url)}"]
    key = first_key(serving.database)
    if key is None:
        lines.append("keys: those of `mmrl keys list`; put yours into MMRL_API_KEY")
        return [*lines, f'curl -H "Authorization: Bearer $MMRL_API_KEY" {_ask(cfg, url)}']
    lines.append(f"first key, shown this one time: {key}")
    return [*lines, f'curl -H "Authorization: Bearer {key}" {_ask(cfg, url)}']


def first_key(database: str | None) -> str | None:
    """A new key that may do everything, if there is no key that works; None otherwise."""
    from mmrl_ray.serving.keys import KeyStore, default_database

    with closing(KeyStore(database or default_database())) as store:
        works = any(record.works_at(datetime.now(UTC)) for record in store.list())
        return None if works else store.create("first", ["admin"])[0]


def _ask(cfg: ServeConfig, url: str) -> str:
    model = f" -F model={next(iter(cfg.adapters))}" if cfg.adapters else ""
    return f"-F image=@photo.jpg{model} {url}/v1/captions"


def _refuse_insecure(host: str, address: str | None) -> None:
    """Without keys only this machine may ask."""
    if not is_loopback(host):
        raise ConfigError(f"--insecure serves without keys, on a loopback address only: serving.host={host} is none")
    if address is not None:
        raise ConfigError(f"--insecure is for a local Ray: others could reach the gateway on Ray at {address}")
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ConfigError("--insecure does not go with HAProxy, parts of which listen on every interface")
