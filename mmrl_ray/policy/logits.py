"""Logits from hidden states by the model's own code behind its core, and log-probs of chosen tokens under π.

`B` sequences, `T` tokens, `M` tokens in all, `d` hidden width, `V` vocabulary.

Behind the last layer many models do more than multiply by `lm_head`: they cap logits softly (Gemma 4, PaliGemma 2),
scale them (Granite, Cohere) or scale what the head is given (Inkling). None of it is copied here. The model's `forward`
runs on a shallow copy of the model whose core gives back given hidden states, and all that follows is the model's own.
Where that turns out to be the bare head, the head is called directly. `Policy.logits` is the one way in.

Log-probs (`token_logprobs`) are float32, at the rollout temperature, with image tokens forbidden. A vocabulary of 150 k
makes [M, V] the largest tensor of a step, so tokens go through in chunks whose logits are made again in the backward
pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mmrl_ray.errors import ModelError

_PROBE_SHAPE = (2, 3, 8)
"""Rows, tokens and width of the made-up hidden states: the heads they meet are made up, too."""
_PROBE_RANGE = 64.0
"""Made-up logits go up to this many times a standard normal number, either way: no soft cap leaves them alone."""
CHUNK_ELEMENTS = 1 << 26
"""Logits one chunk holds at most (256 MiB in float32)."""


def takes_bare_head(model: PreTrainedModel, path: str) -> bool:
    """Whether the model's logits are what its head makes of the hidden states, with nothing before it or behind it.

    Found out, bit for bit, by the model's forward with a made-up core and a made-up head, so that it costs no product
    with real weights and holds for whatever weights the head is given later.

    Raises:
        ModelError: the model has no core with a head behind it, its forward cannot be run from hidden states, its
            logits do not cover the vocabulary, or those of one token depend on the others.
    """
    vocabulary = model.config.get_text_config().vocab_size
    kind = type(model).__name__
    if not {model.base_model_prefix} <= model._modules.keys() or model.get_output_embeddings() is None:
        raise ModelError(
            f"model {path!r}: a {kind} is not a core with a head behind it, so its log-probs cannot be made of hidden "
            "states, neither in sampling nor in learning; use another image-text-to-text checkpoint"
        )
    if model.device.type == "meta":  # nothing can be compared, and nothing is asked of its numbers
        return False
    hidden = torch.randn(_PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(model.device, model.dtype)
    head = _MadeUpHead(vocabulary, hidden)
    try:
        with torch.no_grad():
            logits = _forward(model, hidden, head)
            apart = _forward(model, hidden.flatten(0, 1)[:, None], head)
    except Exception as error:  # whatever a model's forward raises when it is run in a way that it was not made for
        raise ModelError(
            f"model {path!r}: the forward of a {kind} cannot be run from its hidden states on "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}), so that what is sampled would not be "
            "what is learnt; use another image-text-to-text checkpoint"
        ) from error
    if logits.shape != (*_PROBE_SHAPE[:2], vocabulary):
        raise ModelError(
            f"model {path!r}: a {kind} gives logits of shape {list(logits.shape)} for {_PROBE_SHAPE[0]} x "
            f"{_PROBE_SHAPE[1]} tokens and a vocabulary of {vocabulary}; use another image-text-to-text checkpoint"
        )
    if not torch.equal(apart[:, 0], logits.flatten(0, 1)):
        raise ModelError(
            f"model {path!r}: what a {kind} makes of one token's hidden state depends on its neighbours, so "
            "completions cannot be decoded token by token; use another image-text-to-text checkpoint"
        )
    return len(head.given) == 2 and torch.equal(head.given[0], hidden) and torch.equal(logits, head(hidden))


def model_logits(model: PreTrainedModel, hidden: torch.Tensor, *, bare: bool) -> torch.Tensor:
    """The model's logits [.., V] of its last hidden states [M, d] or [B, T, d], in the model's dtype; differentiable.

    `bare` is what `takes_bare_head` found.
    """
    if bare:
        return cast(torch.Tensor, model.get_output_embeddings()(hidden))
    if hidden.ndim == 3:
        return _forward(model, hidden)
    # One token a row: where rows go through different adapters, PEFT tells them apart by the first axis.
    return _forward(model, hidden[:, None])[:, 0]


def _forward(model: PreTrainedModel, hidden: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
    """The model's forward behind its core, on [B, T, d]; with `head` in the place of its own where one is given.

    The model itself is not touched: another thread may be in it, such as a backward pass that makes logits again.
    """
    core = model.base_model
    modules = {**model._modules, model.base_model_prefix: _GivenStates(core, hidden)}
    if head is not None:
        own = model.get_output_embeddings()
        modules = {name: head if module is own else module for name, module in modules.items()}
    copied = object.__new__(type(model))
    copied.__dict__ = {**model.__dict__, "_modules": modules}
    # Some forwards hold the length of what they were given against that of the hidden states.
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    output: Any = type(model).forward(copied, input_ids=tokens, use_cache=False, return_dict=True)
    return cast(torch.Tensor, output.logits)


class _GivenStates(nn.Module):
    """In the place of a model's core: gives the hidden states it was made with, whatever it is called with."""

    def __init__(self, core: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self.__dict__.update(_core=core, _hidden=hidden)  # no submodule, and looked up before `__getattr__`

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_core"], name)

    def forward(self, *args: Any, **kwargs: Any) -> _CoreOutput:
        """The given hidden states, whatever comes in."""
        return _CoreOutput(self.__dict__["_hidden"])


class _CoreOutput:
    """What a core returns: its last hidden state, and None for everything else that a forward may hand on."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, key: int | str) -> torch.Tensor:
        if key in (0, "last_hidden_state"):
            return self.last_hidden_state
        raise KeyError(f"a core that was given its hidden states has no output {key!r}")

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _MadeUpHead(nn.Module):
    """In the place of a model's head: logits that are a simple function of the first number of each hidden state."""

    def __init__(self, vocabulary: int, like: torch.Tensor) -> None:
        super().__init__()
        self.weights = torch.linspace(-_PROBE_RANGE, _PROBE_RANGE, vocabulary).to(like)
        self.given: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[.., d] → [.., V]."""
        self.given.append(hidden)
        return hidden[..., :1] * self.weights


def policy_logits(logits: torch.Tensor, forbidden: Sequence[int], temperature: float) -> torch.Tensor:
    """float32 [.., V]: what π's softmax is taken of.

    The one definition for sampler, reference and learner: float32, then divided by the temperature, then minus
    infinity at `forbidden` token ids.
    """
    scaled = logits.float() / temperature
    if forbidden:
        # Made there directly, the copy would wait for everything that a GPU still has to do.
        index = torch.tensor(forbidden, dtype=torch.int64).to(logits.device, non_blocking=True)
        scaled = scaled.index_fill(-1, index, float("-inf"))
    return scaled


def token_logprobs(
    rows: torch.Tensor,
    targets: torch.Tensor,
    *,
    head: Callable[[torch.Tensor], torch.Tensor],
    forbidden: Sequence[int],
    temperature: float,
    entropy: bool = False,
    entropy_gradient: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob of each target, float32 [M], and the entropy of each row's distribution, float32 [M], when asked for.

    Args:
        rows: [M, d], what `head` turns into logits.
        targets: int64 [M].
        head: [m, d] → [m, V].
        forbidden: token ids outside the support of π.
        temperature: above 0.
        entropy: also return entropies.
        entropy_gradient: entropies carry a gradient, too, for which the rows' distributions are kept until it is made.
        chunk_elements: logits held at once.
        vocab_size: V, when known; else all rows make one chunk.
    """
    size = max(1, chunk_elements // vocab_size) if vocab_size else max(1, rows.shape[0])
    parts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for start in range(0, rows.shape[0], size):
        part = (rows[start : start + size], targets[start : start + size])
        arguments = (*part, head, forbidden, temperature, entropy, entropy_gradient)
        if rows.shape[0] > size and torch.is_grad_enabled():
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False))
        else:
            parts.append(_chunk(*arguments))
    if not parts:
        nothing = rows.new_zeros(0, dtype=torch.float32)
        return nothing, nothing if entropy else None
    logprobs = torch.cat([logprob for logprob, _ in parts])
    return logprobs, torch.cat([e for _, e in parts if e is not None]) if entropy else None


def _chunk(
    rows: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    forbidden: Sequence[int],
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    logits = policy_logits(head(rows), forbidden, temperature)
    normalizer = logits.logsumexp(dim=-1)
    chosen = logits.gather(-1, targets[:, None])[:, 0] - normalizer
    if not entropy:
        return chosen, None
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        logprobs = logits - normalizer[:, None]
        # 0 · (−inf) is 0 here: a forbidden token adds nothing.
        return chosen, -(logprobs.exp() * logprobs.masked_fill(logprobs == float("-inf"), 0.0)).sum(dim=-1)
