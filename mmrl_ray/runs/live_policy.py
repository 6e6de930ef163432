"""`serving.live_policy`: the gateway and the policy of a run, up while it trains.

The learner puts each version it publishes into `live/` of the run folder; policy replicas look there every
`serving.refresh_s` and take the newest up beside the one they have. Until the first version there is the base alone.
What a driver that was killed has left on a cluster's Serve is taken over when its run is resumed.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from mmrl_ray.config import Config
from mmrl_ray.run_dir import RunDir
from mmrl_ray.runs.reward_app import app_name
from mmrl_ray.runs.serve import config_of_run, greeting


class LivePolicy:
    """Nothing where it is not asked for. Enter it before anything else starts Serve, which then has no HTTP front."""

    def __init__(self, cfg: Config, run: RunDir, base: str, *, joined: bool = False) -> None:
        """`base` is where the model lies that the run trains an adapter of; `joined`: the Ray outlives the run."""
        self._joined = joined
        wanted = cfg.serving is not None and cfg.serving.live_policy
        # Rewards are the run's own affair while it trains.
        self._app = app_name(run, "live")
        self._cfg = config_of_run(cfg, run, base).model_copy(update={"reward": None}) if wanted else None

    def __enter__(self) -> Self:
        if self._cfg is not None:
            from mmrl_ray.serving import launch
            from mmrl_ray.serving.deployments import application

            launch.start_serve(host=self._cfg.serving.host, port=self._cfg.serving.port)
            launch.deploy(application(self._cfg, insecure=False), self._app, route_prefix="/")
        return self

    def greeting(self) -> list[str]:
        """Where it is and how to ask it, line by line; see `runs.serve.greeting`."""
        return greeting(self._cfg, insecure=False) if self._cfg is not None else []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cfg is not None:
            from mmrl_ray.serving import launch

            launch.take_away(self._app, for_good=self._joined)
