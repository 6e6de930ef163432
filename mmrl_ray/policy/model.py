"""`Policy`: a vision-language model with its processor, and what is known of both."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from mmrl_ray.config.policy import QuantizationSection
from mmrl_ray.policy.heads import ValueHeads
from mmrl_ray.policy.logits import model_logits
from mmrl_ray.policy.tokens import Turn

P = ParamSpec("P")
R = TypeVar("R")
_ADAPTED = re.compile(r"\.(lora_\w+|modules_to_save)\.")
OWN_ATTENTION = "mmrl_"
"""How the names begin under which attention functions of this project are registered in transformers."""


class PlainLinear(nn.Linear):
    """An `nn.Linear` that computes the same product another way: an adapter sits on it as on any other."""


def _as_ever(policy: Policy) -> AbstractContextManager[None]:
    return nullcontext()


def _as_they_are(model: nn.Module) -> None:
    pass


def _joined(policy: Policy) -> AbstractContextManager[bool]:
    return nullcontext(False)


def _copied(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().clone()


class SharedPrompts(NamedTuple):
    """What completions attend to beside themselves: the attribute `prompts` of their own keys [K·G, H', T, d]."""

    keys: torch.Tensor
    """[K, H', P, d], each for G completions, one behind the other."""
    values: torch.Tensor
    repeats: int
    """G."""


class Captured(NamedTuple):
    """A function as it was recorded."""

    replay: Callable[[], None]
    """Does it again, on the tensors that it was recorded with, with what they hold then; it asks Python nothing."""
    made: tuple[torch.Tensor, ...]
    """What the function returns: a replay puts its numbers there."""


@dataclass(frozen=True, slots=True)
class Acceleration:
    """What makes a model faster on its device, and changes nothing but rounding; by default nothing does."""

    forward: Callable[[Policy], AbstractContextManager[Any]] = _as_ever
    """Around every forward, of sampler, learner, reference and whoever judges them: they compute one policy."""
    decode_step: Callable[[Policy], AbstractContextManager[None]] = _as_ever
    """Around each forward of the decode loop."""
    completions: Callable[[Policy], AbstractContextManager[bool]] = _joined
    """Around the forward of completions behind prompts that several of them share. Says whether attention takes keys
    and values of the prompts apart from the completions' own, as `SharedPrompts` on the latter."""
    pack_weights: Callable[[nn.Module], None] = _as_they_are
    """Called where the weights of the base will not change any more, as in serving: they may be laid out anew."""
    copy_weight: Callable[[torch.Tensor], torch.Tensor] = _copied
    """A copy of a weight [out, in], laid out as passes without a gradient read it fastest."""
    adapt: Callable[[nn.Module], None] = _as_they_are
    """Called where an adapter was put on the model: its layers may compute the same another way."""
    capture: Callable[[Callable[[], tuple[torch.Tensor, ...]]], Captured | None] | None = None
    """Records what a function does with tensors, instead of doing it; gives None where that cannot be. With it decode
    steps are computed on tensors that stay in place."""


@dataclass(slots=True)
class Policy:
    """A vision-language model with what is needed to prompt it. Frozen and in eval mode until an adapter is added."""

    model: nn.Module
    """The Hugging Face model, or a `PeftModel` around it."""
    processor: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    placeholder_id: int
    """The token whose positions take the vision features."""
    image_token_ids: tuple[int, ...]
    """Every token of the image, video or audio machinery: never sampled, logit minus infinity everywhere."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion; the turn's end is among them, whatever the checkpoint lists."""
    end_id: int
    """The one of `eos_token_ids` that the chat template puts after an assistant's turn."""
    pad_token_id: int
    reserved_texts: tuple[str, ...]
    """What a user may not write: the texts of control tokens."""
    context_length: int
    revision_key: str
    """Names the weights and the processor: part of the vision cache's key."""
    path: str
    revision: str | None = None
    """Of a model of the hub, where one was asked for."""
    processor_settings: dict[str, Any] = field(default_factory=dict)
    bare_head: bool = False
    """Whether `logits` are the head's product and nothing else (`takes_bare_head`)."""
    turn: Turn = field(default_factory=Turn)
    """How the chat template writes what the assistant says."""
    appended_ids: tuple[int, ...] = ()
    """What the tokenizer puts behind every text: no part of a prompt, which goes on."""
    quantization: QuantizationSection | None = None
    """How the base's weights are kept, where it is not as numbers of `dtype`."""
    inject_vision: bool = True
    """Whether ready-made vision features can stand in for the tower (`parity.choose_path` finds out); if not, the tower
    runs inside every forward, on the pixels."""
    acceleration: Acceleration = field(default_factory=Acceleration)
    value_heads: dict[str | None, ValueHeads] = field(default_factory=dict)
    """What next tokens are worth, by PEFT's name of the adapter whose hidden states the heads read; None is whatever is
    active on the model."""

    @property
    def hf_model(self) -> PreTrainedModel:
        """The Hugging Face model with its head, under the adapter if there is one."""
        return cast(PreTrainedModel, self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    @property
    def core(self) -> Any:
        """The model below the head: it has `get_image_features` and returns hidden states."""
        return self.hf_model.base_model

    @property
    def decoder(self) -> nn.Module:
        """The language model (embeddings and layers, without the head)."""
        return cast(nn.Module, self.hf_model.get_decoder())

    @property
    def attention(self) -> str:
        """What attention the language model was loaded with: "sdpa", "eager" or "flash_attention_2".

        It says what masks are like. A function of ours takes those of "sdpa", in whose place it stands.
        """
        name = str(self.hf_model.config.get_text_config()._attn_implementation)
        return "sdpa" if name.startswith(OWN_ATTENTION) else name

    @property
    def hidden_size(self) -> int:
        """d, the width of the hidden states that the head makes logits of."""
        return self.hf_model.config.get_text_config().hidden_size

    @property
    def key_bytes(self) -> int:
        """Of the keys and values that a token leaves in all layers of the language model, where each keeps its own."""
        text = self.hf_model.config.get_text_config()
        of_queries = getattr(text, "num_attention_heads", 1)
        heads = getattr(text, "num_key_value_heads", None) or of_queries
        width = getattr(text, "head_dim", None) or text.hidden_size // of_queries
        return int(2 * text.num_hidden_layers * heads * width * self.dtype.itemsize)

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self.hf_model.config.get_text_config().vocab_size

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on the policy's device, without waiting for what a GPU still has to do."""
        if self.device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
            tensor = tensor.pin_memory()  # from ordinary memory the copy itself may wait
        return tensor.to(self.device, non_blocking=True)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[M, d] or [B, T, d] → [.., V]: logits in the model's dtype, soft caps, scales and all.

        The one way from last hidden states to logits, for sampling, scoring and explaining alike; differentiable.
        """
        return model_logits(self.hf_model, hidden, bare=self.bare_head)

    @property
    def vision_trainable(self) -> bool:
        """Whether anything before the language model trains or is adapted.

        Vision features then change with the policy's version: they are made anew each time, never cached or shipped.
        An adapter counts even where it takes no gradient (in a rollout worker its weights still change).
        """
        language = {id(p) for p in self.decoder.parameters()}
        return any(
            p.requires_grad or _ADAPTED.search(name)
            for name, p in self.core.named_parameters()
            if id(p) not in language
        )


def computing(function: Callable[Concatenate[Policy, P], R]) -> Callable[Concatenate[Policy, P], R]:
    """For what runs a policy's forward: it does so in the policy's own context (`Acceleration.forward`)."""

    @wraps(function)
    def inside(policy: Policy, *args: P.args, **kwargs: P.kwargs) -> R:
        with policy.acceleration.forward(policy):
            return function(policy, *args, **kwargs)

    return inside
