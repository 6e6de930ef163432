"""`reward:` — named parts and their weights (EQUATIONS rows 10 and 16)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section, refuse


class CaptionPart(Section):
    """R_cap = alpha * BLEU + beta * Detail - gamma * Length."""

    needs_statistics: ClassVar[bool] = True
    needs_images: ClassVar[bool] = False
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


class CiderPart(Section):
    """CIDEr-D against the references, with document frequencies from the training split."""

    needs_statistics: ClassVar[bool] = True
    needs_images: ClassVar[bool] = False
    kind: Literal["cider_d"]
    """Names the part."""


class RougePart(Section):
    """ROUGE-L against the references."""

    needs_statistics: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    kind: Literal["rouge_l"]
    """Names the part."""


class LearnedPart(Section):
    """A learned reward model looks at the picture and the caption; its σ comes with the score where it was trained."""

    needs_statistics: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True
    kind: Literal["learned"]
    """Names the part."""
    model: str
    """Folder from `mmrl reward train`; on a cluster, one that all nodes see."""


RewardPart = Annotated[CaptionPart | CiderPart | RougePart | LearnedPart, Field(discriminator="kind")]


class RewardSection(Section):
    """The total is the weighted sum of the parts."""

    parts: dict[str, RewardPart] = Field({"caption": CaptionPart()})
    """Reward parts by name; the names are what metrics call them."""
    weights: dict[str, float] = Field({"caption": 1.0})
    """One weight a part."""
    host: Literal["serve", "inline"] = "serve"
    """Where rewards are computed: in a Ray Serve deployment of the run, or `inline`, in the rollout workers."""
    timeout_s: float = Field(60.0, gt=0)
    """For one batch of captions."""
    retries: int = Field(2, ge=0)
    """Tries after the first; then the sample is masked and counted, never scored 0."""

    @property
    def needs_images(self) -> bool:
        """Whether a part looks at the picture; otherwise it need not travel."""
        return any(part.needs_images for part in self.parts.values())

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
            }
        )
        return self
