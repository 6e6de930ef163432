"""`data:` — the training and evaluation splits."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section, refuse


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
    eval_samples: int | None = Field(None, ge=1)
    """Evaluate on the first so many rows; all by default."""
    max_quarantined: int = Field(20, ge=0)
    """Broken samples a run tolerates before it stops; as many in the held-out split, and in the warm start."""
    scenes: ScenesSection | None = None
    """Generate the scenes dataset; none by default."""
    preferences: PreferencesSection | None = None
    """What an algorithm of pairs learns from; none by default."""
    rollouts: RolloutsSection | None = None
    """What an algorithm of stored rollouts learns from; none by default."""
