"""What makes a policy faster on a CUDA GPU, and changes nothing but rounding. Without this file all else works as it
does; `load.accelerate` looks for it by its name, which is the device's.

`B` rows, `H` heads of queries, `H'` heads of keys, `r = H / H'`, `Q` queries, `K` keys, `d` head width.

**Attention of grouped heads under a mask** (`attend_grouped`). PyTorch's kernels that take a mask want as many heads of
keys as of queries, so transformers repeats keys and values r times: memory that is written, read, and kept for the
backward pass. Here the r heads that share keys become r·Q queries of one head. What a query sees does not depend on
which head it is of, so the mask is repeated along its queries: once a forward pass, not once a layer, and in the dtype
and the alignment in which the kernel reads it, which PyTorch would bring about in every layer otherwise.

    query [B, H, Q, d] → [B, H', r·Q, d]      key, value [B, H', K, d]      mask [B, 1, Q, K] → [B, 1, r·Q, K]

Without a mask transformers leaves keys as they are, and its own function is called.

**Attention within pictures and windows** (`attend_within`). The towers of the Qwen-VL kind put the patches of all
pictures into one row and attend within each, or within windows of 8 × 8. Without a kernel for that transformers cuts
the row up and calls attention piece by piece, in every layer, waiting for the GPU to say where to cut. With a kernel of
variable lengths it is one call; else the pieces become the rows of one batch, the shorter ones padded.

**Norms in one kernel** (`use_fused_norms`). The root-mean-square norm that nearly all language models have is seven
kernels in transformers, and keeps its input in float32 and its output for the backward pass; PyTorch's is one, and
keeps its input as it came.

**Decode steps as CUDA graphs** (`Graphs`). A step of a model with 36 layers is some thousand kernels of microseconds,
which Python launches more slowly than the GPU computes them. Recorded once, they are launched together.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mmrl_ray.policy.checkpoint import brief
from mmrl_ray.policy.model import OWN_ATTENTION, Acceleration, Captured, Policy

varlen_attn: Any = None
if find_spec("torch.nn.attention.varlen") is not None:  # PyTorch before 2.10 has none
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn

logger = logging.getLogger(__name__)

_GROUPED = f"{OWN_ATTENTION}grouped"
_WITHIN = f"{OWN_ATTENTION}flash_within"
"""With "flash" in it, since transformers then says where pieces begin instead of cutting them out."""
_ALIGNED = 16
"""Elements of a mask at whose multiples its rows have to begin."""


def accelerate(model: PreTrainedModel) -> Acceleration:
    """Has a model that was just loaded attend by the functions here, and PyTorch leave out cuDNN's attention.

    That one builds a plan, in milliseconds, for every shape it has not seen, and each decode step and each micro-batch
    of ragged rows has one of its own.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    use_grouped_attention(model)
    use_attention_within(model)
    use_fused_norms(model)
    return Acceleration(forward=autocast, capture=Graphs())


def autocast(policy: Policy) -> AbstractContextManager[Any]:
    """In bfloat16 the adapter's branch, whose weights are float32, multiplies in bfloat16 as all else does."""
    is_half = policy.dtype == torch.bfloat16
    return torch.autocast(policy.device.type, torch.bfloat16) if is_half else nullcontext()


class Graphs:
    """Records functions as CUDA graphs. For the thread that runs the model; one at a time is recorded or replayed."""

    def __init__(self) -> None:
        self._is_refused = False

    def __call__(self, function: Callable[[], tuple[torch.Tensor, ...]]) -> Captured | None:
        """The function as a graph; None once one could not be recorded, which is said in the log.

        Nothing is computed here. A model cannot be recorded where it reads a number from the GPU to go on, or copies
        one there that Python has just made.
        """
        if self._is_refused or not torch.cuda.is_available():
            return None
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        keeps_casts = torch.is_autocast_cache_enabled()
        # Weights that autocast has cast before are no part of a graph, and are gone when its context ends.
        torch.set_autocast_cache_enabled(False)
        try:
            # Other threads of the process may use the GPU meanwhile. Memory that graphs share would have to be kept
            # between two assignments; that of its own goes with the graph.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                made = function()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # the context leaves its own in place where ending the graph fails
            self._is_refused = True
            logger.warning(
                "decode steps are launched kernel by kernel: this model's cannot be recorded (%s)", brief(error)
            )
            return None
        finally:
            torch.set_autocast_cache_enabled(keeps_casts)
        return Captured(graph.replay, made)


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Lets the layers of the language model attend by `attend_grouped` where they attend by "sdpa", also in training.

    Every other kind of attention stays.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa":
        # The property would change the configs below it too, the tower's where it is one of them.
        config._attn_implementation_internal = _GROUPED


def use_attention_within(model: PreTrainedModel) -> None:
    """Lets the layers of a tower that are told where pieces of a row begin attend by `attend_within`, not by "sdpa"."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        told = inspect.signature(module.forward).parameters
        in_pieces = "cu_seqlens" in told and "attention_mask" not in told and hasattr(module, "is_causal")
        if in_pieces and getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation_internal = _WITHIN


def use_fused_norms(model: nn.Module) -> None:
    """Has every norm that is written as Llama's is, whatever its name, computed by one kernel: to be rounded once."""
    known: dict[type, bool] = {LlamaRMSNorm: True}
    llama = inspect.getsource(LlamaRMSNorm.forward)
    for module in model.modules():
        kind = type(module)
        if kind not in known:
            known[kind] = "RMSNorm" in kind.__name__ and inspect.getsource(kind.forward) == llama
        if known[kind]:
            module.forward = partial(_fused_norm, cast(LlamaRMSNorm, module), module.forward)


def _fused_norm(
    module: LlamaRMSNorm, own: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor
) -> torch.Tensor:
    if hidden_states.dtype != module.weight.dtype:
        return own(hidden_states)
    # Autocast would have it computed in float32, and kept in float32.
    with torch.autocast(hidden_states.device.type, enabled=False):
        return rms_norm(hidden_states, module.weight.shape, module.weight, module.variance_epsilon)


def attend_grouped(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, for queries under one mask for all heads; "sdpa" takes everything else.

    Args:
        module: the attention layer.
        query: [B, H, Q, d].
        key: [B, H', K, d].
        value: [B, H', K, d].
        attention_mask: [B or 1, 1, Q, K], bool or added to the scores. A query that sees nothing gives some numbers,
            and no NaN.
        scaling: of the scores, 1 / √d by default.
        kwargs: what "sdpa" takes beside these.

    Returns:
        [B, Q, H, d] and None.
    """
    other = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if attention_mask is None or attention_mask.shape[1] != 1 or other:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (batch, heads, queries, width), groups = query.shape, key.shape[1]
    repeats = heads // groups
    mixed = scaled_dot_product_attention(
        query.reshape(batch, groups, repeats * queries, width),
        key,
        value,
        attn_mask=_folded(attention_mask, repeats, query.dtype),
        dropout_p=kwargs.get("dropout", 0.0),
        scale=scaling,
    )
    by_query = mixed.unflatten(2, (repeats, queries)).permute(0, 3, 1, 2, 4)  # [B, Q, H', r, d]
    return by_query.reshape(batch, queries, heads, value.shape[-1]), None


class _Pieces(NamedTuple):
    """`W` pieces of a row of `S` tokens, the longest of `L`."""

    number: int
    longest: int
    places: torch.Tensor | None
    """int64 [W, L], the place in the row of each token, 0 behind the last; None where all have L."""
    seen: torch.Tensor | None
    """bool [W, 1, 1, L], where there is one."""
    back: torch.Tensor | None
    """int64 [S], the place of each token among W · L."""

    @classmethod
    def of(cls, starts: torch.Tensor) -> _Pieces:
        """Of int64 or int32 [W + 1], where each begins and the last one ends."""
        bounds = list(pairwise(starts.tolist()))
        longest = max(end - start for start, end in bounds)
        if all(end - start == longest for start, end in bounds):
            return cls(len(bounds), longest, None, None, None)
        rows = [torch.arange(start, end) for start, end in bounds]
        places = pad_sequence(rows, batch_first=True)
        seen = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        back = seen.flatten().nonzero()[:, 0]
        made = (each.to(starts.device) for each in (places, seen[:, None, None], back))
        return cls(len(bounds), longest, *made)

    def cut(self, row: torch.Tensor) -> torch.Tensor:
        """[1, H, S, d] → [W, H, L, d]."""
        if self.places is None:
            return row[0].unflatten(1, (self.number, self.longest)).transpose(0, 1)
        return row[0][:, self.places].transpose(0, 1)

    def join(self, pieces: torch.Tensor) -> torch.Tensor:
        """[W, H, L, d] → [1, S, H, d]."""
        flat = pieces.transpose(1, 2).flatten(0, 1)
        return (flat if self.back is None else flat[self.back])[None]


_pieces = WeakTensorKeyDictionary()
"""Of where pieces begin, while it is in use: all layers of a pass are given the same tensors."""


def attend_within(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: tokens see those of their own piece of the row, and nothing else.

    Args:
        module: the attention layer.
        query: [1, H, S, d].
        key: [1, H, S, d].
        value: [1, H, S, d].
        attention_mask: None, or "sdpa" takes all.
        scaling: of the scores, 1 / √d by default.
        dropout: of the weights.
        cu_seq_lens_q: int32 [W + 1], where each piece begins and the last one ends; None, and "sdpa" takes all.
        max_length_q: tokens of the longest.
        kwargs: what "sdpa" takes beside these, and the same of keys.

    Returns:
        [1, S, H, d] and None.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout == 0 and max_length_q is not None and _has_kernel(query):
        rows = (each[0].transpose(0, 1) for each in (query, key, value))
        starts = cu_seq_lens_q.int()
        return varlen_attn(*rows, starts, starts, max_length_q, max_length_q, scale=scaling)[None], None
    pieces = _pieces.get(cu_seq_lens_q)
    if pieces is None:
        pieces = _pieces[cu_seq_lens_q] = _Pieces.of(cu_seq_lens_q)
    query, key, value = (pieces.cut(each) for each in (query, key, value))
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=pieces.seen, dropout_p=dropout, scale=scaling)
    return pieces.join(mixed), None


def _has_kernel(query: torch.Tensor) -> bool:
    """Whether there is one of variable lengths for such numbers: of 16 bits, on an Ampere GPU or a later one."""
    return (
        varlen_attn is not None
        and "scale" in inspect.signature(varlen_attn).parameters
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.device.type == "cuda"
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


AttentionInterface.register(_GROUPED, attend_grouped)
AttentionInterface.register(_WITHIN, attend_within)
AttentionMaskInterface.register(_GROUPED, sdpa_mask)

_folded_masks = WeakTensorKeyDictionary()
"""Of masks that are still in use: what it was made for, and what `_folded` made of it."""


def _folded(mask: torch.Tensor, repeats: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, r·Q, K] of `dtype`, to be added to scores, its rows aligned. All layers of a pass are given one tensor."""
    made_for = (repeats, dtype, mask._version)
    known = _folded_masks.get(mask)
    if known is not None and known[0] == made_for:
        return known[1]
    # Far below every score, and far enough from the least number that no scaling inside a kernel makes it infinite: a
    # row without keys, as that of a padding token, would be infinity minus infinity.
    low = torch.finfo(dtype).min / 4
    rows, _, queries, keys = mask.shape
    added = torch.zeros(rows, 1, queries, keys + -keys % _ALIGNED, dtype=dtype, device=mask.device)
    if mask.dtype == torch.bool:
        added[..., :keys].masked_fill_(~mask, low)
    else:
        added[..., :keys] = mask.clamp(min=low)
    folded = added.repeat(1, 1, repeats, 1)[..., :keys]
    _folded_masks[mask] = (made_for, folded)
    return folded
