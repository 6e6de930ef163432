"""The one implementation of "prompt once, G completions": used by sampling, reference scoring and learning.

`K` prompts, `P` prompt tokens (left-padded), `N = ΣG` completions in prompt order, `T` completion tokens
(right-padded), `V` vocabulary, `d` hidden width.

    prompts [K, P] ──forward, cache kept──▶ Prefix ──repeated per completion──▶ completions [N, T−1] attend to it

Autograd sums the G gradients into the one prefix. The first completion token is predicted by the last prompt position,
so only T − 1 tokens go through the second call. `path="packed"` puts a prompt and its completions into one row, for one
call without a cache (`packed.py`); `path="naive"` runs every completion behind its own copy of the prompt. Nothing here
changes the path by itself (see `policy/parity.py`).

A prompt's pass needs of the last layer its keys and values everywhere, and all else at the last position only: nothing
reads what the last layer would make of the other positions, since the completions attend to keys and values, and the
first token is predicted by the last position. Its MLP and the projections to queries and of what attention gives are
about 0.8 ÷ L of a prompt's products in a model with L layers, forward and backward. Attention itself goes on over all
positions, with queries of 0 for those that nobody reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.logits import token_logprobs
from mmrl_ray.policy.memory import scored_parts
from mmrl_ray.policy.model import Policy, SharedPrompts, computing
from mmrl_ray.policy.scoring.collate import (
    PromptBatch,
    completion_positions,
    pad_prompts,
    row_arguments,
    vision_arguments,
)
from mmrl_ray.policy.scoring.packed import packed_rows

ScorePath = Literal["shared_prefix", "packed", "naive"]

_PER_POSITION = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
"""Submodules of a layer that make of each position something for this position alone."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """K prompts after their one pass through the language model."""

    cache: Cache
    """Keys and values of every layer, batch K. A forward that gets it grows it: hand out `select(…).cache`."""
    logits: torch.Tensor
    """[K, V], of the first completion token, as the model gives them (no temperature, nothing forbidden)."""
    hidden: torch.Tensor
    """[K, d], what `logits` were made of."""
    attention_mask: torch.Tensor
    """int64 [K, P], 1 where a prompt token is real (left padding)."""
    next_position: torch.Tensor
    """int64 [K], position of the first completion token."""

    def select(self, indices: torch.Tensor) -> Prefix:
        """A new prefix of the given rows, repeats allowed; this one's cache stays as it is. Differentiable."""
        return Prefix(
            cache=select_cache(self.cache, indices),
            logits=self.logits[indices],
            hidden=self.hidden[indices],
            attention_mask=self.attention_mask[indices],
            next_position=self.next_position[indices],
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """What π says about N completions."""

    logprobs: torch.Tensor
    """float32 [N, T], 0 where `mask` is False."""
    mask: torch.Tensor
    """bool [N, T], True at completion tokens."""
    entropies: torch.Tensor | None = None
    """float32 [N, T], 0 where `mask` is False; when asked for, and with a gradient when that was asked for."""
    hidden: torch.Tensor | None = None
    """[M, d], what each of the M completion tokens was chosen from, completion after completion; when asked for."""


def select_cache(cache: Cache, indices: torch.Tensor) -> Cache:
    """A copy of `cache` that holds the given batch rows (repeats allowed); `cache` itself is left as it is."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.batch_select_indices(indices)
    return copied


def _repeated(cache: Cache, index: torch.Tensor, prompt_of: torch.Tensor, *, apart: bool) -> Cache:
    """`select_cache` for one forward behind it, which copies the prompts' keys once instead of twice where it can.

    Args:
        cache: of K prompts.
        index: int64 [N] on the CPU, the prompt of each row, ascending.
        prompt_of: the same on the device.
        apart: attention takes the prompts' keys by themselves (`Acceleration.completions`): they are not copied at all.
    """
    held = [layer.keys for layer in cache.layers if type(layer) is DynamicLayer and layer.keys is not None]
    counts = set(torch.bincount(index, minlength=held[0].shape[0]).tolist()) if held else set()
    if len(held) < len(cache.layers) or len(counts) != 1:
        return select_cache(cache, prompt_of)
    (repeats,) = counts
    copied = copy.copy(cache)
    copied.layers = [_RepeatedLayer(layer, repeats, apart=apart) for layer in cache.layers]
    return copied


class _RepeatedLayer(DynamicLayer):
    """Keys and values of prompts [K, H, P, d], each for G rows, which see them with their own behind: [K·G, H, .., d].

    For one forward; until then it holds those of the prompts, once.
    """

    def __init__(self, layer: Any, repeats: int, *, apart: bool) -> None:
        super().__init__()
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self._repeats, self._apart = repeats, apart

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Both, each prompt's G times with the rows' own behind them; or the rows' own, and with them the prompts'."""
        if self._apart:
            prompts = SharedPrompts(cast(Tensor, self.keys), cast(Tensor, self.values), self._repeats)
            key_states.prompts = prompts  # type: ignore[attr-defined]
            return key_states, value_states
        self.keys = _Behind.apply(self.keys, key_states, self._repeats)
        self.values = _Behind.apply(self.values, value_states, self._repeats)
        return self.keys, self.values


class _Behind(torch.autograd.Function):
    """[K, H, P, d] and [K·G, H, T, d] → [K·G, H, P + T, d]."""

    @staticmethod
    def forward(ctx: Any, prompts: Tensor, own: Tensor, repeats: int) -> Tensor:
        rows, heads, tokens, width = own.shape
        ctx.prompt, ctx.repeats = prompts.shape[2], repeats
        made = own.new_empty(rows, heads, ctx.prompt + tokens, width)
        made.unflatten(0, (-1, repeats))[..., : ctx.prompt, :] = prompts[:, None]
        made[:, :, ctx.prompt :] = own
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        to_prompts = grad.unflatten(0, (-1, ctx.repeats))[..., : ctx.prompt, :].sum(dim=1)
        return to_prompts, grad[:, :, ctx.prompt :], None


@computing
def encode_prefix(
    policy: Policy, prompts: Sequence[EncodedPrompt], features: Sequence[VisionFeatures] | None
) -> Prefix:
    """One pass of K prompts through the language model, with gradient where the caller has it on.

    Args:
        policy: the model.
        prompts: K of them.
        features: what `vision_features` made of them; None runs the vision tower inside the forward, on the pixels (so
            do any where `policy.inject_vision` is False).
    """
    batch = pad_prompts(policy, prompts).on(policy)
    output = _forward_prompts(policy, prompts, features, batch)
    hidden = output.last_hidden_state[:, -1]
    return Prefix(
        cache=output.past_key_values,
        logits=policy.logits(hidden),
        hidden=hidden,
        attention_mask=batch.attention_mask,
        next_position=batch.next_position,
    )


def score_in_parts(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    completions: Sequence[Sequence[Tensor]],
    temperature: float,
    *,
    path: ScorePath,
) -> list[list[Tensor]]:
    """`score_completions` of as many groups at a time as memory allows: float32 [T] of each completion of each group,
    on the CPU."""
    # The last token of a completion predicts nothing.
    longest = [max((c.numel() - 1 for c in group), default=0) for group in completions]
    sizes = [(len(g), p.input_ids.numel() + m) for p, g, m in zip(prompts, completions, longest, strict=True)]
    found: list[list[Tensor]] = []
    for part in scored_parts(sizes, policy.key_bytes):
        of_part = None if features is None else features[part]
        scores = score_completions(policy, prompts[part], of_part, completions[part], temperature, path=path)
        rows = iter(zip(scores.logprobs.cpu(), scores.mask.cpu(), strict=True))
        found += [[row[mask].float().clone() for row, mask in (next(rows) for _ in g)] for g in completions[part]]
    return found


@computing
def score_completions(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    completions: Sequence[Sequence[torch.Tensor]],
    temperature: float,
    *,
    path: ScorePath = "shared_prefix",
    entropy: bool = False,
    entropy_gradient: bool = False,
    hidden: bool = False,
) -> Scores:
    """Log-probs of every completion token under π (temperature applied, image tokens forbidden, float32).

    Args:
        policy: the model.
        prompts: K of them.
        features: K of them from `vision_features`, or None to run the vision tower inside.
        completions: K groups of int64 [T] token ids; G and T may differ.
        temperature: the rollout temperature.
        path: "shared_prefix", "packed" or "naive"; they give the same numbers, up to rounding.
        entropy: also return the entropy at every token.
        entropy_gradient: with a gradient.
        hidden: also return the hidden states.

    Raises:
        ValueError: the numbers of prompts, features and groups differ, or there is no completion.
        ModelError: path="packed" on a model that cannot take packed rows.
    """
    counts = [len(group) for group in completions]
    if len(completions) != len(prompts) or (features is not None and len(features) != len(prompts)):
        given = "none" if features is None else len(features)
        raise ValueError(f"{len(prompts)} prompts, {given} features and {len(completions)} groups of completions")
    if sum(counts) == 0:
        raise ValueError(f"no completion to score in {len(completions)} groups")
    index = torch.repeat_interleave(torch.tensor(counts))
    targets, mask = _pad_completions(policy, [c for group in completions for c in group])
    # All places are found on the CPU: a mask as an index would wait for a GPU to count it.
    row, column = map(policy.place, mask.nonzero(as_tuple=True))
    if path == "shared_prefix":
        rows = _shared_rows(policy, prompts, features, index, targets, mask)
    elif path == "packed":
        rows = packed_rows(policy, prompts, features, index, targets, mask)
    elif path == "naive":
        rows = _naive_rows(policy, prompts, features, index, targets, mask, hidden=hidden)
    else:
        raise ValueError(f"path={path!r} is none of 'shared_prefix', 'packed' and 'naive'")
    chosen_from = rows[row, column]
    logprobs, entropies = token_logprobs(
        chosen_from,
        policy.place(targets[mask]),
        head=nn.Identity() if path == "naive" and not hidden else policy.logits,
        forbidden=policy.image_token_ids,
        temperature=temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
        vocab_size=policy.vocab_size,
    )

    def unpacked(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).index_put((row, column), values)

    return Scores(
        unpacked(logprobs),
        policy.place(mask),
        None if entropies is None else unpacked(entropies),
        chosen_from if hidden else None,
    )


def _shared_rows(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    index: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Hidden states [N, T, d] that predict `targets`; `index`, `targets` and `mask` are on the CPU."""
    batch = pad_prompts(policy, prompts)
    output = _forward_prompts(policy, prompts, features, batch.on(policy))
    prompt_of = policy.place(index)
    first = output.last_hidden_state[:, -1][prompt_of][:, None]
    length = targets.shape[1] - 1
    if length == 0:
        return first
    with policy.acceleration.completions(policy) as apart:
        suffix = policy.core(
            input_ids=policy.place(targets[:, :-1]),
            attention_mask=policy.place(torch.cat([batch.attention_mask[index], mask[:, :-1].long()], dim=1)),
            position_ids=policy.place(completion_positions(policy, batch.next_position[index], length)),
            past_key_values=_repeated(output.past_key_values, index, prompt_of, apart=apart),
            use_cache=True,
        )
    return torch.cat([first, suffix.last_hidden_state], dim=1)


def _naive_rows(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    index: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    *,
    hidden: bool,
) -> torch.Tensor:
    """The model's own logits [N, T, V] that predict `targets`, from N full rows of prompt and completion.

    With `hidden`, the hidden states [N, T, d] that they are made of.
    """
    picks = index.tolist()
    prompts = [prompts[i] for i in picks]
    features = None if features is None else [features[i] for i in picks]
    length = targets.shape[1]
    rows = row_arguments(policy, pad_prompts(policy, prompts), targets, mask)
    with vision_arguments(policy, prompts, features) as vision:
        arguments = {**rows, "use_cache": False, **vision}
        if hidden:
            return policy.core(**arguments).last_hidden_state[:, -length - 1 : -1]
        # Some models (VideoLLaMA 3) make logits of every token whatever they are told.
        return policy.model(**arguments, logits_to_keep=length + 1).logits[:, -length - 1 : -1]


def _forward_prompts(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    batch: PromptBatch,
) -> Any:
    """Its cache is whole; its `last_hidden_state` means something at the last position only."""
    with vision_arguments(policy, prompts, features) as vision, last_layer_at_last_position(policy):
        return policy.core(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            # As `generate` does: some decoders (Granite 4 Vision's) make none by themselves.
            past_key_values=DynamicCache(config=policy.hf_model.config.get_text_config(decoder=True)),
            use_cache=True,
            **batch.per_token,
            **vision,
        )


@contextmanager
def last_layer_at_last_position(policy: Policy) -> Iterator[None]:
    """Within it, such parts of the language model's last layer compute the last position and give 0 for the others.

    Submodules that go by other names are left as they are.
    """
    layers = getattr(policy.hf_model.get_decoder(), "layers", None) or [None]
    with ExitStack() as hooks:
        for name in _PER_POSITION:
            module = layers[-1]
            for part in name.split("."):
                module = getattr(module, part, None)
            if isinstance(module, nn.Module):
                hooks.enter_context(_at_last_position(module))
        yield


@contextmanager
def _at_last_position(module: nn.Module) -> Iterator[None]:
    lengths: list[int] = []

    def keep_last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = args[0].shape[:2]
        lengths.append(tokens[1])
        # A mixture of experts may be told each token's type beside it (Ernie).
        return tuple(each[:, -1:] if isinstance(each, Tensor) and each.shape[:2] == tokens else each for each in args)

    def pad_back(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        padding = (0, 0, lengths.pop() - 1, 0)
        if isinstance(output, tuple):  # a mixture of experts may give its router's logits, too
            return (pad(output[0], padding), *output[1:])
        return pad(output, padding)

    handles = [module.register_forward_pre_hook(keep_last), module.register_forward_hook(pad_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pad_completions(policy: Policy, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded targets int64 [N, T] and their mask bool [N, T], on the CPU."""
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=policy.pad_token_id)
    lengths = torch.tensor([row.numel() for row in rows])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return padded, mask
