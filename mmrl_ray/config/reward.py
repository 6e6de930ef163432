"""`reward:` — named parts and their weights (docs/equations.md 10 and 16)."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self

import regex
from pydantic import Field, field_validator, model_validator

from mmrl_ray.config.sections import Section, refuse

Modality = Literal["image", "text", "reference", "sample"]
"""What a part is given beside the caption: the pictures, the prompt, the references, or the whole sample."""

SEES: dict[Modality, str] = {"image": "pictures", "text": "text", "reference": "references", "sample": "whole sample"}
"""The same in words."""

Normalization = Literal["none", "group"]

RESERVED_NAMES = (
    "mean",
    "std",
    "group_std",
    "zero_variance_groups",
    "with_kl",
    "sigma",
    "adjusted",
    "risk",
    "normalized",
    "masked",
)
"""What metrics have under `reward/` beside the parts; no part may be called so."""

_FUNCTION = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


class PartSection(Section):
    """What every kind of part says of itself, beside its `modality`."""

    needs_statistics: ClassVar[bool] = False
    may_have_sigma: ClassVar[bool] = False
    """Whether its breakdowns can have a trained standard deviation."""


class CaptionPart(PartSection):
    """R_cap = alpha * BLEU + beta * Detail - gamma * Length."""

    modality: ClassVar[Modality] = "reference"
    needs_statistics: ClassVar[bool] = True
    kind: Literal["caption"] = "caption"
    """Names the part."""
    alpha: float = Field(0.5, ge=0)
    """Weight of BLEU."""
    beta: float = Field(0.5, ge=0)
    """Weight of the detail term."""
    gamma: float = Field(0.1, ge=0)
    """Weight of the length penalty."""
    max_words: int = Field(30, ge=1)
    """Length is words divided by this."""
    grounded: bool = True
    """Count a word's detail only if some reference has it."""
    eos: bool = True
    """BLEU has the end of a caption that ended by itself as a word, and that of every reference."""


class CiderPart(PartSection):
    """CIDEr-D against the references, with document frequencies from the training split."""

    modality: ClassVar[Modality] = "reference"
    needs_statistics: ClassVar[bool] = True
    kind: Literal["cider_d"]
    """Names the part."""
    eos: bool = True
    """The end of a caption that ended by itself is a word, and that of every reference."""


class RougePart(PartSection):
    """ROUGE-L against the references."""

    modality: ClassVar[Modality] = "reference"
    kind: Literal["rouge_l"]
    """Names the part."""


class RepetitionPart(PartSection):
    """Minus the share of n-grams that repeat an earlier one of the same caption: -1 to 0."""

    modality: ClassVar[Modality] = "text"
    kind: Literal["repetition"]
    """Names the part."""
    order: int = Field(2, ge=1, le=4)
    """n: words of an n-gram."""


class FormatPart(PartSection):
    """1 where the whole caption, but for white space at its end, matches a pattern, else 0."""

    modality: ClassVar[Modality] = "text"
    kind: Literal["format"]
    """Names the part."""
    pattern: str
    """A regular expression; `.` matches newlines, too."""
    prefix: str | None = None
    """What the chat template writes before an answer, such as `<think>`: the caption matches with it or without. By
    default found out from the template when a run starts."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        return pattern


class LengthPart(PartSection):
    """1 where the number of words lies within bounds, less in proportion outside, never below 0."""

    modality: ClassVar[Modality] = "text"
    kind: Literal["length"]
    """Names the part."""
    min_words: int = Field(1, ge=0)
    """Fewer words earn words ÷ this."""
    max_words: int = Field(30, ge=1)
    """More words earn 1 less than for each word above it, divided by this."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        wrong = self.min_words > self.max_words
        refuse({f"min_words={self.min_words} is above max_words={self.max_words}": wrong})
        return self


class FluencyPart(PartSection):
    """How likely the words are under an add-k n-gram model of the training references: 1 is certain, 0 is a guess."""

    modality: ClassVar[Modality] = "text"
    needs_statistics: ClassVar[bool] = True
    kind: Literal["fluency"]
    """Names the part."""
    order: int = Field(2, ge=1, le=4)
    """n: a word is foreseen from the n - 1 before it."""
    smoothing: float = Field(0.1, gt=0)
    """k: added to the count of every n-gram."""


class LearnedPart(PartSection):
    """A learned reward model looks at the picture and the caption; its σ comes with the score where it was trained."""

    modality: ClassVar[Modality] = "image"
    may_have_sigma: ClassVar[bool] = True
    kind: Literal["learned"]
    """Names the part."""
    model: str
    """Folder from `mmrl reward train`; on a cluster, one that all nodes see."""


class FunctionPart(PartSection):
    """A function of your own, called as `fn(captions, states, **kwargs)`; it returns one number a caption."""

    kind: Literal["function"]
    """Names the part."""
    path: str
    """`module:function`, in `reward.code` or installed on every node."""
    state: Modality
    """What it is given of each sample: `image` (encoded files), `text` (the prompt), `reference` (a tuple of texts),
    or `sample` (all of it, metadata too)."""
    kwargs: dict[str, Any] = Field({})
    """Further arguments, by name."""

    @property
    def modality(self) -> Modality:
        """The user's choice."""
        return self.state

    @field_validator("path")
    @classmethod
    def _is_path(cls, path: str) -> str:
        if not re.fullmatch(_FUNCTION, path):
            raise ValueError(f"path {path!r} must be `module:function`, such as my_rewards.colours:named")
        return path

    @field_validator("kwargs")
    @classmethod
    def _travels(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(kwargs, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"kwargs must hold what JSON can: {error}") from error
        return kwargs


RewardPart = Annotated[
    CaptionPart
    | CiderPart
    | RougePart
    | RepetitionPart
    | FormatPart
    | LengthPart
    | FluencyPart
    | LearnedPart
    | FunctionPart,
    Field(discriminator="kind"),
]


class RewardSection(Section):
    """The total is the weighted sum of the parts."""

    parts: dict[str, RewardPart] = Field({"caption": CaptionPart()})
    """Reward parts by name; the names are what metrics call them."""
    weights: dict[str, float] = Field({"caption": 1.0})
    """One weight a part."""
    code: str | None = None
    """Folder of the modules of your functions; by default the working directory. It travels with a job."""
    host: Literal["serve", "inline"] = "serve"
    """Where rewards are computed: in a Ray Serve deployment of the run, or `inline`, in the rollout workers."""
    timeout_s: float = Field(60.0, gt=0)
    """For one batch of captions, each part. Where a function of yours hangs on it, its captions have as much again, one
    by one."""
    retries: int = Field(2, ge=0)
    """Tries of a batch that raises, after the first; then captions are masked and counted, never scored 0."""
    risk: float = Field(0.0, ge=0)
    """kappa: learning uses mean - kappa * sigma; needs a part with a trained sigma."""
    normalize: Normalization = "none"
    """group: each part divided by its spread within the group before parts are weighed, then all by the step's."""

    @property
    def longest_s(self) -> float:
        """How long a batch may take: with functions of yours its turn, a try, and its captions one by one, for each."""
        return self.timeout_s * max(1, 3 * len(self.functions))

    @property
    def functions(self) -> dict[str, FunctionPart]:
        """Parts that are the user's own functions, by name."""
        return {name: part for name, part in self.parts.items() if isinstance(part, FunctionPart)}

    @property
    def needs_images(self) -> bool:
        """Whether a part looks at the picture; otherwise it need not travel."""
        return any(part.modality in ("image", "sample") for part in self.parts.values())

    @property
    def language_order(self) -> int:
        """The longest n-gram of the training references that a part needs counted; 0 for none."""
        return max((part.order for part in self.parts.values() if isinstance(part, FluencyPart)), default=0)

    @property
    def needs_opening(self) -> bool:
        """Whether a part's prefix is still to be found out from the chat template."""
        return any(isinstance(part, FormatPart) and part.prefix is None for part in self.parts.values())

    def with_opening(self, opening: str) -> Self:
        """The same where that is what the chat template writes before an answer; prefixes that were given stay."""
        parts = {
            name: part.model_copy(update={"prefix": opening})
            if isinstance(part, FormatPart) and part.prefix is None
            else part
            for name, part in self.parts.items()
        }
        return self.model_copy(update={"parts": parts})

    @property
    def needs_statistics(self) -> bool:
        """Whether a part weighs words by how common they are in the training references."""
        return any(part.needs_statistics for part in self.parts.values())

    @model_validator(mode="after")
    def _same_names(self) -> Self:
        parts, weights = self.parts, self.weights
        refuse(
            {
                "parts is empty: a run needs at least one reward part": not parts,
                f"parts {sorted(parts)} and weights {sorted(weights)} must have the same names": set(parts)
                != set(weights),
                f"weights {dict(weights)} must not be negative, and not all 0": min(weights.values(), default=0) < 0
                or not any(weights.values()),
                f"part names {sorted(parts)} must not be empty or hold a slash, which marks a part of a part": any(
                    not name or "/" in name for name in parts
                ),
                f"part names {sorted(set(parts) & set(RESERVED_NAMES))} are taken by other figures of the metrics: "
                "choose others": not set(parts).isdisjoint(RESERVED_NAMES),
                f"risk={self.risk:g} needs a part with a trained sigma and a weight above 0, and none of "
                f"{sorted(parts)} is one: add a part of kind `learned`, or set risk to 0": self.risk > 0
                and not any(part.may_have_sigma and weights.get(name, 0) > 0 for name, part in parts.items()),
            }
        )
        return self
