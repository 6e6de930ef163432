"""`Algorithm`: all that the rest of the package asks of one, and `Objective`, its part in a learner's step.

    config        presets ─▶ defaults of `learner:`     section ─▶ `learner.NAME:`     problems ─▶ what is refused
                                     │
                    `learner.loss` names the objective, and with it the family: `LearnerSection.family`
                                     │
    rollouts      samples ─▶ where groups come from: sampled, pairs, another run's log, or an environment
                                     │ scored groups
    controller    weigh ─▶ advantages, per-token weights, one denominator of the step
                                     │ plan
    learner       prepare ─▶ what is learnt beside the adapter      objective ─▶ loss share of each micro-batch
                                     │ metrics
    report        panels ─▶ charts                                  shown ─▶ figures beside the progress bar

A family is one file in this folder and one line in `registry.py`; one of a user's own is a class that
`algorithm: my_module:MyAlgorithm` names. These files are read with every config, so at their top they import neither
torch nor what needs it: only inside the functions that learn. Shapes: `M` groups of `G` completions in a step, `N`
completions of up to `T` tokens in a micro-batch.

Example:
    from dataclasses import replace

    from mmrl_ray.algorithms.base import Algorithm
    from mmrl_ray.losses.aggregation import StepRewards, StepWeights

    class Sharper(Algorithm):
        '''GRPO whose advantages are cubed.'''

        presets = {"sharper": {"advantage": "group", "aggregation": "token_mean"}}

        def weigh(self, step: StepRewards) -> StepWeights:
            found = super().weigh(step)
            return replace(found, advantages=found.advantages**3)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast

from mmrl_ray.config.sections import Section

if TYPE_CHECKING:
    import torch

    from mmrl_ray.config.learner import LearnerSection
    from mmrl_ray.config.schema import Config
    from mmrl_ray.losses.aggregation import LossStats, StepRewards, StepWeights, Sums
    from mmrl_ray.policy.model import Policy
    from mmrl_ray.policy.scoring.collate import LearnerBatch
    from mmrl_ray.policy.scoring.prefix import Scores

Source = Literal["rollouts", "pairs", "stored", "environment"]
"""Completions sampled by the policy; labelled pairs of `data.preferences`; groups of `data.rollouts`; an agent's own
episodes, in which no language model speaks."""
Settings = TypeVar("Settings", bound=Section)


class NoSettings(Section):
    """The section of an algorithm that has no keys of its own."""


@dataclass(frozen=True, slots=True)
class Panel:
    """What one chart of the report shows: metric names or `prefix/` families, in the order of the legend."""

    title: str
    names: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    unit: str = ""
    stacked: bool = False
    band: tuple[str, str] | None = None
    """(mean, std): drawn as a band around the mean."""


class Objective:
    """The loss of one learner, and what it keeps from step to step. The base has no parameters of its own."""

    names: tuple[str, ...] = ()
    """Of the sums that `share` returns, which add over micro-batches and ranks."""
    needs_hidden = False
    """Whether `Scores.hidden` is wanted."""
    learns_without_signal = False
    """Whether a group whose advantages are all 0 has a gradient."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is learnt beside the adapter, in a fixed order; the same values on every rank."""
        return []

    def begin_step(self) -> None:
        """Before the first pass over a step's groups."""

    def share(
        self, batch: LearnerBatch, scores: Scores, proximal: torch.Tensor | None, denominator: float, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One micro-batch's share of the step's loss, and its sums.

        Args:
            batch: what was sampled, and its weights.
            scores: log-probs [N, T] under π_θ, with gradient, and hidden states where they are wanted.
            proximal: log-probs [N, T] at the start of the step, or None for those of `scores` themselves.
            denominator: the whole step's.
            place: of the micro-batch among this rank's of the step; the same in each pass.

        Returns:
            A scalar with gradient, and the detached sums [len(names)].
        """
        raise NotImplementedError

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of an update, out of the sums over all its micro-batches and ranks."""
        return {}

    def after_update(self) -> None:
        """Called once the optimiser has moved."""

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors that a checkpoint keeps for `restore`, beside what lies on the policy."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a checkpoint, in place: optimisers keep their parameters."""


Stats = TypeVar("Stats", bound="Sums")


class SumsObjective(Objective, Generic[Stats]):
    """An objective whose sums and figures are those of a `Sums` class of `losses/`."""

    def __init__(self, stats: type[Stats]) -> None:
        self._stats = stats
        self.names = tuple(field.name for field in fields(stats))

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Those of the `Sums` class."""
        import torch

        values = torch.tensor([sums[name] for name in self.names], dtype=torch.float64)
        return cast(Any, self._stats.from_tensor(values)).metrics()


def policy_gradient_objective(cfg: LearnerSection, loss: str) -> Objective:
    """One of the losses over importance ratios, by its name."""
    from mmrl_ray.losses.aggregation import LossStats

    return _PolicyGradientObjective(LossStats, cfg, loss)


class _PolicyGradientObjective(SumsObjective["LossStats"]):
    def __init__(self, stats: type[LossStats], cfg: LearnerSection, loss: str) -> None:
        super().__init__(stats)
        self._cfg, self._loss = cfg, loss

    def share(
        self, batch: LearnerBatch, scores: Scores, proximal: torch.Tensor | None, denominator: float, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from mmrl_ray.losses.policy_gradient import policy_loss

        found = policy_loss(
            self._loss,
            scores.logprobs,
            proximal,
            batch.behaviour_logprobs,
            batch.advantages,
            scores.mask,
            scales=batch.scales,
            denominator=denominator,
            off_policy_cap=self._cfg.off_policy_cap,
            clip_low=self._cfg.clip_low,
            clip_high=self._cfg.clip_high,
        )
        return found.loss, found.stats.to_tensor()


class Algorithm:
    """A family of algorithms, as a run's `learner:` has chosen it.

    The base class samples rollouts and learns from them by `learner.advantage`, `learner.aggregation` and the clipped
    loss; a subclass overrides what is different.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Defaults of `learner:` keys by the name that `algorithm:` takes. Of a class that is named by its import path the
    first one counts, whatever its name, and `loss` is that path."""
    losses: ClassVar[tuple[str, ...]] = ()
    """Values of `learner.loss` that are this family's."""
    section: ClassVar[type[Section]] = NoSettings
    """Its keys: `learner.NAME:` for a family of this package, `learner.own:` for a class of a user's own."""
    section_name: ClassVar[str | None] = None
    """NAME; None where there are no keys."""
    written_always: ClassVar[bool] = False
    """Whether a resolved config shows the section whatever the algorithm is; others only where it is used."""
    samples: ClassVar[Source] = "rollouts"
    """Where the groups come from."""
    has_teacher: ClassVar[bool] = False
    """Whether log-probs of `teacher:` are made beside sampling, in the place of a reference's."""
    panels: ClassVar[tuple[Panel, ...]] = ()
    """Charts of its own metrics."""
    shown: ClassVar[Mapping[str, str]] = {}
    """Metrics that stand beside the progress bar, and what they are called there."""

    def __init__(self, learner: LearnerSection) -> None:
        self.learner = learner

    def settings(self, kind: type[Settings]) -> Settings:
        """The keys of the family's own section, which is of that class."""
        if self.section_name is not None and hasattr(self.learner, self.section_name):
            found = getattr(self.learner, self.section_name)
        else:
            found = self.section.model_validate(self.learner.own)
        assert isinstance(found, kind)
        return found

    # -- config ----------------------------------------------------------------------------------------------------

    @property
    def is_offline(self) -> bool:
        """Whether it learns from what this policy did not sample."""
        return self.samples in ("pairs", "stored")

    @property
    def trains_adapter(self) -> bool:
        """Whether the adapter's weights move."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of the policy that training started from are made beside sampling."""
        return self.learner.kl.weight > 0

    @property
    def decoding_beta(self) -> float:
        """The weight of values that captions of a finished run are decoded with; 0 without values."""
        return 0.0

    def value_width(self, hidden: int) -> int | None:
        """Width of the layer inside value heads over the vocabulary, of a policy of that hidden width; None without."""
        return None

    @property
    def implicit_reward_scale(self) -> float:
        """β of the implicit reward β·log(π/π_ref), by which held-out pairs are measured."""
        return 1.0

    def learner_problems(self) -> dict[str, bool]:
        """Messages about `learner:` keys alone, each with whether it holds."""
        return {}

    def problems(self, cfg: Config) -> dict[str, bool]:
        """Messages about the whole config, each with whether it holds."""
        return {}

    def rounds_told(self, cfg: Config) -> list[str]:
        """What a dry run says in place of token batches, of a family with an environment."""
        return []

    def memory_told(self, cfg: Config, pictures: int | None, width: int) -> list[str]:
        """What a dry run says of its memory, for so many pictures whose features have that width."""
        return []

    # -- controller ------------------------------------------------------------------------------------------------

    def weigh(self, step: StepRewards) -> StepWeights:
        """What each completion of a step weighs, from what all of them earned."""
        from mmrl_ray.losses.aggregation import weigh

        cfg = self.learner
        return weigh(step, cfg.advantage, cfg.aggregation, divide_by_std=cfg.advantage_std)

    # -- learner ---------------------------------------------------------------------------------------------------

    def prepare(self, policy: Policy, seed: int) -> None:
        """Puts on a fresh policy what is learnt beside the adapter and decoded or published with it."""

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        """The loss. The same policy and seed give the same one on every rank."""
        return policy_gradient_objective(self.learner, "clipped")
