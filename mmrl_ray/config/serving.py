"""`serving:` — the gateway, its limits, and the deployments behind it; and a whole config of `mmrl serve`.

`serving.fine_tuning:` is what clients of the gateway may have trained: an allow-list of models and datasets. The names
of the deployments are those in the config, in Serve and in its dashboard.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.engine import EngineSection
from mmrl_ray.config.learner import Algorithm, LearnerSection, RolloutSection, with_preset
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.sections import (
    ActorResources,
    DeploySection,
    ModelSection,
    ResourcesSection,
    SamplerResources,
    Section,
    refuse,
)
from mmrl_ray.config.sft import SftSection

MODEL_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What a served model or adapter may be called; never a path."""
MAX_VLLM_RANK = 512
MAX_ITEMS = 16_384
"""What the limits on lists may be at most: longer bodies are refused before they are parsed."""
_ORIGIN = re.compile(r"https?://([a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_DOMAIN = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[?[0-9a-f:.]+\]?")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}"
APP = "mmrl"
"""The application of `mmrl serve`."""
GATEWAY = "gateway"
POLICY = "policy"
REWARD = "reward"


class RecipeSection(Section):
    """A base model and how it is trained: a config of `mmrl train` without its run and its data."""

    model: ModelSection
    """The checkpoint and its adapter."""
    prompt: str = "Describe the image."
    """The user's turn for rows that bring no prompt of their own."""
    algorithm: Algorithm = "grpo"
    """A preset, as in a config of `mmrl train`."""
    sft: SftSection | None = None
    """A supervised warm start before reinforcement learning; none by default."""
    rollout: RolloutSection = RolloutSection()
    """Sampling and its workers."""
    reward: RewardSection = RewardSection()
    """What a caption earns."""
    learner: LearnerSection
    """Loss, optimiser, and the steps of a job that does not say how many."""
    resources: ResourcesSection = ResourcesSection()
    """What the actors ask Ray for."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, value: Any) -> Any:
        return with_preset(value)


class FineTuningSection(Section):
    """Jobs over HTTP, for keys with the role admin. A client chooses among these and sets a few hyperparameters."""

    models: dict[str, RecipeSection]
    """Recipes by the id that clients call them `model`."""
    datasets: dict[str, str]
    """Locations of datasets by the id that clients call them `training_file` or `validation_file`; all nodes see
    them."""
    root: str | None = None
    """Where the runs of jobs lie; by default `serving.adapters_root`, from which they are served once they have
    something to serve. All nodes see it."""
    address: str | None = None
    """HTTP address of the job server; by default that of the Ray that serves."""
    python: str | None = None
    """Interpreter of jobs; by default `python3`, or the gateway's own where the cluster is one machine."""
    max_steps: int = Field(100_000, ge=1)
    """Steps of one job."""
    max_active: int = Field(4, ge=1)
    """Jobs that run or wait at a time; more of them are refused with 503."""

    @model_validator(mode="after")
    def _ids_fit(self) -> Self:
        wrong = [name for name in (*self.models, *self.datasets) if not re.fullmatch(_NAME, name)]
        refuse(
            {
                f"ids {wrong}: an id has up to 64 letters, digits, dots, dashes, slashes and underscores, and begins "
                "with a letter or digit": bool(wrong),
                "models is empty: name at least one": not self.models,
                "datasets is empty: name at least one": not self.datasets,
            }
        )
        return self


class DeploymentSection(Section):
    """How many replicas a deployment has, and what one of them takes on."""

    min_replicas: int = Field(1, ge=1)
    """Replicas that always run."""
    max_replicas: int = Field(1, ge=1)
    """Replicas under load."""
    target_ongoing_requests: float = Field(8.0, gt=0)
    """Requests a replica should have under way; above it replicas are added, up to `max_replicas`."""
    max_ongoing_requests: int = Field(256, ge=1)
    """Requests sent to one replica at a time; more of them wait."""
    max_queued_requests: int = Field(256, ge=1)
    """Requests that wait for a replica, in each of their senders; more of them are refused with 503."""
    health_check_period_s: float = Field(5.0, gt=0)
    """How often a replica is asked whether it is well."""
    health_check_timeout_s: float = Field(30.0, gt=0)
    """A replica that has not answered by then is replaced."""
    graceful_shutdown_timeout_s: float = Field(30.0, gt=0)
    """A replica that is to go has so long to finish what it is at."""
    graceful_shutdown_wait_loop_s: float = Field(1.0, gt=0)
    """How often a replica that is to go looks whether it is done."""
    resources: ActorResources = ActorResources(cpus=0.0)
    """What one replica asks Ray for. Less than a CPU by default: the policy does the work."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        refuse(
            {
                f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}": self.min_replicas
                > self.max_replicas,
                f"target_ongoing_requests={self.target_ongoing_requests:g} is above "
                f"max_ongoing_requests={self.max_ongoing_requests}: replicas would never be added": (
                    self.target_ongoing_requests > self.max_ongoing_requests
                ),
            }
        )
        return self


class GatewayDeployment(DeploymentSection):
    """The HTTP front: keys, limits, OpenAI's types."""

    target_ongoing_requests: float = Field(64.0, gt=0)
    """Requests a replica should have under way; above it replicas are added, up to `max_replicas`."""
    max_ongoing_requests: int = Field(512, ge=1)
    """Requests sent to one replica at a time; more of them wait."""


class PolicyDeployment(DeploymentSection):
    """The model with its adapters; one replica decodes many requests together."""

    target_ongoing_requests: float = Field(16.0, gt=0)
    """Requests a replica should have under way; above it replicas are added, up to `max_replicas`."""
    resources: SamplerResources = SamplerResources()
    """What one replica asks Ray for."""
    engine: EngineSection = EngineSection()
    """What decodes: the replica itself, or vLLM in a process beside it, which alone loads the model then."""
    max_rows: int = Field(64, ge=1)
    """Completions that one replica decodes at a time, one key's at most three in four of them; requests beyond them
    wait in it."""
    max_queue: int = Field(192, ge=1)
    """Requests that wait in one replica, one key's at most three in four of them; more are refused with 503."""
    vision_cache_mb: int = Field(256, ge=0)
    """Bytes of vision features one replica keeps."""

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        engine, gpus = self.engine, self.resources.gpus
        refuse(
            {
                f"engine.kind={engine.kind} serves nothing: it is local or vllm": engine.kind not in ("local", "vllm"),
                f"engine.tensor_parallel_size={engine.tensor_parallel_size} wants as many GPUs a replica, and "
                f"resources.gpus={gpus:g}": gpus > 0 and (engine.tensor_parallel_size or 1) > max(1, gpus),
            }
        )
        return self


class LimitsSection(Section):
    """What one request may ask for; anything above is refused."""

    max_body_mb: float = Field(32.0, gt=0)
    """Bytes of a request, refused while they arrive."""
    max_images: int = Field(4, ge=1)
    """Images in one conversation, or in one item to score."""
    max_image_mb: float = Field(20.0, gt=0)
    """Bytes of one encoded image."""
    max_scored_images: int = Field(256, ge=1, le=MAX_ITEMS)
    """Images of all items to score in one request."""
    max_megapixels: float = Field(200.0, gt=0)
    """Pixels of all different images of one request, by their headers; one image may have 50 million."""
    max_n: int = Field(16, ge=1)
    """Completions of one request."""
    max_tokens: int = Field(512, ge=1)
    """Tokens of one completion."""
    default_max_tokens: int = Field(64, ge=1)
    """Tokens of one completion where the request does not say."""
    max_messages: int = Field(64, ge=1, le=MAX_ITEMS)
    """Messages in one conversation."""
    max_text_chars: int = Field(16_384, ge=1)
    """Characters of all texts of one conversation, or of one caption or reference."""
    max_captions: int = Field(1024, ge=1, le=MAX_ITEMS)
    """Captions scored in one request."""
    max_references: int = Field(64, ge=1, le=MAX_ITEMS)
    """References of one image."""

    @model_validator(mode="after")
    def _default_fits(self) -> Self:
        if self.default_max_tokens > self.max_tokens:
            raise ValueError(f"default_max_tokens={self.default_max_tokens} is above max_tokens={self.max_tokens}")
        return self


class RateSection(Section):
    """What one key may do; counted in each gateway replica on its own."""

    requests_per_minute: float = Field(60_000.0, gt=0)
    """Requests of one key in the long run."""
    burst: int = Field(1000, ge=1)
    """Requests of one key at once after a pause."""
    concurrency: int = Field(256, ge=1)
    """Requests of one key under way at a time."""


class RemoteImagesSection(Section):
    """Images by URL; off by default."""

    enabled: bool = False
    """Fetch `https://` images that clients name."""
    allowed_domains: list[str] = []
    """The only hosts that are asked: `images.example.com`, or `*.example.com` for every name below it."""
    max_mb: float = Field(10.0, gt=0)
    """Bytes of one image."""
    timeout_s: float = Field(5.0, gt=0)
    """For one image, names, redirects and all."""
    max_redirects: int = Field(3, ge=0)
    """Redirects that are followed; each is checked like the first URL."""
    allow_http: bool = False
    """Also fetch without TLS."""

    @model_validator(mode="after")
    def _domains_fit(self) -> Self:
        wrong = [domain for domain in self.allowed_domains if not _DOMAIN.fullmatch(domain)]
        refuse(
            {
                "enabled=True needs allowed_domains: any host at all would be asked otherwise": self.enabled
                and not self.allowed_domains,
                f"allowed_domains={wrong} are no lower-case host names, nor *. before one": bool(wrong),
            }
        )
        return self


class ServingSection(Section):
    """The gateway and the deployments behind it."""

    host: str = "127.0.0.1"
    """Address the gateway listens on; `0.0.0.0` for every one this machine has."""
    port: int = Field(8000, ge=1, le=65_535)
    """Port the gateway listens on."""
    database: str | None = None
    """SQLAlchemy URL of the keys, for example `postgresql+psycopg://…`; by default an SQLite file under
    `~/.local/share/mmrl_ray`."""
    model_id: str | None = Field(None, pattern=f"^{MODEL_ID}$")
    """What clients call the base model; by default the last part of its path."""
    adapters_root: str | None = None
    """Folder of runs or adapters: each one in it is served under its folder's name once a client asks for it."""
    runs_root: str | None = None
    """Folder, or location that pyarrow knows, of runs whose status admins may see, and whose rollout workers they may
    scale, each under its folder's name."""
    max_adapters: int = Field(8, ge=1)
    """Adapters loaded at a time in one replica; the least recently used goes."""
    max_rank: int = Field(256, ge=1)
    """Rank of an adapter at most."""
    refresh_s: float = Field(2.0, gt=0)
    """How often adapters are looked at for newer versions."""
    live_policy: bool = False
    """Serve the policy while `mmrl train` trains it, each version as it is published."""
    request_timeout_s: float = Field(120.0, gt=0)
    """A request that has no answer by then is given up with 504."""
    gateway: GatewayDeployment = GatewayDeployment()
    """The HTTP front."""
    policy: PolicyDeployment = PolicyDeployment()
    """The model."""
    reward: DeploymentSection = DeploymentSection()
    """The reward."""
    limits: LimitsSection = LimitsSection()
    """What one request may ask for."""
    rate: RateSection = RateSection()
    """What one key may do."""
    remote_images: RemoteImagesSection = RemoteImagesSection()
    """Images by URL."""
    cors_origins: list[str] = []
    """Web pages of these origins may ask the gateway from a browser: `https://app.example.com`, with its port if it has
    one; none by default."""
    preferences: str | None = None
    """SQLAlchemy URL of a store of preferences: keys with the role feedback may label its pairs and bring new ones.
    None by default."""
    preference_lease_s: float = Field(600.0, gt=0)
    """A pair that a rater was handed is kept from other raters for so long, or until it is labelled."""
    fine_tuning: FineTuningSection | None = None
    """Jobs over HTTP; none by default."""

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        rows, n = self.policy.max_rows, self.limits.max_n
        if self.policy.engine.kind == "vllm" and self.max_rank > MAX_VLLM_RANK:
            raise ValueError(f"max_rank={self.max_rank} is above {MAX_VLLM_RANK}, the most that engine.kind=vllm takes")
        if rows < n:
            raise ValueError(f"policy.max_rows={rows} is below limits.max_n={n}: such a request could never be decoded")
        if wrong := [origin for origin in self.cors_origins if not _ORIGIN.fullmatch(origin)]:
            raise ValueError(f"cors_origins={wrong}: write each as scheme://host or scheme://host:port, no path, no *")
        url = self.preferences or ""
        if url.startswith("sqlite:///") and not url.startswith("sqlite:////"):
            raise ValueError(
                f"preferences={url} is relative, and a replica has a folder of its own: write sqlite:////path/to/file.db"
            )
        if self.fine_tuning is not None and self.fine_tuning.root is None and self.adapters_root is None:
            raise ValueError("fine_tuning needs a root for its runs: write fine_tuning.root, or adapters_root")
        return self


class ServeConfig(Section):
    """Everything `mmrl serve CONFIG` needs: what is served, without a training run around it."""

    model: ModelSection
    """The checkpoint; its `lora:` is not used."""
    adapters: dict[str, str] = {}
    """Adapters by the id that clients call them: folders of runs or of PEFT adapters."""
    agent: str | None = None
    """Folder of a value-based run: its agent answers in place of the model, of which it uses the vision tower."""
    prompt: str = "Describe the image."
    """The user's turn of a caption that is asked for without one."""
    reward: RewardSection | None = RewardSection()
    """What a caption earns; null serves no reward."""
    statistics: str | None = None
    """File with the statistics of the training references (a run's `reward/statistics.json`); parts that need
    document frequencies need it."""
    serving: ServingSection = ServingSection()
    """The gateway and the deployments."""
    log_format: Literal["text", "json"] = "text"
    """What the log lines of all replicas are: text for people, or a JSON object each."""
    deploy: DeploySection = DeploySection()
    """Where its pods get what they need, on Kubernetes."""

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        wrong = [name for name in self.adapters if not re.fullmatch(MODEL_ID, name)]
        base = self.serving.model_id
        refuse(
            {
                f"adapters {wrong}: an id has up to 64 letters, digits, dots, dashes and underscores, and begins with "
                "a letter or digit": bool(wrong),
                "adapters do not go with an agent, which is no adapter of the model": bool(
                    self.adapters and self.agent
                ),
                "serving.policy.engine.kind=vllm cannot answer as an agent, which is no language model: leave it at "
                "local": self.agent is not None and self.serving.policy.engine.kind != "local",
                f"adapters: {base!r} is serving.model_id already": base in self.adapters,
                **self.model.engine_problems(
                    self.serving.policy.engine.kind, self.serving.policy.engine.quantization, "serving.policy.engine"
                ),
            }
        )
        return self
