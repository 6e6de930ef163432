"""The carriers between sampling and learning, in the order in which data becomes them.

    Sample → Completion → RolloutGroup → RewardBreakdown → ScoredGroup → StepPlan → tensors (policy/scoring/collate.py)

Frozen, slotted, picklable. `G` completions a group, `T` tokens a completion, `P` tokens a prompt, `M` groups a step.
Bulk data (`RolloutGroup`) travels through the object store by reference; what the controller handles is
`ScoredGroup.summary`, a few hundred bytes a group.

Beside them the seeds of a run: every random choice derives from the run's seed and from *what* is drawn, never from who
draws it or when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmrl_ray.config.reward import Normalization
from mmrl_ray.data.row import pickled_by_fields
from mmrl_ray.data.samples import Sample

if TYPE_CHECKING:  # a process that only passes carriers on (a gateway, a reward) needs no 200 MB of torch
    import torch

FinishReason = Literal["stop", "length", "cancelled"]
IMAGE, TEXT = "image", "text"
MODALITIES = (IMAGE, TEXT)
"""What a caption is an answer to: the picture's tokens, and those of the prompt around them."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions of one prompt are drawn.

    Example:
        >>> SamplingParams(temperature=0.7, max_new_tokens=24, seed=group_seed(0, step=3, index=1)).top_k
        0
    """

    temperature: float = 1.0
    """Above 0; `greedy` ignores it for the choice of tokens, the log-probs still use it."""
    max_new_tokens: int = 32
    min_new_tokens: int | None = 0
    """None leaves it to the checkpoint's generation config, where that is obeyed; elsewhere it is 0."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    greedy: bool = False
    value_beta: float = 0.0
    """β of decoding with log π + β(Q − V), of a policy with value heads; 0 is the policy itself."""
    stop: tuple[str, ...] = ()
    """Further stop strings beside the model's end-of-sequence tokens."""
    seed: int = 0
    """Seeds the group's own generator."""


class TruncatedCaption(str):
    """A caption that ran into the limit of tokens: it has no end of its own. Any other text has ended by itself.

    A `str` like any other for whoever does not care.
    """

    __slots__ = ()


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled caption.

    Example:
        >>> cut_off = Completion(torch.tensor([11, 4]), torch.tensor([-0.2, -1.1]), "a cat", "length")
        >>> type(cut_off.caption).__name__
        'TruncatedCaption'
    """

    token_ids: torch.Tensor
    """int64 [T], the end-of-sequence token included when it was sampled."""
    logprobs: torch.Tensor
    """float32 [T], of the distribution that was sampled from (the behaviour policy)."""
    text: str
    finish_reason: FinishReason
    reference_logprobs: torch.Tensor | None = None
    """float32 [T], under the reference policy; only when the KL weight is not 0."""

    @property
    def caption(self) -> str:
        """The text as rewards are given it: they can tell whether it ended by itself."""
        return self.text if self.finish_reason == "stop" else TruncatedCaption(self.text)


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class PromptSource:
    """A prompt before its processor, for an engine that has one of its own."""

    token_ids: torch.Tensor
    """int64, one placeholder for each picture."""
    images: tuple[bytes | torch.Tensor, ...]
    """In the order of their placeholders: encoded files, or RGB uint8 [height, width, 3]."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt after chat template and processor: all that the model needs but the vision features.

    Example:
        >>> pixels = {"pixel_values": torch.zeros(1, 3, 64, 64), "attention_mask": torch.ones(6)}
        >>> EncodedPrompt(torch.tensor([1, 32000, 32000, 32000, 32000, 5]), pixels, "sha256/…").input_ids.shape
        torch.Size([6])
    """

    input_ids: torch.Tensor
    """int64 [P], image placeholders expanded, no padding."""
    model_inputs: Mapping[str, torch.Tensor]
    """The processor's other outputs: per-token ones are [P], per-image ones as the processor made them."""
    image_key: str
    """Content hash of the images, processor settings and model revision: the key of the vision cache."""
    source: PromptSource | None = None
    """Only where the engine that samples asked for it (`GenerationEngine.prepared`)."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the frozen vision tower and projector made of one sample's images.

    Example:
        >>> VisionFeatures(torch.zeros(576, 4096, dtype=torch.bfloat16)).nbytes
        4718592
    """

    tokens: torch.Tensor
    """[image tokens, d], in placeholder order."""
    deepstack: tuple[torch.Tensor, ...] = ()
    """Per-layer features [image tokens, d] of models that feed several (Qwen3-VL)."""

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.deepstack))

    def cpu(self) -> VisionFeatures:
        """On the CPU."""
        return VisionFeatures(self.tokens.cpu(), tuple(tensor.cpu() for tensor in self.deepstack))


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class CaptionState:
    """What a caption and its sample look like from inside the policy; means over tokens, float32 [d] each."""

    action: torch.Tensor
    """Of the embeddings of the caption's tokens, without the end of the turn."""
    modalities: Mapping[str, torch.Tensor]
    """"image" and "text" (the prompt): of the language model's input embeddings."""
    hidden: torch.Tensor
    """Of the last hidden states that the caption's tokens were chosen from."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G completions of one sample, and what the learner needs to score them again.

    Example:
        >>> sample = Sample("img-7", (b"PNG of 40 KB",), "Describe the image.", ("a red circle",))
        >>> prompt = EncodedPrompt(torch.tensor([1, 32000, 5]), {}, "sha256/…")
        >>> completion = Completion(torch.tensor([11, 4, 2]), torch.tensor([-0.2, -1.1, -0.1]), "a circle", "stop")
        >>> group = RolloutGroup(sample, prompt, (completion,), policy_version=3, sampling=SamplingParams(seed=9))
        >>> group.completions[0].logprobs.shape == group.completions[0].token_ids.shape
        True
    """

    sample: Sample
    prompt: EncodedPrompt
    completions: tuple[Completion, ...]
    policy_version: int
    sampling: SamplingParams
    greedy: Completion | None = None
    """The greedy caption, when the baseline needs one; never trained on."""
    vision: VisionFeatures | None = None
    """Shipped with the group when that is cheaper than a second pass through the tower."""
    state: CaptionState | None = None
    """Of the first completion, where an evaluation asked for it."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class GroupKey:
    """Names one group of a run: the step it was composed for, its place in it, and which try this is.

    Example:
        >>> GroupKey(3, 0)
        GroupKey(step=3, index=0, attempt=0)
    """

    step: int
    index: int
    attempt: int = 0


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class RewardBreakdown:
    """What one caption earned, and from what.

    `total` equals the sum of `weights[k] * parts[k]` over the keys of `weights`. A composed reward keeps the parts of
    its parts beside them, under `outer/inner` names that have no weight of their own, and the standard deviation of a
    part that has one under `outer/sigma`.

    Example:
        >>> earned = RewardBreakdown(0.75, {"bleu": 1.0, "length": 0.5}, {"bleu": 1.0, "length": -0.5}, 0.25, risk=1.0)
        >>> earned.adjusted
        0.5
    """

    total: float
    parts: Mapping[str, float]
    weights: Mapping[str, float]
    sigma: float | None = None
    """Standard deviation of the total where the reward has a model of its own noise."""
    risk: float = 0.0
    """kappa: how many standard deviations learning takes off the total."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Parts of weight 0 that could not score this caption, each with its reason; they are not among `parts`."""

    @property
    def adjusted(self) -> float:
        """What learning uses: total - risk * sigma."""
        return self.total if self.sigma is None else self.total - self.risk * self.sigma

    @property
    def magnitude(self) -> float:
        """Sum of |weight · part|: the size of the numbers that `adjusted` is made of, which says how exact it is."""
        return sum(abs(weight * self.parts.get(name, 0.0)) for name, weight in self.weights.items())


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class RewardFailure:
    """Why a caption has no reward; it is masked and counted, never scored 0.

    Example:
        >>> RewardFailure("TimeoutError: no answer within 10 s").reason
        'TimeoutError: no answer within 10 s'
    """

    reason: str
    """One line."""


Score = RewardBreakdown | RewardFailure
"""What one caption earned, or why nobody knows."""


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group's rewards and sizes, light enough for the controller; the group itself is behind `payload`.

    Example:
        >>> rewards = (RewardBreakdown(0.5, {"bleu": 0.5}, {"bleu": 1.0}), RewardFailure("no answer within 10 s"))
        >>> scored = ScoredGroup(GroupKey(3, 0), "img-7", 3, 261, completion_tokens=(9, 7), rewards=rewards)
        >>> scored.failures
        ('no answer within 10 s',)
    """

    key: GroupKey
    sample_id: str
    policy_version: int
    prompt_tokens: int
    completion_tokens: tuple[int, ...]
    """T of each completion, length G."""
    rewards: tuple[Score, ...]
    """One a completion; a completion without a reward takes no part in learning. Empty when the group is masked."""
    greedy_reward: Score | None = None
    kl1: tuple[float, ...] = ()
    """Sum over tokens of behaviour minus reference log-prob, one a completion; empty without a reference. With the k1
    estimator the step plan takes `weight * kl1` off each reward before the baseline."""
    masked: str | None = None
    """Why no completion of the group has a reward, or None."""
    truncated: tuple[bool, ...] = ()
    """Whether each completion ran into the limit of tokens; empty in checkpoints from before it was kept."""
    payload: Any = None
    """`RolloutGroup` itself (in-process), or where it lies in the object store."""
    worker: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase: sample, reference, reward."""
    counters: Mapping[str, float] = field(default_factory=dict)
    """Counts by name: vision_hits, vision_misses, naive_path, …"""
    sight: Mapping[str, float] = field(default_factory=dict)
    """Of an evaluation that asked for it: figures of `analysis/sight.py`, empty where it could not be looked at."""

    @property
    def failures(self) -> tuple[str, ...]:
        """The reason of each completion without a reward."""
        if self.masked is not None:
            return (self.masked,) * len(self.completion_tokens)
        return tuple(score.reason for score in self.rewards if not isinstance(score, RewardBreakdown))


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """One group of a step with its learning weights.

    Example:
        >>> weights = {"advantages": (0.5, -0.5, 0.0), "scales": (1.0, 1.0, 0.0)}  # the third has no reward
        >>> sizes = {"completion_tokens": (9, 7, 8), "prompt_tokens": 261, "payload": None}
        >>> PlannedGroup(GroupKey(3, 0), "img-7", staleness=0, **weights, **sizes).learned_tokens
        (9, 7)
    """

    key: GroupKey
    sample_id: str
    staleness: int
    advantages: tuple[float, ...]
    """[G], after the baseline; the R of the reward-guided loss. 0 for a completion without a reward."""
    scales: tuple[float, ...]
    """[G], each completion's per-token weight before the denominator (1, or 1 ÷ its length); 0 for one without a
    reward, which the learner leaves out."""
    completion_tokens: tuple[int, ...]
    prompt_tokens: int
    payload: Any
    rewards: tuple[float | None, ...] = ()
    """[G], what the baseline saw: the totals after risk, normalisation and the k1 penalty; None without a reward."""
    normalization: Normalization = "none"
    """Whether parts of the reward were normalised by their group."""

    @property
    def has_signal(self) -> bool:
        """Whether any completion has a weight other than 0."""
        return any(a != 0.0 for a in self.advantages)

    @property
    def learned(self) -> tuple[int, ...]:
        """Places of the completions that take part."""
        return tuple(i for i, scale in enumerate(self.scales) if scale > 0.0)

    @property
    def learned_tokens(self) -> tuple[int, ...]:
        """T of each completion that takes part."""
        return tuple(self.completion_tokens[i] for i in self.learned)


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one optimiser step consumes.

    Example:
        >>> sizes = {"completion_tokens": (9, 7), "prompt_tokens": 261, "payload": None}
        >>> planned = PlannedGroup(GroupKey(3, 0), "img-7", 0, (0.5, -0.5), (1.0, 1.0), **sizes)
        >>> plan = StepPlan(3, (planned,), denominator=16.0, micro_batches=(((0,),), ()))  # the second rank has none
        >>> [plan.groups[i].sample_id for i in plan.micro_batches[0][0]]
        ['img-7']
    """

    step: int
    """0-based; consuming it turns policy version `step` into `step + 1`."""
    groups: tuple[PlannedGroup, ...]
    denominator: float
    """Of every policy-gradient and KL term, over all ranks and micro-batches."""
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """[rank][micro-batch][group index]: whole groups under the token budget, balanced over ranks."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Reward, staleness, masked and dropped figures of the step, merged into its metrics line."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any number of integers and names; stable over processes, platforms and Python versions."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def group_seed(seed: int, step: int, index: int) -> int:
    """Seed of the group at place `index` of `step`: the same on whichever worker, at whichever attempt."""
    return derive_seed(seed, "group", step, index)
