"""`model:` and `teacher:`: a checkpoint, how its weights are kept, and the adapter that is trained on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from mmrl_ray.config.base import Section, refuse

T = TypeVar("T")
_CHANGES_BASE = (
    "begins with weights that it takes out of the base: with the adapter off the model would not be the policy that "
    "training started from, which the reference is, and the adapter would fit no base but its own changed one"
)
_REFUSED_INITS = {
    **dict.fromkeys(("pissa", "olora", "corda", "mica"), _CHANGES_BASE),
    "loftq": f"{_CHANGES_BASE}; a quantised base is written in model.quantization",
    **dict.fromkeys(("eva", "lora_ga"), "needs passes over data before there is an adapter, the same in each process"),
    "false": "draws B at random, so that the first policy would not be the base",
}


class LoraSection(Section):
    """The PEFT adapter that reinforcement learning trains."""

    r: int = Field(8, ge=1, le=1024)
    """Rank."""
    alpha: float = Field(16.0, gt=0)
    """Scaling: the adapter's output is multiplied by alpha / r."""
    targets: list[str] | str | None = None
    """Module-name suffixes, or one regular expression over full names; by default every linear layer of the language
    model (what `get_decoder()` returns), and with `adapt_vision` those of tower and connector, too."""
    adapt_vision: bool = False
    """Allow `targets` and `modules_to_save` outside the language model; turns the vision cache off."""
    rslora: bool = False
    """Multiply by alpha / √r instead (Kalajdzievski 2023, arXiv:2312.03732), so that a high rank learns as fast."""
    dora: bool = False
    """Train a magnitude for each output beside the direction (Liu et al. 2024, arXiv:2402.09353)."""
    rank_pattern: dict[str, int] = {}
    """Ranks of some layers: name suffixes, or regular expressions of them, as PEFT reads them; the first that fits."""
    alpha_pattern: dict[str, float] = {}
    """Their alphas."""
    modules_to_save: list[str] = []
    """Name suffixes of modules that train whole, in float32, beside the adapter: a connector, an untied head, norms."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """First weights of A. Each leaves the base's policy as it is: `default` and `gaussian` by B = 0, `orthogonal` by an
    A and a B whose product is 0."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what the adapter reads, while it learns; only where no ratio to a sampler's log-probs is taken: in a warm
    start with `sft.mode: lora`, and with algorithms of pairs or of stored rollouts."""

    @field_validator("init", mode="before")
    @classmethod
    def _known_init(cls, value: Any) -> Any:
        name = str(value).lower().partition("_niter_")[0]
        if reason := _REFUSED_INITS.get(name):
            raise ValueError(f"init={value} {reason}: write default, gaussian or orthogonal")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        ranks = [self.r, *self.rank_pattern.values()]
        odd = [rank for rank in ranks if rank % 2]
        refuse(
            {
                f"init=orthogonal needs even ranks, not {odd}": self.init == "orthogonal" and bool(odd),
                f"rank_pattern={self.rank_pattern}: ranks are from 1 to 1024": not all(1 <= r <= 1024 for r in ranks),
                f"alpha_pattern={self.alpha_pattern}: alphas are above 0": any(
                    alpha <= 0 for alpha in self.alpha_pattern.values()
                ),
                **{
                    f"{key}: {name!r} is not a regular expression": not _compiles(name)
                    for key in ("rank_pattern", "alpha_pattern")
                    for name in getattr(self, key)
                },
            }
        )
        return self

    @property
    def beyond_vllm(self) -> list[str]:
        """The keys that vLLM's adapters know nothing of: they have one rank and scale, and two matrices a layer."""
        return [name for name in ("dora", "modules_to_save", "rank_pattern", "alpha_pattern") if getattr(self, name)]

    @property
    def beyond_pool(self) -> list[str]:
        """The keys that a server with several adapters knows nothing of: its rows share one base."""
        return [name for name in ("dora", "modules_to_save") if getattr(self, name)]

    @property
    def beyond_fsdp2(self) -> list[str]:
        """The keys that need whole weights of the base."""
        return self.beyond_pool

    def rank_of(self, layer: str) -> int:
        """Of the adapter on the layer of that full name."""
        return first_match(self.rank_pattern, layer, self.r)

    @property
    def largest_rank(self) -> int:
        """Of any layer."""
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r


def first_match(patterns: Mapping[str, T], layer: str, default: T) -> T:
    """The value of the first pattern that PEFT finds to fit a layer's full name."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", layer)), default)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


PARTS = ("tower", "connector", "head")
"""Of a model beside its language model's layers, by what they are called in `unquantized`."""


class QuantizationSection(Section):
    """How the frozen weights of linear layers are kept: quantised while they are read, and multiplied in `model.dtype`.

    An adapter on such a base is QLoRA (Dettmers et al. 2023, arXiv:2305.14314).
    """

    kind: Literal["bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int8"]
    """4 bits a weight in blocks of 64, 8 bits with a scale a row (LLM.int8's weights, without its quantised inputs), or
    torchao's weight-only int8. Extras: `mmrl_ray[bitsandbytes]`, `mmrl_ray[torchao]`."""
    quant_type: Literal["nf4", "fp4"] | None = None
    """Of 4 bits: the values they stand for; nf4 by default."""
    double_quant: bool | None = None
    """Of 4 bits: scales are quantised, too, which saves 0.4 bits a weight; true by default."""
    unquantized: list[str] = [*PARTS]
    """What stays as it is: `tower`, `connector` and `head` by their part in the model, and further layers by suffixes
    of their names, such as `down_proj`."""

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4 if self.kind == "bitsandbytes-4bit" else 8

    @property
    def library(self) -> str:
        """That keeps them, and the extra that brings it."""
        return self.kind.partition("-")[0]

    @property
    def told(self) -> str:
        """In words, for people."""
        if self.bits == 8:
            return f"8-bit weights by {self.library}"
        double = "" if self.double_quant is False else ", double quantisation"
        return f"4-bit weights by bitsandbytes ({self.quant_type or 'nf4'}{double})"

    @model_validator(mode="after")
    def _of_four_bits(self) -> Self:
        written = [name for name in ("quant_type", "double_quant") if getattr(self, name) is not None]
        refuse(
            {
                f"{name}={getattr(self, name)} is of kind=bitsandbytes-4bit, and this is {self.kind}: take it away": (
                    self.bits != 4
                )
                for name in written
            }
        )
        return self


class ModelSection(Section):
    """Any Hugging Face image-text-to-text checkpoint."""

    path: str
    """Folder or hub id; `builtin:tiny-llava` is made on the spot from a config, for tests and the quickstart."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 on a GPU that has it, float32 elsewhere."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernels."""
    processor: dict[str, Any] = Field(default_factory=dict)
    """Passed to the processor as it is (for example `size`, `max_pixels`, `do_image_splitting`)."""
    quantization: QuantizationSection | None = None
    """Quantised weights of the base, in learners, workers and servers alike; as they are in the checkpoint by default.
    """
    lora: LoraSection = LoraSection()
    """The adapter."""

    @model_validator(mode="after")
    def _fits_base(self) -> Self:
        lora = self.lora
        refuse(
            {
                "lora.dora=true needs the norms of the base's weights at every step, and model.quantization keeps them "
                "quantised: take one of the two away": lora.dora and self.quantization is not None,
            }
        )
        return self

    def engine_problems(self, kind: str, quantization: str | None, key: str) -> dict[str, bool]:
        """What an engine beside transformers cannot do of the base and the adapter.

        Args:
            kind: of the engine.
            quantization: its own key.
            key: dotted, of the engine's section.
        """
        base, lora = self.quantization, self.lora
        elsewhere = kind != "local"
        is_known = base is not None and base.bits == 4 and base.quant_type != "fp4" and base.double_quant is not False
        remedy = f"write {key}.kind: local"
        own = "write bitsandbytes there if the server was started so" if kind == "openai" else "GPUs alone"
        return {
            f"{key}.kind={kind} takes no base of model.quantization.kind={base.kind if base else None} as it is here: "
            f"{remedy}, or quantise by bitsandbytes-4bit (nf4, double_quant)": (
                elsewhere and base is not None and not is_known
            ),
            f"{key}.kind={kind} would sample by the base as it is in the checkpoint, another policy than that of "
            f"model.quantization: {remedy}, or {key}.quantization: bitsandbytes, by which vLLM makes 4-bit weights of "
            f"its own ({own}; how far they are apart is told at the start and in each step)": (
                elsewhere and is_known and quantization != "bitsandbytes"
            ),
            f"{key}.kind={kind} has no place for model.lora.{' and model.lora.'.join(lora.beyond_vllm)}: vLLM's "
            f"adapters have one rank, one scale and two matrices a layer: {remedy}": elsewhere
            and bool(lora.beyond_vllm),
        }


class TeacherSection(Section):
    """Another model, which scores what the policy samples; it must have the policy's tokenizer."""

    path: str
    """Folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """Folder of a LoRA adapter that is merged into it, such as the `adapter/` of a finished run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """As `model.dtype`, and so are the two below."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernels."""
    processor: dict[str, Any] = Field(default_factory=dict)
    """Its own: pictures may have another size there."""
    quantization: QuantizationSection | None = None
    """As `model.quantization`, of the teacher's weights."""
    workers: int = Field(1, ge=1)
    """Actors, each with the whole model and `resources.teacher`."""

    @property
    def model(self) -> ModelSection:
        """What is loaded."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name not in ("adapter", "workers")}
        return ModelSection(**own)

    @model_validator(mode="after")
    def _adapter_has_weights(self) -> Self:
        refuse(
            {
                f"adapter={self.adapter} is merged into the teacher's weights, which quantization={own.kind} keeps "
                "quantised: export the two merged (mmrl export --merged) and name that as path": (
                    self.adapter is not None
                )
                for own in [self.quantization]
                if own is not None
            }
        )
        return self
