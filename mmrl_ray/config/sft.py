"""`sft:` — supervised training on captions: which parts of the model train, in which stages, at which rates.

A stage is a whole `SftSection` of its own (`phases`): what it does not write is what `sft:` has.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mmrl_ray.config.sections import Section, refuse

SFT_CACHE = ".cache/sft"
"""Where built-in models and warm starts are kept unless told otherwise."""
PARTS = ("projector", "language", "vision")
"""Of a model that has them all; `policy/parts.py` says what they are."""
Rate = Annotated[float, Field(gt=0)]
_LATER: dict[str, Any] = {"train": None, "stages": None, "captions": "random"}
"""Keys that came later, with the value that they need not be named with."""
_NO_RESULT = {"cache", "eval_every", "eval_samples", "micro_batch_tokens"}
"""Keys that the weights do not depend on, but for rounding."""


class SftStage(Section):
    """One of `sft.stages`, with an optimiser and a schedule of its own. What it does not write is as in `sft:`."""

    steps: int = Field(..., ge=1)
    """Optimiser steps of this stage."""
    mode: Literal["full", "lora"] | None = None
    """As `sft.mode`."""
    train: list[str] | None = Field(None, min_length=1)
    """As `sft.train`."""
    lr: Rate | dict[str, Rate] | None = None
    """As `sft.lr`."""
    lr_min: float | None = Field(None, ge=0)
    """As `sft.lr_min`."""
    warmup_steps: int | None = Field(None, ge=0)
    """As `sft.warmup_steps`."""
    batch_size: int | None = Field(None, ge=1)
    """As `sft.batch_size`."""
    captions_per_image: int | None = Field(None, ge=1)
    """As `sft.captions_per_image`."""
    weight_decay: float | None = Field(None, ge=0)
    """As `sft.weight_decay`."""
    max_grad_norm: float | None = Field(None, gt=0)
    """As `sft.max_grad_norm`."""


class SftSection(Section):
    """Supervised training on the references: before reinforcement learning, its result cached by content, or alone
    (`mmrl sft`)."""

    mode: Literal["full", "lora"] = "full"
    """`full` trains the weights of `train`; `lora` puts an adapter (`model.lora`) on the language model in place of
    training its weights, and merges it at the end. The result is an ordinary model folder either way."""
    train: list[str] | None = Field(None, min_length=1)
    """Parts that train: any of `projector` (all between tower and language model), `language` and `vision` (the tower);
    by default `[language]`. While neither tower nor projector train, each image's features are made once and cached
    under `rollout.vision_cache_mb`."""
    train_vision: bool = False
    """`true` is `train: [projector, language, vision]`, as configs of before `train` write it (the built-in tiny model
    starts from random weights, so all of it must train)."""
    stages: list[SftStage] | None = Field(None, min_length=1)
    """One after the other, instead of `steps`: a new projector alone first, the rest later. The order of the data goes
    on from one to the next."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps; those of the stages together where there are some."""
    batch_size: int = Field(32, ge=1)
    """Image-caption pairs of an optimiser step, in as many passes as `micro_batch_tokens` makes of them. The loss is
    the mean over all caption tokens of the step, however it is cut."""
    captions_per_image: int = Field(1, ge=1)
    """How many of them share an image, and the one pass of its prompt."""
    captions: Literal["random", "in_turn"] = "random"
    """Which of an image's captions: `random` draws anew each time; `in_turn` takes another one each time the image
    comes, none a second time before all of its kind have come."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Prompt and caption tokens of one forward and backward pass at most; by default `learner.micro_batch_tokens`. A
    pass that runs out of memory is halved."""
    lr: Rate | dict[str, Rate] = 1e-3
    """Peak learning rate: one, or one for each part that trains, such as `{projector: 1e-3, language: 2e-5}`."""
    lr_min: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm, of all parts together."""
    terse: float = Field(0.0, ge=0)
    """Weight of one-object, few-word targets in the mix (needs rows whose metadata names their terse captions)."""
    partial: float = Field(0.0, ge=0)
    """Weight of targets that leave something out."""
    full: float = Field(1.0, ge=0)
    """Weight of whole references."""
    eval_every: int | None = Field(None, ge=1)
    """Steps from one look at `data.eval` to the next, and one before and after all: loss on the references, and
    measures of greedy captions. By default none. Training is the same with and without."""
    eval_samples: int | None = Field(200, ge=1)
    """Of a look: the first so many rows; null for all."""
    cache: str = SFT_CACHE
    """Folder of finished warm starts, keyed by model, data and these settings. On a cluster, one that all nodes see."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What trains, by name."""
        return tuple(self.train or (PARTS if self.train_vision else ("language",)))

    @property
    def phases(self) -> tuple[SftSection, ...]:
        """Its stages, each with all that it inherits; itself where it has none."""
        return tuple(self._phase(stage) for stage in self.stages) if self.stages else (self,)

    @property
    def total_steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages) if self.stages else self.steps or 0

    @property
    def is_adapter_alone(self) -> bool:
        """Whether nothing but an adapter ever trains, so that the base need not be in float32."""
        return all(phase.mode == "lora" and phase.parts == ("language",) for phase in self.phases)

    def rate(self, part: str) -> float:
        """Peak learning rate of a part."""
        return self.lr[part] if isinstance(self.lr, dict) else self.lr

    @property
    def identity(self) -> dict[str, Any]:
        """What the weights depend on, as JSON: two sections with the same one give the same model.

        A config of before `train` and `stages` has the one that it always had.
        """
        if self.stages:
            return {"stages": [phase.identity for phase in self.phases]}
        found, parts = self.model_dump(exclude=_NO_RESULT), sorted(self.parts)
        was = parts in (sorted(PARTS), ["language"])
        found |= {"train": None, "train_vision": len(parts) > 1} if was else {"train": parts}
        return {key: value for key, value in found.items() if key not in _LATER or value != _LATER[key]}

    def _phase(self, stage: SftStage) -> SftSection:
        written = stage.model_dump(exclude_none=True)
        if stage.train is not None:
            written["train_vision"] = False
        inherited = self.model_dump(exclude={"stages"}) | written
        phase = SftSection.model_construct(**inherited)
        if stage.lr is None and isinstance(self.lr, dict):  # rates of other stages' parts
            inherited["lr"] = {part: rate for part, rate in self.lr.items() if part in phase.parts}
        return SftSection.model_validate(inherited)

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        refuse(
            {
                "both steps and stages: each stage has steps of its own, write those": bool(self.steps and self.stages),
                "steps is missing: write how many, or stages with steps of their own": not (self.steps or self.stages),
                "train and train_vision: true say the same thing twice: write train alone": (
                    self.train is not None and self.train_vision
                ),
                f"terse={self.terse}, partial={self.partial} and full={self.full} are all 0: nothing would be "
                "trained on": not (self.terse or self.partial or self.full),
                **({} if self.stages else self._phase_problems()),
            }
        )
        for number, stage in enumerate(self.stages or (), start=1):
            try:
                self._phase(stage)
            except ValidationError as error:
                told = [str(each["msg"]).removeprefix("Value error, ") for each in error.errors(include_url=False)]
                lines = [line for message in told for line in message.split("\n")]
                raise ValueError("\n".join(f"stage {number}: {line}" for line in lines)) from None
        return self

    def _phase_problems(self) -> dict[str, bool]:
        """Of one stage, or of a section without any."""
        parts, rates = self.parts, {} if isinstance(self.lr, float | int) else self.lr
        bare = [part for part in parts if rates and part not in rates]
        idle = [part for part in rates if part not in parts]
        lowest = min(self.rate(part) for part in parts) if not bare else min(rates.values())
        return {
            f"warmup_steps={self.warmup_steps} must be below steps={self.steps}": (
                self.steps is not None and self.warmup_steps >= self.steps
            ),
            f"lr_min={self.lr_min} is above lr={lowest}": self.lr_min > lowest,
            f"captions_per_image={self.captions_per_image} does not divide batch_size={self.batch_size}": (
                self.batch_size % self.captions_per_image != 0
            ),
            f"train={', '.join(parts)} names a part twice": len(set(parts)) < len(parts),
            f"lr has no rate for {', '.join(bare)}: write one for each part of train": bool(bare),
            f"lr has a rate for {', '.join(idle)}, which does not train: add it to train, or take it away": bool(idle),
            "train_vision needs mode: full; with an adapter, name the parts that train beside it: "
            "train: [projector, language]": self.train_vision and self.mode == "lora",
            f"mode: lora puts an adapter on the language model, and train={', '.join(parts)} leaves that out: add "
            "language, or write mode: full": self.mode == "lora" and "language" not in parts,
        }
