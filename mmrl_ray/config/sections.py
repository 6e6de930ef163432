"""The shorter sections: `run:`, `data:`, `eval:`, `resources:` …

`deploy:` holds what manifests for Kubernetes need beside the run itself (`mmrl deploy render`). How many actors there
are and what each asks for is said by the other sections, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section as Section
from mmrl_ray.config.base import refuse as refuse
from mmrl_ray.config.policy import LoraSection as LoraSection
from mmrl_ray.config.policy import ModelSection as ModelSection
from mmrl_ray.config.policy import QuantizationSection as QuantizationSection
from mmrl_ray.config.policy import TeacherSection as TeacherSection

_NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""What Kubernetes lets an object be called."""
MOST_PICTURE_PROCESSES = 2
"""That an actor takes unasked: 40 pictures of a megapixel a second."""
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"


class RunSection(Section):
    """Names a run; every random choice in it derives from `seed`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Folder name of the run under `root`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice of the run derives from it."""
    root: str = "runs"
    """Folder, or any pyarrow.fs URI, that every node sees."""
    log_format: Literal["text", "json"] = "text"
    """What the log lines of all its processes are: text for people, or a JSON object each."""


class ScenesSection(Section):
    """Generate the scenes dataset into `data.train` and `data.eval` when they are not there yet."""

    train: int = Field(2000, ge=1)
    """Images in the training split."""
    eval: int = Field(200, ge=1)
    """Images in the held-out split, with attribute combinations never seen in training."""
    image_size: int = Field(64, ge=32, le=1024)
    """Pixels a side."""
    seed: int = 0
    """Seeds the generator."""
    max_objects: int = Field(3, ge=1, le=3)
    """Objects a picture has at most."""


class PreferencesSection(Section):
    """Pairs of captions and what people said of them, for algorithms that learn from pairs."""

    store: str
    """SQLAlchemy URL of the store that `mmrl preferences` fills: `sqlite:///preferences.db`, `postgresql+psycopg://…`.
    Its pairs are copied into the run's folder at the start, so that later labels change no run."""
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of the pictures whose pairs are kept from training, to measure on before and after."""


class RolloutsSection(Section):
    """Rollouts of another run, for algorithms that learn from stored ones."""

    run: str
    """Its folder. What is used of it is copied into this run's own folder at the start."""
    first_step: int = Field(0, ge=0)
    """Of its rollout log, from this step on."""
    last_step: int | None = Field(None, ge=0)
    """Up to this step and with it; to the end by default."""
    policy: Literal["base", "adapter"] = "base"
    """Whose next tokens are weighed: `base` is the model (after its warm start) as it is here, `adapter` puts that
    run's final adapter on it."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        backwards = self.last_step is not None and self.last_step < self.first_step
        refuse({f"last_step={self.last_step} is below first_step={self.first_step}": backwards})
        return self


class DataSection(Section):
    """Parquet shards in the Hugging Face `datasets` image layout."""

    train: str
    """Folder or file of Parquet shards, on any pyarrow.fs location."""
    eval: str | None = None
    """Held-out split; without it a run evaluates on nothing and says so."""
    prompt: str = "Describe the image."
    """The user's turn for rows that bring no prompt of their own."""
    max_quarantined: int = Field(20, ge=0)
    """Broken samples a run tolerates before it stops; as many in the held-out split, and in the warm start."""
    scenes: ScenesSection | None = None
    """Generate the scenes dataset; none by default."""
    preferences: PreferencesSection | None = None
    """What an algorithm of pairs learns from; none by default."""
    rollouts: RolloutsSection | None = None
    """What an algorithm of stored rollouts learns from; none by default."""


MEASURES = (
    *("reward", "reward/sigma", "cider_d", "rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4"),
    *("attributes/precision", "attributes/recall", "attributes/f1", "caption/words", "caption/distinct"),
)
"""Of captions, by name (`evaluation/scores.py`), beside `reward/PART` for the parts of a reward."""
_NO_MERIT = ("reward/sigma", "caption/words", "caption/distinct")
"""More of these is not better."""


class EvalSection(Section):
    """Greedy captions of `data.eval`: always before and after, and with `every` beside the learning, too, by which the
    best checkpoint is chosen."""

    every: int | None = Field(None, ge=1)
    """Steps from one evaluation to the next while the run learns, each of which is a checkpoint; by default none."""
    samples: int | None = Field(None, ge=1)
    """Of every evaluation: the first so many rows; all by default."""
    metrics: list[str] = ["cider_d", "bleu_4", "rouge_l", "reward", "caption/words", "caption/distinct"]
    """What is logged as `eval/…`: names of measures, or `reward/PART`."""
    metric: str = "cider_d"
    """The measure that decides which checkpoint is the best: one takes the place of the best so far where the 95 %
    interval of the difference, paired by sample, lies above 0."""
    patience: int | None = Field(None, ge=1)
    """The run ends after so many evaluations in a row without a new best; by default it takes all its steps."""
    min_steps: int = Field(0, ge=0)
    """`patience` does not end it before."""

    @property
    def logged(self) -> tuple[str, ...]:
        """`metrics`, each once, with `metric`."""
        return tuple(dict.fromkeys([self.metric, *self.metrics]))

    def is_due(self, step: int) -> bool:
        """Whether so many finished steps are evaluated beside the learning."""
        return self.every is not None and step > 0 and step % self.every == 0

    def ends(self, step: int, since_best: int) -> bool:
        """Whether `patience` is at its end after the evaluation of `step`, the `since_best`-th without a new best."""
        return self.patience is not None and since_best >= self.patience and step >= self.min_steps

    def problems(self, parts: Sequence[str], steps: int, *, is_held_out: bool) -> dict[str, bool]:
        """What does not fit together: with the names of the reward's parts, the run's steps, and `data.eval`."""
        every, wanted = self.every, [*self.metrics, self.metric]
        known = [*MEASURES, *(f"reward/{part}" for part in parts)]
        unknown = [name for name in dict.fromkeys(wanted) if not _is_measure(name, known, parts)]
        alone = [name for name in ("patience", "min_steps") if getattr(self, name)] if every is None else []
        return {
            **{
                f"eval.{'metric' if name == self.metric else 'metrics'}={name} is no measure of captions; there are "
                f"{', '.join(known)}": True
                for name in unknown
            },
            f"eval.metric={self.metric} decides which checkpoint is the best, and more of it is not better: write "
            "cider_d, reward or another of eval.metrics": self.metric in _NO_MERIT,
            f"eval.every={every} evaluates held-out captions, and there are none: write data.eval": (
                every is not None and not is_held_out
            ),
            f"eval.samples=1 with eval.every={every}: one sample has no interval to choose the best checkpoint by": (
                every is not None and self.samples == 1
            ),
            f"eval.every={every} is above learner.steps={steps}: the run would end before its first evaluation": (
                every is not None and every > steps
            ),
            f"eval.{' and eval.'.join(alone)}: {'is' if len(alone) == 1 else 'are'} of evaluations while the run "
            "learns: write eval.every, too": bool(alone),
            f"eval.min_steps={self.min_steps} holds eval.patience back, and there is no patience: write "
            "eval.patience, too": every is not None and self.min_steps > 0 and self.patience is None,
            f"eval.min_steps={self.min_steps} is above learner.steps={steps}: eval.patience would never end the run": (
                self.patience is not None and self.min_steps > steps
            ),
        }


def _is_measure(name: str, known: Sequence[str], parts: Sequence[str]) -> bool:
    """A part may have parts of its own, `reward/caption/bleu`, which only its captions tell."""
    return name in known or any(name.startswith(f"reward/{part}/") for part in parts)


class ActorResources(Section):
    """One actor's share."""

    cpus: float = Field(1.0, ge=0)
    """CPUs Ray reserves for one actor; 0 reserves none."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of one actor; a fraction shares a GPU."""
    threads: int | None = Field(None, ge=1)
    """Torch threads; by default a node's cores ÷ the run's processes that calculate on CPUs, and at least `cpus`. The
    dry run says how many. Several runs on one machine: give each its part."""
    node_labels: dict[str, str] = {}
    """Only nodes with these labels take the actor (`ray start --labels`); any node by default. What `mmrl deploy
    render` writes has a label for each group of pods and names it here."""


class SamplerResources(ActorResources):
    """One actor's share where it samples."""

    picture_processes: int | None = Field(None, ge=0)
    """Processes of one actor that make pictures ready while its model is at work, about 400 MB of host memory each,
    beside their pixels; 0 has the actor do so itself. By default none on a CPU, which they would take from the model,
    and on a GPU one less than `cpus`, at most 2."""

    @property
    def prompt_processes(self) -> int:
        """So many."""
        if self.picture_processes is not None:
            return self.picture_processes
        return min(max(int(self.cpus) - 1, 0), MOST_PICTURE_PROCESSES) if self.gpus else 0


class ResourcesSection(Section):
    """Learner and rollout workers on different devices, or sharing them."""

    placement: Literal["shared", "split"] = "shared"
    """`shared`: a learner and a rollout worker take turns on one GPU, each with a fraction of it; `split`: every actor
    has whole GPUs of its own. Without GPUs it changes nothing."""
    learner: ActorResources = ActorResources()
    """Each learner worker's share."""
    rollout: SamplerResources = SamplerResources()
    """Each rollout worker's share."""
    reward: ActorResources = ActorResources(cpus=0.0)
    """Each replica's share where `reward.host` is `serve`. A reward of words needs no CPU of its own: the worker whose
    captions it scores waits meanwhile."""
    teacher: ActorResources = ActorResources()
    """Each teacher's share, where the run has a `teacher:`."""
    placement_timeout_s: float = Field(300.0, gt=0)
    """An actor that Ray has not placed by then is an error."""
    object_store_mb: int | None = Field(None, ge=80)
    """Size of a local Ray's object store; ignored on an existing cluster."""

    @property
    def takes_turns(self) -> bool:
        """Whether learners and rollout workers take turns on GPUs."""
        return self.placement == "shared" and self.learner.gpus > 0 and self.rollout.gpus > 0

    @model_validator(mode="after")
    def _placement_fits(self) -> Self:
        learner, rollout = self.learner.gpus, self.rollout.gpus
        if self.placement == "shared" and learner > 0 and rollout > 0 and learner + rollout > 1:
            raise ValueError(
                f"placement=shared puts a learner and a rollout worker on one GPU, but learner.gpus={learner:g} and "
                f"rollout.gpus={rollout:g} add up to more than 1: write fractions, or placement: split"
            )
        if self.placement == "split" and (learner % 1 or rollout % 1):
            raise ValueError(
                f"placement=split gives every actor whole GPUs, but learner.gpus={learner:g} and "
                f"rollout.gpus={rollout:g}: write whole numbers, or placement: shared"
            )
        return self


class TolerationSection(Section):
    """A taint that pods put up with."""

    key: str | None = None
    """The taint; all of them where `operator` is `Exists`."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether the taint's value matters."""
    value: str | None = None
    """The taint's value, with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """What the taint does; any by default."""


class PodsSection(Section):
    """One kind of pod."""

    memory: str = Field("16Gi", pattern=_QUANTITY)
    """Of one pod; a part of it is Ray's object store."""
    min_replicas: int | None = Field(None, ge=0)
    """Pods that always run; by default as many as a job needs, and none in a cluster that waits for jobs."""
    max_replicas: int | None = Field(None, ge=1)
    """Pods at most; by default as many as the config can use."""
    node_selector: dict[str, str] = {}
    """Labels of the Kubernetes nodes that may take them."""
    tolerations: list[TolerationSection] = []
    """Taints that they put up with."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        low, high = self.min_replicas, self.max_replicas
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_replicas={low} is above max_replicas={high}")
        return self


class ActorPodsSection(PodsSection):
    """Pods of a run's own actors."""

    actors_per_pod: int = Field(1, ge=1)
    """Actors that share a pod, such as the learners of one machine with several GPUs."""


class HeadSection(Section):
    """The head pod: Ray's control plane, and the driver of a run. It takes no actors that ask for a CPU."""

    cpus: float = Field(4.0, gt=0)
    """Of the pod."""
    memory: str = Field("16Gi", pattern=_QUANTITY)
    """Of the pod; the driver prepares data and statistics in it."""
    node_selector: dict[str, str] = {}
    """Labels of the Kubernetes nodes that may take it."""
    tolerations: list[TolerationSection] = []
    """Taints that it puts up with."""


class StorageSection(Section):
    """Where runs, data and models lie: a volume that every pod mounts, or an object store."""

    mount_path: str = Field("/mnt/mmrl", pattern=r"^/[^:]+$")
    """Where pods see the volume; relative paths of the config start here."""
    claim: str = Field("mmrl", pattern=_NAME)
    """Name of the PersistentVolumeClaim."""
    create: bool = True
    """Write the claim, too; otherwise it is there already."""
    size: str = Field("200Gi", pattern=_QUANTITY)
    """Of the claim that is written."""
    storage_class: str | None = None
    """One whose volumes many nodes can write (ReadWriteMany); the cluster's default otherwise."""
    uri: str | None = Field(None, pattern=r"^[a-z0-9]+://.+$")
    """Location on an object store instead of a volume, such as `s3://bucket/prefix`: relative paths start there."""


class RedisSection(Section):
    """Where Ray's head keeps its state, so that a new head goes on where the old one was."""

    address: str = "redis:6379"
    """Host and port, or a URL."""
    password_secret: str = Field("mmrl-redis", pattern=_NAME)
    """Secret with its password."""
    password_key: str = "password"
    """Key of the password in the secret."""


class DeploySection(Section):
    """Everything that is Kubernetes' affair and not the run's."""

    name: str | None = Field(None, pattern=_NAME)
    """What objects are called; by default the run's name, or the served model's."""
    namespace: str = Field("mmrl", pattern=_NAME)
    """Namespace of all objects."""
    image: str = "mmrl-ray:gpu"
    """Made by `docker/Dockerfile.gpu`, or by `docker/Dockerfile.cpu` where no actor has a GPU."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes fetch the image."""
    pull_secrets: list[str] = []
    """Secrets for the image's registry."""
    service_account: str | None = None
    """Service account of the pods, for example one with access to a bucket."""
    token_secret: str = Field("mmrl-ray-token", pattern=_NAME)
    """Secret whose key `auth_token` is Ray's token; whoever has it runs code on the cluster."""
    env_secrets: list[str] = []
    """Secrets whose keys become environment variables: `HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, `PGPASSWORD`, …"""
    gpu_resource: str = "nvidia.com/gpu"
    """What the cluster calls its GPUs."""
    storage: StorageSection = StorageSection()
    """Where runs, data and models lie."""
    redis: RedisSection | None = RedisSection()
    """Fault tolerance of Ray's head in a RayCluster and a RayService; null for none. A RayJob has none: its driver
    dies with the head, and the retry goes on from the newest checkpoint on a cluster of its own."""
    retries: int = Field(3, ge=0)
    """How often a RayJob that failed is tried again; each time the run goes on from its newest checkpoint."""
    keep_s: int = Field(3600, ge=0)
    """A RayJob's cluster goes so long after the job."""
    idle_s: int = Field(300, ge=1)
    """A pod without work for so long is taken away, down to its group's minimum."""
    operator_namespace: str = Field("kuberay-operator", pattern=_NAME)
    """Where the KubeRay operator runs: it alone reaches Ray's ports from outside the cluster's own pods."""
    client_namespaces: list[str] = []
    """Namespaces whose pods may call the gateway; only the objects' own by default."""
    head: HeadSection = HeadSection()
    """The head pod."""
    learner: ActorPodsSection = ActorPodsSection()
    """Pods of learners; with `resources.placement: shared` on GPUs also of the rollout workers beside them."""
    rollout: ActorPodsSection = ActorPodsSection()
    """Pods of rollout workers."""
    serving: PodsSection = PodsSection()
    """Pods of policy, gateway, reward and teacher where they ask for CPUs or GPUs; one replica of each a pod."""
