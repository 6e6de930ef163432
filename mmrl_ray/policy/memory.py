"""What a model's passes keep in memory, from its shape alone: bytes a token, of a decoder as Llama's and Qwen's are.

And what is made of it: how many tokens a learner takes at once, how many rows a decode loop, how many groups the
reference scores together. The processes ask for that where they run, and the dry run's estimate asks the same.

b bytes a number, L layers, h hidden width, q = query heads × head width, k = key-value heads × head width, I width
inside an MLP, V vocabulary. What a layer keeps of a token for the backward pass:

    two norms         2 h b                what they normalise
    attention         (2 q + 2 k) b        queries, keys, values, result
    MLP               3 I b                gate, its activation, up
    adapted layers    (2 h + I) b          their inputs, which layers share

Held against what fake tensors count at full size (`benchmarks/full_size.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from mmrl_ray.config.sections import LoraSection, QuantizationSection
from mmrl_ray.experience.plan import GroupSize
from mmrl_ray.policy.logits import CHUNK_ELEMENTS
from mmrl_ray.policy.lora.targets import resolve_targets, saved_modules
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.quantized import bytes_of, held_bytes, is_quantized, numel, quantized_layers

_FLOAT32 = 4
_LOGIT_COPIES, _SCORED_COPIES = 5, 3
"""Float32 copies of a chunk of logits that live at once: where log-probs, entropies and gradients are made of it, and
where log-probs alone are."""
_SAMPLED_COPIES = 6
"""And where tokens are drawn, one of them in float64."""
_USED = 0.85
"""Of the memory that is free, what a micro-batch is planned for."""
_MANY = 1 << 20
"""Groups whose logits make a whole chunk."""
MOST_KEYS_BYTES = 4 << 30
"""Of keys and values at a time while completions are scored: enough for some hundred of a 3 B model."""
MOST_CACHE_BYTES = 1 << 30
"""Of keys and values that a vLLM engine on CPUs has by itself; its user may give it more."""
CACHE_BLOCK = 32
"""Tokens that vLLM's prefix cache keeps together, on CPUs: the fewest that its kernels like. By itself it takes 128, so
that prompts of a few hundred tokens would share little."""
LORA_PLACES = 2
"""Adapters that a vLLM engine applies at a time: the version that samples, and the next."""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That it has buffers for."""
_SHARE = 0.4
"""Of a GPU's free memory, for rows and for one pass of prompts each: pictures, scoring and gaps take the rest."""
_PROMPT_TOKENS = 1024
"""Assumed of a prompt, the pictures' tokens among them; where several rows share one they need less."""
_LOGIT_BYTES = 24
"""Of a row and word of the vocabulary, from the head's product to the sums that a token is drawn by, in float64."""
_RAN_OUT = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What CUDA and its libraries say where they take memory past PyTorch's allocator."""


def free_memory(device: torch.device) -> int | None:
    """Bytes that nobody has taken yet; None on a CPU, whose memory is the whole machine's."""
    module = torch.get_device_module(device)
    return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else None


def trim_heap() -> None:
    """Gives the system back what the C library keeps of freed tensors in host memory, where it can (glibc).

    Worth it after work of other sizes than what comes next: some milliseconds, and the pages are asked for again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def ran_out(error: BaseException) -> bool:
    """Whether a device had too little memory for what was asked of it: less may still do."""
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _RAN_OUT)
    return told or isinstance(error, torch.OutOfMemoryError)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that memory depends on."""

    parameters: int
    weight_bytes: int
    layer_bytes: int
    """Of `weight_bytes`, the decoder's layers: what sharding splits."""
    language_parameters: int
    """The decoder and the head: what a full warm start trains."""
    adapter_parameters: int
    adapted_layers: int
    adapted_parameters: int
    """Of the base, under the adapter."""
    adapted_inputs: int
    """Numbers that all adapted layers together take in of a token."""
    itemsize: int
    """b."""
    layers: int
    hidden: int
    intermediate: int
    query_width: int
    """q."""
    kv_width: int
    """k."""
    vocabulary: int
    heads: int
    """Of queries."""
    saved_parameters: int = 0
    """Of modules that train whole beside the adapter."""
    adapts_vision: bool = False
    """Whether something before the language model trains: features of pictures are then no one's to keep."""
    dequantized_bytes: int = 0
    """Of the largest quantised layer, as the numbers that it is multiplied by: one at a time; 0 without such layers."""

    @property
    def trained_parameters(self) -> int:
        """In float32: the adapter's, and those of modules that train whole."""
        return self.adapter_parameters + self.saved_parameters

    @property
    def repeats(self) -> int:
        """Heads of queries that share one of keys."""
        return max(1, self.query_width // self.kv_width)

    def kept_of_token(self, itemsize: int | None = None) -> int:
        """Bytes of one token in all layers that the backward pass wants; `itemsize` is b by default."""
        b = itemsize or self.itemsize
        layer = 2 * self.hidden + 2 * self.query_width + 2 * self.kv_width + 3 * self.intermediate
        inputs = min(self.layers * (2 * self.hidden + self.intermediate), self.adapted_inputs)
        return (self.layers * layer + inputs) * b

    @property
    def passing_of_token(self) -> int:
        """Bytes of one token inside the one layer that computes, where nothing is kept."""
        return (3 * self.intermediate + 6 * self.hidden) * self.itemsize

    @property
    def kv_of_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.kv_width * self.layers * self.itemsize

    def learnt_groups(
        self, groups: int, size: GroupSize, *, packed: bool, checkpointed: bool, on_gpu: bool
    ) -> dict[str, int]:
        """Bytes that a forward pass over so many groups of one size keeps for its backward pass, by kind.

        Args:
            groups: of one micro-batch.
            size: of each.
            packed: a prompt and its completions are one row.
            checkpointed: layers keep their inputs alone, and one layer at a time the rest.
            on_gpu: heads that share keys are queries of one head under a mask, which copies those queries; elsewhere
                keys and values are repeated for them.
        """
        behind = size.completions * size.longest_completion
        tokens, row = groups * (size.prompt_tokens + behind), size.prompt_tokens + behind
        kept = self.kept_of_token()
        if on_gpu and self.repeats > 1:
            share = 1.0 if packed else behind / row
            kept += int(share * self.layers * self.query_width * self.itemsize)
        if checkpointed:
            kept = self.layers * self.hidden * self.itemsize + kept // self.layers
        numbers = self.repeats * self.itemsize if on_gpu else _FLOAT32
        rows, longest = groups * size.completions, size.longest_completion
        repeated = rows * (size.prompt_tokens + longest) * self.kv_of_token * (1 if on_gpu else self.repeats)
        if not on_gpu and self.itemsize == _FLOAT32 and longest * self.heads <= 2 * self.kv_width:
            # A CPU keeps weights of attention instead (`cpu.attend_completions`).
            repeated = rows * (size.prompt_tokens + longest) * longest * self.heads * self.layers * _FLOAT32
        return {
            "activations": tokens * kept,
            "masks": groups * row**2 * (1 + numbers) if packed else 0,
            "repeated prefix": 0 if packed else repeated,
        }

    def scored_logits(self, tokens: int, *, learnt: bool = True) -> int:
        """Bytes where log-probs of so many tokens are made, in chunks (`logits.token_logprobs`)."""
        chunk = min(tokens * self.vocabulary, max(CHUNK_ELEMENTS, self.vocabulary))
        return chunk * _FLOAT32 * (_LOGIT_COPIES if learnt else _SCORED_COPIES)

    def sampled_logits(self, rows: int) -> int:
        """Bytes where so many rows draw their next token."""
        return rows * self.vocabulary * _FLOAT32 * _SAMPLED_COPIES


class DecodeLimits(NamedTuple):
    """How much a decode loop takes on at a time."""

    max_rows: int = 256
    """Completions."""
    prefill_tokens: int = 32768
    """Prompt tokens of one pass."""

    @classmethod
    def of(cls, policy: Policy, new_tokens: int) -> DecodeLimits:
        """What a GPU has memory for now, with the policy on it; fixed numbers on a CPU.

        `new_tokens` is what a completion may have.
        """
        free = free_memory(policy.device)
        return cls() if free is None else cls.within(policy, int(_SHARE * free), new_tokens)

    @classmethod
    def within(cls, policy: Policy, budget: int, new_tokens: int) -> DecodeLimits:
        """What `budget` bytes are enough for."""
        inner, itemsize = _mlp_width(policy.hf_model.config.get_text_config()), policy.dtype.itemsize
        widths = policy.key_bytes, policy.hidden_size, inner, policy.vocab_size
        return cls._fitting(budget, new_tokens, *widths, itemsize)

    @classmethod
    def on_gpu(cls, shape: ModelShape, free: int | None, new_tokens: int) -> DecodeLimits:
        """`of` a model of that shape where `free` bytes are; the most of any GPU where that is not known."""
        budget = 1 << 62 if free is None else int(_SHARE * free)
        widths = shape.kv_of_token, shape.hidden, shape.intermediate, shape.vocabulary
        return cls._fitting(budget, new_tokens, *widths, shape.itemsize)

    @classmethod
    def _fitting(
        cls, budget: int, new_tokens: int, keys: int, hidden: int, inner: int, vocabulary: int, itemsize: int
    ) -> DecodeLimits:
        """More rows than by default, and no longer passes, which gain nothing."""
        row = (_PROMPT_TOKENS + new_tokens) * keys + _LOGIT_BYTES * vocabulary
        # Beside its keys a token has some hidden states and three of the MLP's width in use.
        token = keys + itemsize * (8 * hidden + 3 * inner)
        most = cls()
        return cls(max(1, min(4 * most.max_rows, budget // row)), max(1, min(most.prefill_tokens, budget // token)))


class EngineLimits(NamedTuple):
    """How much a vLLM engine on CPUs takes on at a time, which would else have nearly all memory of its machine."""

    rows: int
    """Completions."""
    tokens: int
    """Of a prompt with its completion."""
    cache_bytes: int
    """For keys and values."""

    @classmethod
    def on_cpu(cls, key_bytes: int, context: int, *, rows: int, tokens: int | None = None) -> EngineLimits:
        """What an assignment of `rows` completions can use, within `MOST_CACHE_BYTES`.

        Args:
            key_bytes: of a token, in the engine's dtype.
            context: the model's.
            rows: at a time, at most.
            tokens: of a prompt and completion, where somebody chose them: one of them has room whatever it takes.
        """
        blocks = max(1, MOST_CACHE_BYTES // (key_bytes * CACHE_BLOCK) - 1)
        length = min(context, blocks * CACHE_BLOCK) if tokens is None else tokens
        of_row = ceil(length / CACHE_BLOCK)
        # One block is nobody's.
        used = max(of_row, min(rows * of_row, blocks)) + 1
        return cls(rows, length, used * CACHE_BLOCK * key_bytes)


def padded_rank(rank: int) -> int:
    """Of the buffers that vLLM has for adapters of a rank."""
    return next((each for each in _LORA_RANKS if each >= rank), rank)


def scored_parts(sizes: Sequence[tuple[int, int]], key_bytes: int) -> list[slice]:
    """Groups that are scored together: each completion has its own copy of the prompt's keys and values meanwhile, and
    those of a part are `MOST_KEYS_BYTES` at most, a single group's apart.

    Args:
        sizes: of each group, its completions and the tokens of the longest with its prompt.
        key_bytes: of a token.
    """
    parts: list[slice] = []
    rows, longest, start = 0, 0, 0
    for i, (completions, tokens) in enumerate(sizes):
        if i > start and (rows + completions) * max(longest, tokens) * key_bytes > MOST_KEYS_BYTES:
            parts.append(slice(start, i))
            rows, longest, start = 0, 0, i
        rows, longest = rows + completions, max(longest, tokens)
    return [*parts, slice(start, len(sizes))]


def fitting_tokens(shape: ModelShape, free: int, size: GroupSize, *, packed: bool, checkpointed: bool) -> int:
    """Tokens of the largest micro-batch of groups of one size that a GPU takes with `free` bytes left beside weights,
    gradients and optimiser; one group at least."""
    logits = shape.scored_logits(size.completions * size.longest_completion * _MANY)
    one = shape.learnt_groups(1, size, packed=packed, checkpointed=checkpointed, on_gpu=True)
    groups = int(_USED * free - logits) // sum(one.values())
    return max(1, groups) * (size.prompt_tokens + size.completions * size.longest_completion)


def model_shape(
    model: PreTrainedModel, lora: LoraSection, dtype: torch.dtype, quantization: QuantizationSection | None = None
) -> ModelShape:
    """Reads the sizes off a model, which may be without weights (on the meta device), before an adapter is on it.

    `quantization` is what a model that is without weights is going to have; one that is loaded has it.

    Raises:
        AdapterError: the LoRA targets do not fit the model.
        ConfigError: the quantisation does not.
    """
    text = model.config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    targets = resolve_targets(model, lora)
    saved = saved_modules(model, lora)
    linears = {name: m for name in targets if isinstance(m := model.get_submodule(name), nn.Linear)}
    parameters = sum(numel(p) for p in model.parameters())
    language = {id(p): numel(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in _of(part)}
    weights, largest = weight_bytes(model, dtype, quantization)
    return ModelShape(
        parameters=parameters,
        weight_bytes=weights,
        layer_bytes=_layer_parameters(model) * dtype.itemsize,
        language_parameters=sum(language.values()),
        adapter_parameters=sum(
            lora.rank_of(name) * (m.in_features + m.out_features) + lora.dora * m.out_features
            for name, m in linears.items()
        ),
        adapted_layers=len(targets),
        adapted_parameters=sum(numel(m.weight) for m in linears.values()),
        adapted_inputs=sum(m.in_features for m in linears.values()),
        itemsize=dtype.itemsize,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=_mlp_width(text),
        query_width=text.num_attention_heads * head_width,
        kv_width=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_width,
        vocabulary=text.vocab_size,
        heads=text.num_attention_heads,
        saved_parameters=sum(numel(p) for name in saved for p in _of(model.get_submodule(name))),
        adapts_vision=any(id(p) not in language for name in (*targets, *saved) for p in _of(model.get_submodule(name))),
        dequantized_bytes=largest,
    )


def weight_bytes(
    model: PreTrainedModel, dtype: torch.dtype, quantization: QuantizationSection | None
) -> tuple[int, int]:
    """Bytes of a base's weights, and of the largest quantised layer as numbers (0 where there is none).

    Raises:
        ConfigError: the quantisation does not fit a model that is without weights.
    """
    quantized: list[Any] = [module.weight for module in model.modules() if is_quantized(module)]
    if quantized:  # it is loaded
        return held_bytes(model), max(map(numel, quantized)) * dtype.itemsize
    total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if quantization is None:
        return total, 0
    weights: list[Any] = [model.get_submodule(name).weight for name in quantized_layers(model, quantization)]
    total += sum(bytes_of(quantization, w.numel(), len(w)) - w.numel() * dtype.itemsize for w in weights)
    return total, max(w.numel() for w in weights) * dtype.itemsize


def _of(module: Any) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _layer_parameters(model: PreTrainedModel) -> int:
    layers = getattr(model.get_decoder(), "layers", None)
    return sum(numel(p) for p in layers.parameters()) if isinstance(layers, nn.ModuleList) else 0


def _mlp_width(text: Any) -> int:
    """I; models without the usual key, and those with one width a layer, are taken at 4 h and at the widest."""
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return max(width) if isinstance(width, list | tuple) else int(width)
