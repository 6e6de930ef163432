"""What a run has on Ray Serve: its reward (`RunReward`), and the live policy (`LivePolicy`) with its gateway.

The reward is deployed before the first rollout, and taken away after the last.

The live policy (`serving.live_policy`) is up while the run trains. The learner puts each version it publishes into
`live/` of the run folder; policy replicas look there every `serving.refresh_s` and take the newest up beside the one
they have. Until the first version there is the base alone. What a driver that was killed has left on a cluster's Serve
is taken over when its run is resumed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Self

from mmrl_ray.config import Config
from mmrl_ray.config.serving import ServeConfig, ServingSection
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.rollouts.pool_settings import demand_of
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir
from mmrl_ray.run_records.step_log import note_event

_LOOK_EVERY_S = 1.0
_ON_THE_WAY_S = 10.0
"""For a call to reach the replica and come back, its processes to start again."""


class RunReward:
    """What a run scores with, hosted as `reward.host` says. Needs a Ray, and the statistics in the run folder."""

    def __init__(self, cfg: Config, run: RunDir, statistics: CorpusStatistics, *, joined: bool = False) -> None:
        """`joined`: the Ray outlives the run."""
        self._joined = joined
        self._cfg = cfg
        self._run = run
        self._app: str | None = None
        self._close: Callable[[], None] = _nothing
        self._looked = 0.0
        self._unhealthy_since: float | None = None
        device = "cuda" if cfg.resources.rollout.gpus else "cpu"
        self.reward: RewardFn = build_reward(cfg.reward, statistics, device=device)
        """For the workers: with a GPU, a learned one shares theirs. Picklable. Behind Serve it may be called before
        `wait`: the call waits for the replica."""
        self.own = self.reward if device == "cpu" else build_reward(cfg.reward, statistics, device="cpu")
        """For this process, which has no GPU."""
        self.tokenizer = statistics.tokenizer
        """Of all words of the run."""

    def __enter__(self) -> Self:
        reward, share = self._cfg.reward, self._cfg.resources.reward
        if reward.host == "serve":
            # Imported here: it takes a second, which a run with `inline` rewards need not pay.
            from mmrl_ray.serving import launch
            from mmrl_ray.serving.deployments import reward_application
            from mmrl_ray.serving.launch import options_of
            from mmrl_ray.serving.services import ServeReward

            app = app_name(self._run)
            launch.start_serve()
            # Bounds as they are for `mmrl serve`, resources as for every actor of a run.
            serving = self._cfg.serving or ServingSection()
            options = options_of(serving.reward.model_copy(update={"resources": share}))
            statistics = self._run.full_path(STATISTICS)
            application = reward_application(reward, self._run.filesystem, statistics, options, self._cfg.run)
            launch.deploy(application, app, route_prefix=None)
            self._app = app
            timeout_s = reward.longest_s + _ON_THE_WAY_S
            self.reward = self.own = served = ServeReward(app, timeout_s=timeout_s, images=reward.needs_images)
            self._close = served.close
        return self

    def wait(self) -> None:
        """Until the reward answers.

        Raises:
            ServingError: its replica cannot be made.
            PlacementError: Ray has no room for it within `resources.placement_timeout_s`.
        """
        if self._app is not None:
            from mmrl_ray.serving import launch

            share = self._cfg.resources.reward
            timeout_s = self._cfg.resources.placement_timeout_s
            launch.wait_until_running(self._app, timeout_s, demand=demand_of(share.cpus, share.gpus, share.node_labels))

    def look(self) -> None:
        """Notes in the run's events when a replica has died, and when another has taken its place.

        Call it often; it asks Serve about once a second.
        """
        now = time.monotonic()
        if self._app is None or now - self._looked < _LOOK_EVERY_S:
            return
        from mmrl_ray.serving import launch

        self._looked = now
        unhealthy = launch.is_unhealthy(self._app)
        if unhealthy and self._unhealthy_since is None:
            self._unhealthy_since = now
            note_event(self._run, "reward_replica_lost")
        elif not unhealthy and self._unhealthy_since is not None:
            note_event(self._run, "reward_replica_ready", seconds=now - self._unhealthy_since)
            self._unhealthy_since = None

    def __exit__(self, *exception: object) -> None:
        if self._app is not None:
            from mmrl_ray.serving import launch

            self._close()
            launch.take_away(self._app, for_good=self._joined)


def _nothing() -> None:
    """An inline reward holds nothing to close."""


def app_name(run: RunDir, what: str = "reward") -> str:
    """The name of a run's application on Serve. Runs of one name in different places may share a cluster.

    The same for a run that is resumed: its driver replaces what one that was killed has left.
    """
    return f"{what}-{run.name}-{hashlib.sha256(run.location.encode()).hexdigest()[:8]}"


class LivePolicy:
    """Inactive where it is not asked for. Enter it before anything else starts Serve, which then has no HTTP front."""

    def __init__(self, cfg: Config, run: RunDir, base: str, *, joined: bool = False) -> None:
        """`base` is where the model lies that the run trains an adapter of; `joined`: the Ray outlives the run."""
        self._joined = joined
        wanted = cfg.serving is not None and cfg.serving.live_policy
        # Rewards are the run's own affair while it trains.
        self._app = app_name(run, "live")
        self._cfg: ServeConfig | None = None
        if wanted:
            # Imported here, and below: the server's half of the project, which other runs need not have.
            from mmrl_ray.training.serve import config_of_run

            self._cfg = config_of_run(cfg, run, base).model_copy(update={"reward": None})

    def __enter__(self) -> Self:
        if self._cfg is not None:
            from mmrl_ray.serving import launch
            from mmrl_ray.serving.deployments import application

            launch.start_serve(host=self._cfg.serving.host, port=self._cfg.serving.port)
            launch.deploy(application(self._cfg, insecure=False), self._app, route_prefix="/")
        return self

    def greeting(self) -> list[str]:
        """Where it is and how to ask it, line by line; see `runs.serve.greeting`."""
        if self._cfg is None:
            return []
        from mmrl_ray.training.serve import greeting

        return greeting(self._cfg, insecure=False)

    def __exit__(self, *exception: object) -> None:
        if self._cfg is not None:
            from mmrl_ray.serving import launch

            launch.take_away(self._app, for_good=self._joined)
