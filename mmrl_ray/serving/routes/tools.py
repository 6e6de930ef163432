"""What every route that gives work needs, made once an app."""

from __future__ import annotations

from dataclasses import dataclass

from mmrl_ray.config.serving import LimitsSection
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.serving.http_errors import problem
from mmrl_ray.serving.metrics import GatewayMetrics
from mmrl_ray.serving.openai_types import Sampled
from mmrl_ray.serving.routes.deps import GatewayDeps
from mmrl_ray.serving.routes.pictures import Pictures


@dataclass(frozen=True, slots=True)
class Tools:
    """The services, and what checks and counts on the way to them."""

    deps: GatewayDeps
    pictures: Pictures
    metrics: GatewayMetrics

    @property
    def limits(self) -> LimitsSection:
        """What one request may ask for."""
        return self.deps.settings.limits

    @property
    def timeout_s(self) -> float:
        """For a body to arrive, and then for its answer."""
        return self.deps.settings.request_timeout_s

    def sampling(
        self, request: Sampled, *, max_tokens: int | None, temperature: float, name: str = "max_tokens"
    ) -> SamplingParams:
        """How completions are drawn; `temperature` where the request names none.

        Raises:
            HTTPException: 400, more completions or tokens than are allowed.
        """
        at_most("n", request.n or 1, self.limits.max_n)
        tokens = self.limits.default_max_tokens if max_tokens is None else max_tokens
        at_most(name, tokens, self.limits.max_tokens)
        at_most("stop", sum(map(len, request.stops)), self.limits.max_text_chars, "characters")
        return request.sampling(tokens, temperature)


def at_most(param: str, value: int, limit: int, what: str = "") -> None:
    """Refuses what is above a limit.

    Raises:
        HTTPException: 400.
    """
    if value > limit:
        given = f"{value:,}" if value < 10**15 else "too large a number"
        raise problem(
            400,
            f"{param}: {given}{what and ' '}{what} is above {limit:,}, the most accepted",
            code="above_limit",
            param=param,
        )
