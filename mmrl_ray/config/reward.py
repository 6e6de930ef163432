"""`reward:` — named parts and their weights (EQUATIONS rows 10 and 16)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section


class CaptionPart(Section):
    """R_cap = alpha * BLEU + beta * Detail - gamma * Length."""

    kind: Literal["caption"] = "caption"
    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 0.1
    max_words: int = Field(30, ge=1)
    grounded: bool = True
    """Count a word's detail only if some reference has it."""


class CiderPart(Section):
    """CIDEr-D against the references, with document frequencies from the training split."""

    kind: Literal["cider_d"]


class RougePart(Section):
    """ROUGE-L against the references."""

    kind: Literal["rouge_l"]


RewardPart = Annotated[CaptionPart | CiderPart | RougePart, Field(discriminator="kind")]


class RewardSection(Section):
    """The total is the weighted sum of the parts."""

    parts: dict[str, RewardPart] = {"caption": CaptionPart()}
    weights: dict[str, float] = {"caption": 1.0}
    host: Literal["inline"] = "inline"
    """Where rewards are computed: in the rollout workers."""
    timeout_s: float = Field(60.0, gt=0)
    """For one batch of captions."""
    retries: int = Field(2, ge=0)

    @model_validator(mode="after")
    def _same_names(self) -> Self:
        if not self.parts:
            raise ValueError("parts is empty: a run needs at least one reward part")
        if set(self.parts) != set(self.weights):
            raise ValueError(f"parts {sorted(self.parts)} and weights {sorted(self.weights)} must have the same names")
        if any(w < 0 for w in self.weights.values()) or not any(self.weights.values()):
            raise ValueError(f"weights {dict(self.weights)} must not be negative, and not all 0")
        return self
