"""`value_based:` — deep Q-learning over pictures and words, beside what `learner:` and `rollout:` say.

What a value-based run takes from elsewhere: `learner.steps`, `lr`, `lr_min`, `warmup_steps`, `max_grad_norm`,
`checkpoint_every` and `keep_checkpoints`; of `rollout` workers, deadlines and the vision cache; `reward`, `data`,
`model` and `sft` whole. Its words are those of `vocabulary`, not the model's tokens: of the model it uses the frozen
vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.algorithms.base import Algorithm, Panel
from mmrl_ray.config.sections import Section, refuse

if TYPE_CHECKING:
    from mmrl_ray.config.schema import Config

_FLOAT32 = 4
Fusion = Literal["shared_attention", "coupled_encoders", "attention", "weighted_sum"]


class ExplorationSection(Section):
    """How the agent tries what it does not think best, and how that fades."""

    kind: Literal["epsilon_greedy", "boltzmann"] = "epsilon_greedy"
    """A random word with probability epsilon, or words in proportion to exp(Q / temperature)."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How epsilon or the temperature goes from `start` to `end`."""
    start: float = Field(1.0, ge=0)
    """Epsilon or temperature at first."""
    end: float = Field(0.05, ge=0)
    """Epsilon or temperature at last."""
    share: float = Field(0.6, gt=0, le=1)
    """Share of `learner.steps` after which `end` is reached."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        refuse(
            {
                f"end={self.end:g} is above start={self.start:g}": self.end > self.start,
                f"start={self.start:g} is no probability: epsilon is at most 1": (
                    self.kind == "epsilon_greedy" and self.start > 1
                ),
                f"end={self.end:g} is no temperature: boltzmann needs one above 0": (
                    self.kind == "boltzmann" and self.end <= 0
                ),
            }
        )
        return self


class ValueBasedSection(Section):
    """The agent, its words and how it learns."""

    fusion: Fusion = "attention"
    """How picture and words become one vector (docs/equations.md 1, 2, 5, 6)."""
    width: int = Field(128, ge=8, le=4096)
    """Of every layer of the agent."""
    dueling: bool = False
    """A value and an advantage head instead of one head for Q (Wang et al. 2016, arXiv:1511.06581)."""
    double_q: bool = False
    """The target's action is chosen by the learning network (van Hasselt et al. 2016, arXiv:1509.06461)."""
    blind: bool = False
    """Zero every picture: what can be earned by words alone, for comparison."""
    image_tokens: int = Field(16, ge=1, le=4096)
    """Vision features are averaged in neighbouring runs down to so many tokens a picture. The replay buffer holds
    them: `buffer_words` × this × the model's width × 4 bytes."""
    max_pictures: int = Field(10_000, ge=1)
    """Training pictures at most: the features of all of them stay in memory."""
    vocabulary: list[str] | None = None
    """The words there are; by default the most frequent of the training references."""
    vocabulary_size: int = Field(64, ge=1, le=10_000)
    """How many those are."""
    template: list[list[str]] | None = None
    """Words that each place of a caption may have, the caption ends behind the last; by default any word anywhere,
    and an end wherever the agent likes."""
    max_words: int = Field(12, ge=1, le=256)
    """Words a caption has at most; with a template it has that many."""
    shaping: dict[str, float] = {}
    """Potential-based shaping (Ng, Harada & Russell 1999): for names of reward parts, how much of each one's value for
    the caption so far is paid out at once. It does not change which captions are best."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a word."""
    alpha: float = Field(1.0, gt=0, le=1)
    """Step size of docs/equations.md 3: how far a Q-value is pulled to its target."""
    exploration: ExplorationSection = ExplorationSection()
    """ε-greedy or Boltzmann, with a schedule."""
    batch_size: int = Field(64, ge=1)
    """Transitions an optimiser step learns from."""
    updates: int = Field(8, ge=1)
    """Optimiser steps a round; a round begins with new captions of the workers."""
    pictures: int = Field(16, ge=1)
    """Pictures that a worker captions side by side."""
    words: int = Field(8, ge=1)
    """Words that each of those captions grows by in a round; a new caption follows one that has ended."""
    learning_starts: int = Field(1000, ge=1)
    """Words in the replay buffer before the first optimiser step."""
    buffer_words: int = Field(20_000, ge=1)
    """Words that the replay buffer holds."""
    target_every: int = Field(1000, ge=1)
    """The target network follows each time so many words were said."""
    tau: float = Field(1.0, gt=0, le=1)
    """How far it follows."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        words = self.vocabulary or []
        known = set(words)
        template = self.template or []
        unknown = sorted({word for place in template for word in place} - known) if words else []
        odd = [word for word in [*words, *(w for place in template for w in place)] if len(word.split()) != 1]
        refuse(
            {
                "vocabulary names a word twice": len(known) != len(words),
                f"vocabulary or template: a word has no blanks and is not empty, got {odd[0] if odd else ''!r}": bool(
                    odd
                ),
                f"template has the word {unknown[0] if unknown else ''!r}, which vocabulary lacks": bool(unknown),
                "template: each place needs at least one word": any(not place for place in template),
                f"template has {len(template)} places, max_words={self.max_words} is below": (
                    len(template) > self.max_words
                ),
                f"buffer_words={self.buffer_words} is below learning_starts={self.learning_starts}: learning would "
                "never start": self.buffer_words < self.learning_starts,
                f"buffer_words={self.buffer_words} is below batch_size={self.batch_size}": (
                    self.buffer_words < self.batch_size
                ),
                "shaping: a weight is not negative": any(weight < 0 for weight in self.shaping.values()),
            }
        )
        return self


USED_OF_LEARNER = frozenset(
    {"steps", "lr", "lr_min", "warmup_steps", "max_grad_norm", "checkpoint_every", "keep_checkpoints"}
)
"""Keys of `learner:` that a value-based run reads; the others must keep their defaults."""

USED_OF_ROLLOUT = frozenset({"workers", "min_workers", "assignment_timeout_s", "worker_deadline_s", "vision_cache_mb"})
"""The same of `rollout:`."""


def unused_keys(section: Section, used: frozenset[str]) -> dict[str, Any]:
    """Keys of a section that are not among `used` and do not have their default."""
    fields = type(section).model_fields
    return {
        name: getattr(section, name)
        for name, field in fields.items()
        if name not in used and not field.is_required() and getattr(section, name) != field.get_default()
    }


class ValueBased(Algorithm):
    """Episodes of an environment of words, learnt from by RLlib's DQN; the run is `training/value_based.py`."""

    presets = {"value_based": {}}
    section, section_name = ValueBasedSection, "value_based"
    samples = "environment"
    panels = (
        Panel("Mean Q and temporal-difference error", ("q/",)),
        Panel("Exploration: epsilon or temperature", ("exploration",)),
        Panel("Weights of the modalities in the fusion", ("fusion/",)),
    )

    def problems(self, cfg: Config) -> dict[str, bool]:
        """Its section is there, and nothing that it makes no use of."""
        agent: ValueBasedSection | None = cfg.value_based
        learner, parts = cfg.learner, cfg.reward.weights
        updates = agent.updates if agent is not None else 1
        unused = {f"learner.{name}": value for name, value in unused_keys(learner, USED_OF_LEARNER).items()}
        unused |= {f"rollout.{name}": value for name, value in unused_keys(cfg.rollout, USED_OF_ROLLOUT).items()}
        unknown = _unknown(agent, parts)
        return {
            "algorithm: value_based needs a section `value_based:`": agent is None,
            f"learner.steps={learner.steps} is no multiple of value_based.updates={updates}": (
                learner.steps % updates != 0
            ),
            "algorithm: value_based makes no use of "
            + ", ".join(f"{name}={value}" for name, value in unused.items())
            + "; leave that out": bool(unused),
            f"value_based.shaping names no part of the reward ({', '.join(parts)}) but {', '.join(unknown)}": bool(
                unknown
            ),
            f"reward.normalize={cfg.reward.normalize} is of groups, and algorithm: value_based has none: leave it "
            "out": (cfg.reward.normalize != "none"),
            "algorithm: value_based has a number of rollout.workers, no range": (
                not isinstance(cfg.rollout.workers, int)
            ),
            "algorithm: value_based is not served while it trains: leave serving.live_policy out": (
                cfg.serving is not None and cfg.serving.live_policy
            ),
        }

    def rounds_told(self, cfg: Config) -> list[str]:
        """Rounds, words and transitions."""
        agent = _agent(cfg)
        workers, updates, steps = cfg.rollout.first_workers, agent.updates, cfg.learner.steps
        said, rounds = workers * agent.pictures * agent.words, steps // updates
        return [
            f"a round     {workers} workers × {agent.pictures} pictures × {agent.words} words = {said:,} words, then "
            f"{updates} optimiser steps of {agent.batch_size} transitions",
            f"the run     {steps:,} steps in {rounds:,} rounds, about {rounds * said + agent.learning_starts:,} "
            f"words; the first {agent.learning_starts:,} before learning starts",
        ]

    def memory_told(self, cfg: Config, pictures: int | None, width: int) -> list[str]:
        """Bytes of features; `width` is the model's hidden width, which the tower's features are projected to."""
        agent = _agent(cfg)
        each = agent.image_tokens * width * _FLOAT32
        lines = [
            f"replay buffer  {agent.buffer_words:,} words × {each:,} bytes = {agent.buffer_words * each / 1e6:,.0f} MB"
        ]
        if pictures is not None:
            kept = min(pictures, agent.max_pictures)
            lines.append(f"pictures       {kept:,} × {each:,} bytes = {kept * each / 1e6:,.0f} MB, once a node")
        return lines


def _agent(cfg: Config) -> ValueBasedSection:
    agent = cfg.agent
    assert isinstance(agent, ValueBasedSection)
    return agent


def _unknown(agent: ValueBasedSection | None, parts: Mapping[str, float]) -> list[str]:
    """Names in `shaping` whose part, or part of a part, the reward lacks."""
    shaping = {} if agent is None else agent.shaping
    return [name for name in shaping if name.split("/", 1)[0] not in parts]
