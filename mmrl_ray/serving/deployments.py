"""The Serve deployments: thin shells around plain classes; policy and gateway are imported where a replica is made.

gateway (one ASGI app) ──handle──▶ policy (an engine)
                       └─handle──▶ reward (a hosted reward)
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from pyarrow import fs
from ray import serve
from ray.serve import Application

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.sections import RunSection
from mmrl_ray.config.serving import GATEWAY, POLICY, REWARD, ServeConfig
from mmrl_ray.errors import MMRLError, ServingError
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.build import NOTHING, build_reward
from mmrl_ray.serving.launch import deployment_options
from mmrl_ray.serving.protocols import Delta, Generated, GenerateRequest, ModelInfo, Served
from mmrl_ray.serving.reward_service import HostedReward, reward_name, reward_version
from mmrl_ray.telemetry.logs import LogFormat, start_logging
from mmrl_ray.telemetry.ray_meter import RayMeter

if TYPE_CHECKING:
    from mmrl_ray.serving.agent_engine import AgentEngine
    from mmrl_ray.serving.engine import Engine

logger = logging.getLogger(__name__)

_MB = 2**20
_LATER_S = 5.0
"""The gateway's time-out comes first: it is the one that answers 504. The engine's frees rows that nobody waits for."""
_WATCH_S = 0.2
_CONSTRUCTOR_TRIES = 3
"""For one replica: what is missing from a model is missing the next time, too."""


class PolicyReplica:
    """`Engine` on Serve."""

    async def __init__(self, cfg: ServeConfig, created: int) -> None:  # type: ignore[misc]  # Serve awaits it
        start_logging(cfg.log_format, run=None, role=POLICY)
        self._engine = await asyncio.to_thread(_start_engine, cfg, created)
        from mmrl_ray.serving.engine import export_engine_metrics  # which has torch and transformers

        self._meter = RayMeter(model=base_id(cfg))
        export_engine_metrics(self._meter, self._engine.stats)
        self._refreshing = asyncio.create_task(self._refresh_every(cfg.serving.refresh_s))
        if cfg.serving.policy.engine.kind == "vllm":
            self._watching = asyncio.create_task(self._end_with_engine())

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Generated]:
        """All choices, finished: a stream of one item (`ServePolicy` says why)."""
        yield await self._engine.generate(request)

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Served | Delta]:
        """`Served` first, then deltas as they are made."""
        async with aclosing(self._engine.stream(request)) as items:  # type: ignore[type-var]
            async for item in items:
                yield item

    async def models(self) -> list[ModelInfo]:
        """The base first, then adapters by id."""
        return await self._engine.models()

    async def ready(self) -> bool:
        """Whether the model is loaded and warmed up."""
        return await self._engine.ready()

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if not self._engine.healthy:
            raise ServingError("the decode thread, or the process that has the model, has ended")

    async def _refresh_every(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await self._engine.refresh()
            except (MMRLError, OSError) as error:
                logger.warning("adapters cannot be looked up, those that are loaded go on: %s", error)

    async def _end_with_engine(self) -> None:
        """A replica that has died is replaced at once, and the gateway asks another one what it was asked; one that is
        only unwell refuses requests until Serve has looked at it three times."""
        while self._engine.healthy:
            await asyncio.sleep(_WATCH_S)
        logger.error("the process that has the model is lost: this replica ends, and another one takes its place")
        await asyncio.sleep(_WATCH_S)  # who was told of the loss goes on to ask again
        os._exit(1)

    def __del__(self) -> None:
        if hasattr(self, "_meter"):
            self._meter.close()
        if hasattr(self, "_engine"):
            self._engine.close()


class RewardReplica(HostedReward):
    """`HostedReward` on Serve."""

    def __init__(
        self,
        cfg: RewardSection,
        filesystem: fs.FileSystem,
        statistics: str | None,
        log_format: LogFormat = "text",
        run: str | None = None,
    ) -> None:
        """`statistics` is the file that holds those of the training references; None where no part needs them.

        `run` is the run that asks, where there is one.
        """
        start_logging(log_format, run=run, role=REWARD)
        found = NOTHING
        if statistics is not None:
            with filesystem.open_input_stream(statistics) as stream:
                found = CorpusStatistics.from_json(stream.read().decode())
        super().__init__(
            build_reward(cfg, found, device="cuda" if ray.get_gpu_ids() else "cpu"),
            name=reward_name(cfg),
            version=reward_version(cfg, found),
            timeout_s=cfg.timeout_s,
            longest_s=cfg.longest_s,
        )

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if not self.healthy:
            raise ServingError("the reward ran past its deadline and has answered nothing since")


class GatewayReplica:
    """The gateway's app on Serve, which asks for it once the replica is made."""

    def __init__(self, cfg: ServeConfig, policy: Any, reward: Any, *, insecure: bool) -> None:
        """`policy` and `reward` (or None) are handles."""
        self._cfg, self._policy, self._reward, self._insecure = cfg, policy, reward, insecure

    def __serve_build_asgi_app__(self) -> Any:
        from mmrl_ray.preferences.store import PreferenceStore
        from mmrl_ray.serving.app import GatewayDeps, make_app
        from mmrl_ray.serving.keys import KeyStore, default_database
        from mmrl_ray.serving.services import ServedReward, ServePolicy

        cfg = self._cfg
        start_logging(cfg.log_format, run=None, role=GATEWAY)
        jobs = None
        if cfg.serving.fine_tuning is not None:
            from mmrl_ray.serving.job_service import RayJobService

            jobs = RayJobService(cfg.serving)
        deps = GatewayDeps(
            policy=ServePolicy(self._policy),
            reward=ServedReward(self._reward) if self._reward is not None else None,
            keys=None if self._insecure else KeyStore(cfg.serving.database or default_database()),
            settings=cfg.serving,
            prompt=cfg.prompt,
            default_model=next(iter(cfg.adapters), None),
            insecure=self._insecure,
            preferences=None if (url := cfg.serving.preferences) is None else PreferenceStore(url),
            jobs=jobs,
            meter=RayMeter(),
        )
        app = make_app(deps)
        gc.freeze()  # what is here stays: each look at it, with a body of many values in the making, takes 50 ms
        return app


def build(arguments: dict[str, Any]) -> Application:
    """The application of a Serve config file, from its `args`: `config`, a whole `ServeConfig`, and `insecure`."""
    return application(ServeConfig.model_validate(arguments["config"]), insecure=bool(arguments.get("insecure")))


def application(cfg: ServeConfig, *, insecure: bool) -> Application:
    """Gateway, policy and, where there is one, reward."""
    from mmrl_ray.data.shards import locate

    options = deployment_options(cfg)
    policy = _shell(PolicyReplica, POLICY, options[POLICY]).bind(cfg, int(time.time()))
    reward = None
    if cfg.reward is not None:
        filesystem, path = locate(cfg.statistics) if cfg.statistics is not None else (fs.LocalFileSystem(), None)
        reward = _shell(RewardReplica, REWARD, options[REWARD]).bind(cfg.reward, filesystem, path, cfg.log_format)
    gateway = _shell(serve.ingress()(GatewayReplica), GATEWAY, options[GATEWAY])
    return gateway.bind(cfg, policy, reward, insecure=insecure)


def reward_application(
    cfg: RewardSection, filesystem: fs.FileSystem, statistics: str, options: Mapping[str, Any], run: RunSection
) -> Application:
    """The reward alone, without an HTTP front: what a training run asks."""
    return _shell(RewardReplica, REWARD, options).bind(cfg, filesystem, statistics, run.log_format, run.name)


def _shell(replica: type, name: str, options: Mapping[str, Any]) -> Any:
    deployment: Any = serve.deployment(replica)
    return deployment.options(name=name, max_constructor_retry_count=_CONSTRUCTOR_TRIES, **options)


def _start_engine(cfg: ServeConfig, created: int) -> Engine | AgentEngine:
    """Loads the model and its adapters; returns when it answers."""
    import torch

    from mmrl_ray.policy.load import load_policy, load_skeleton
    from mmrl_ray.policy.lora.pool import AdapterPool
    from mmrl_ray.run_records.run_dir import RunDir
    from mmrl_ray.serving.adapters import AdapterFolders
    from mmrl_ray.serving.agent_engine import AgentEngine
    from mmrl_ray.serving.engine import Engine

    serving = cfg.serving
    threads = torch_threads(cfg, os.cpu_count() or 1)
    torch.set_num_threads(1)  # of all but the thread that decodes, see `DecodeThread`
    if is_vllm := serving.policy.engine.kind == "vllm":
        policy = load_skeleton(cfg.model)
    else:
        policy = load_policy(cfg.model, device="cuda" if serving.policy.resources.gpus else "cpu")
    common: dict[str, Any] = {
        "model_id": base_id(cfg),
        "vision_cache_bytes": serving.policy.vision_cache_mb * _MB,
        "max_rows": serving.policy.max_rows,
        "max_queue": serving.policy.max_queue,
        "timeout_s": serving.request_timeout_s + _LATER_S,
        "threads": threads,
    }
    if cfg.agent is not None:
        agent = AgentEngine(policy, RunDir.at(cfg.agent), **common)
        agent.start()
        return agent
    sources = AdapterFolders(cfg.adapters, [serving.adapters_root] if serving.adapters_root is not None else [])
    vllm = None
    if is_vllm:
        from mmrl_ray.policy.generation.vllm.decoder import start_server

        has_adapters = bool(cfg.adapters or serving.adapters_root)
        vllm = start_server(
            policy,
            serving.policy.engine,
            max_rows=serving.policy.max_rows,
            adapters=(serving.max_adapters, serving.max_rank) if has_adapters else None,
            threads=threads,
            timeout_s=common["timeout_s"],
        )
    else:
        policy.acceleration.pack_weights(policy.model)  # a replica's base stays as it is; adapters lie beside it
    pool = AdapterPool(policy, sources, max_adapters=serving.max_adapters, max_rank=serving.max_rank, host=vllm)
    processes = serving.policy.resources.prompt_processes
    engine = Engine(policy, pool, created=created, prompt_processes=processes, vllm=vllm, **common)
    try:
        engine.start()
    except BaseException:
        engine.close()
        raise
    gc.freeze()  # the model and all modules stay: a look at them for rubbish would hold up a step
    return engine


def torch_threads(cfg: ServeConfig, cores: int) -> int:
    """Threads of one policy replica: what is written, else on a CPU its part of the cores when all replicas run."""
    policy = cfg.serving.policy
    if policy.resources.threads is not None:
        return policy.resources.threads
    return max(1, int(policy.resources.cpus), 0 if policy.resources.gpus else cores // policy.max_replicas)


def base_id(cfg: ServeConfig) -> str:
    """What clients call the base model."""
    return cfg.serving.model_id or Path(cfg.model.path).name
