"""Rows that are decoded by one forward pass, and their keys and values.

`B` batch rows, `Q` slots a batch row, `S = B·Q` slots (row-major), `K` keys, `V` vocabulary.

A slot holds one completion that is being decoded, or nothing. There are two layouts:

    packed  one batch row a prompt, its G completions are its Q = G slots. The prompt's keys are held once, and each
            step adds Q keys; a 4-D mask lets a slot see the prompt and its own tokens only. That is up to G times
            fewer keys to keep and to read than a copy of the prompt for every completion.
    rows    one batch row a completion (Q = 1), with its own copy of the prompt's keys and an ordinary 2-D mask.

`packed` needs an attention that takes a 4-D mask (sdpa, eager) and a cache that keeps every key: full attention, or
sliding windows that no row will ever outgrow. With such a cache a batch can also take in another one and drop keys
that nobody sees any more. Longer rows under a sliding window, and linear attention, allow neither: they keep to `rows`
and to those they were admitted with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from mmrl_ray.experience.carriers import Completion, FinishReason, SamplingParams
from mmrl_ray.policy.generation.kv_cache import KVLayer, StaticStep, fill_holes
from mmrl_ray.policy.generation.rules import RuledGroup
from mmrl_ray.policy.generation.sampling import RowSampler
from mmrl_ray.policy.lora.routing import RowAdapters, Rows
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.collate import position_axes
from mmrl_ray.policy.scoring.prefix import Prefix
from mmrl_ray.policy.tokens import TextStream

_TAKES_4D_MASK = ("sdpa", "eager")
_ROOM_STEPS = 64
"""Steps for which room is made at a time."""
_COMPACT_TO = 0.75
"""Where dropping finished rows copies all others, it is done when it leaves at most this share of the slots."""


@dataclass(slots=True, eq=False)
class Row:
    """One completion that is being decoded."""

    handle: int
    index: int
    """Place in its group; it chooses the row's random numbers."""
    sampling: SamplingParams
    greedy: bool
    text: TextStream | None
    """Followed token by token when somebody reads along or a stop string may end the row."""
    adapter: str | None = None
    """PEFT's name of the adapter it goes through; None is whatever is active on the model."""
    rules: RuledGroup | None = None
    """What its checkpoint asks of every next token, shared with the rest of its group."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def completion(self, tokenizer: Any) -> Completion:
        """What there is of it; "cancelled" where it did not come to an end."""
        return Completion(
            token_ids=torch.tensor(self.tokens, dtype=torch.int64),
            logprobs=torch.tensor(self.logprobs, dtype=torch.float32),
            text=self.text.text if self.text is not None else tokenizer.decode(self.tokens, skip_special_tokens=True),
            finish_reason=self.finish_reason or "cancelled",
        )


def keeps_every_key(cache: Cache, new_tokens: int) -> bool:
    """Whether each layer of `cache`, `new_tokens` later, would still hold the key of every token."""
    return all(
        type(layer) is DynamicLayer
        or (
            type(layer) is DynamicSlidingWindowLayer
            and layer.get_seq_length() + new_tokens < layer.sliding_window
            and layer.keys is not None
            and layer.keys.shape[-2] == layer.get_seq_length()
        )
        for layer in cache.layers
    )


def takes_4d_mask(policy: Policy) -> bool:
    """Whether the language model's attention reads a mask of its own for every query."""
    return policy.attention in _TAKES_4D_MASK


class DecodeBatch:
    """Rows decoded together. Made of a prefix, whose logits are the first that it gives."""

    def __init__(
        self,
        policy: Policy,
        prefix: Prefix,
        groups: Sequence[Sequence[Row]],
        *,
        packed: bool,
        max_rows: int,
        adapters: RowAdapters | None = None,
    ) -> None:
        """Takes over `prefix`, cache and all; `groups[i]` are the rows of its i-th prompt, at least one.

        `max_rows` may be decoded at the same time; `adapters` switches between the rows' adapters, where they name any.
        """
        self.packed = packed
        steps = max(row.sampling.max_new_tokens for rows in groups for row in rows)
        self.mergeable = keeps_every_key(prefix.cache, steps)
        if packed and not (self.mergeable and takes_4d_mask(policy)):
            raise ValueError("packed rows need a cache that keeps every key and an attention that takes a 4-D mask")
        self.width = max(len(rows) for rows in groups) if packed else 1
        self.slots: list[Row | None] = []
        prompts: list[int] = []
        for i, rows in enumerate(groups):
            self.slots += [*rows, *[None] * (self.width - len(rows) if packed else 0)]
            prompts += [i] * (1 if packed else len(rows))
        self._policy = policy
        self._attention = policy.attention
        self._max_rows = max_rows
        self._adapters = adapters
        self._note_adapters()
        self._cache = prefix.cache
        self._keys = prefix.attention_mask.shape[1]
        index = torch.tensor(prompts, device=prefix.logits.device)
        if self.mergeable:
            room = self.width * min(steps, _ROOM_STEPS)
            self._layers = [KVLayer(*_keys_of(layer, prompts, index), room) for layer in self._cache.layers]
            self._cache.layers = list(self._layers)
        else:
            self._reorder(index)
        self._visible = prefix.attention_mask.bool()[index][:, None].repeat(1, self.width, 1)
        self._own = torch.eye(self.width, dtype=torch.bool, device=index.device)
        self._positions = prefix.next_position[index][:, None].repeat(1, self.width)
        self._tokens = torch.zeros_like(self._positions)
        self._step: StaticStep | None = None
        self._rows: Rows | None = None
        """Of each adapter, while steps are recorded: a replay reads these very tensors."""
        self.sampler = RowSampler.of(
            [None if row is None else (row.sampling, row.index, row.greedy) for row in self.slots], index.device
        )
        self._first: torch.Tensor | None = self._with_values(
            *(each[index].repeat_interleave(self.width, dim=0) for each in (prefix.logits, prefix.hidden))
        )

    @property
    def live(self) -> list[bool]:
        """[S], whether the slot holds a row that goes on."""
        return [row is not None and row.finish_reason is None for row in self.slots]

    @property
    def keys(self) -> int:
        """K, the keys that each batch row holds."""
        return self._keys

    @property
    def is_fresh(self) -> bool:
        """Whether the next `logits` are the prefix's, and cost no pass."""
        return self._first is not None

    @property
    def is_wasteful(self) -> bool:
        """Whether `compact` would make up for what it costs."""
        live = self.live
        counts = [sum(live[start : start + self.width]) for start in range(0, len(live), self.width)]
        left = sum(count > 0 for count in counts) * max(counts)
        # One slot a batch row: the last ones take the places of those that have finished, and the rest stays in place.
        cheap = self.mergeable and self.width == 1 and self._step is None
        return left < len(live) if cheap else left <= _COMPACT_TO * len(live)

    def logits(self) -> torch.Tensor:
        """[S, V] of every slot's next token: the prefix's, and then one forward pass over the tokens put in.

        Where a row asks for it, log π + β(Q − V) in the place of log π, but for a number that a slot's tokens share.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if self._is_static:
            made = self._static_step()
        else:
            self._end_static()
            self._add_own_keys()
            made = self._forward(self._visible[:, :, : self._keys])
            self._positions = self._positions + 1
        logits, hidden = (each.flatten(0, 1) for each in made)
        return self._with_values(logits, hidden)

    def _forward(self, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, Q, V] of the slots' next tokens and what they are made of, [B, Q, d]."""
        positions, axes = self._positions, position_axes(self._policy)
        mask = self._attention_mask(visible)  # of the shape that the policy's own attention takes
        adapters = nullcontext() if self._adapters is None else self._adapters.on(self._names, self._rows)
        faster = self._policy.acceleration
        with adapters, faster.forward(self._policy), faster.decode_step(self._policy):
            output = self._policy.core(
                input_ids=self._tokens,
                attention_mask=mask,
                position_ids=positions if axes is None else positions.expand(axes, -1, -1),
                past_key_values=self._cache,
                use_cache=True,
            )
            return self._policy.logits(output.last_hidden_state), output.last_hidden_state

    @property
    def _is_static(self) -> bool:
        """Whether steps are computed on tensors that stay in place: what they read is then the same at each.

        A cache that is no `KVLayer` grows by itself; an ordinary 2-D mask is made into another, by its length, within
        the model.
        """
        return self._policy.acceleration.capture is not None and self.packed

    def _static_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._step is not None and self._step.is_full:
            self._end_static()
        if self._step is None:
            capture = self._policy.acceleration.capture
            assert capture is not None
            self._tokens, self._positions = self._tokens.clone(), self._positions.clone()
            self._rows = None if self._adapters is None else self._adapters.rows_of(self._names)
            self._step = StaticStep(
                self._layers,
                self._visible[:, :, : self._keys],
                capture,
                steps=max(row.sampling.max_new_tokens - len(row.tokens) for row in self.slots if row is not None),
                most_steps=_ROOM_STEPS,
            )
            self._visible = self._step.visible
        logits, hidden = self._step.run(self._forward_in_place)
        self._keys += self.width
        return logits, hidden

    def _forward_in_place(self, visible: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self._forward(visible)
        self._positions.add_(1)
        return made

    def _end_static(self) -> None:
        """Before rows come or go: tensors are made anew then."""
        if self._step is not None:
            self._step.end()
            self._step = self._rows = None

    def _with_values(self, logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Adds β(Q − V) to the logits [S, V] of the slots that are decoded by values; all others stay as they are."""
        by_adapter: dict[str | None, list[tuple[int, float]]] = {}
        for i, row in enumerate(self.slots):
            if row is not None and row.finish_reason is None and row.sampling.value_beta > 0:
                by_adapter.setdefault(row.adapter, []).append((i, row.sampling.value_beta))
        for adapter, rows in by_adapter.items():
            index = self._policy.place(torch.tensor([i for i, _ in rows]))
            beta = self._policy.place(torch.tensor([[beta] for _, beta in rows]))
            advantages = self._policy.value_heads[adapter].advantages(hidden[index])
            logits = logits.float().index_add(0, index, beta * advantages)
        return logits

    def ruled(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [S, V] of the slots after what their checkpoint asks for, group by group."""
        groups: dict[int, list[tuple[int, Row]]] = {}
        for slot, row in enumerate(self.slots):
            if row is not None and row.finish_reason is None:
                groups.setdefault(row.handle, []).append((slot, row))
        logits = logits.float()
        for found in groups.values():
            rules = found[0][1].rules
            if rules is not None:
                index = self._policy.place(torch.tensor([slot for slot, _ in found]))
                rows = [row for _, row in found]
                changed = rules.apply(logits[index], [row.index for row in rows], [row.tokens for row in rows])
                logits = logits.index_copy(0, index, changed)
        return logits

    def put(self, tokens: torch.Tensor) -> None:
        """Takes the token, int64 [S], that each slot goes on with."""
        if self._step is not None:
            self._tokens.copy_(tokens.view(-1, self.width))
        else:
            self._tokens = tokens.view(-1, self.width)

    def accepts(self, other: DecodeBatch) -> bool:
        """Whether `other` can be taken in, at the price of at most as many empty slots again."""
        return (
            self.mergeable
            and other.mergeable
            and not (self.is_fresh or other.is_fresh)
            and self.packed == other.packed
            and self.width <= 2 * other.width
            and other.width <= 2 * self.width
        )

    def absorb(self, other: DecodeBatch) -> None:
        """Takes in the rows of `other`, after both have put a token; keys are padded on the left to the longer."""
        width, keys = max(self.width, other.width), max(self._keys, other._keys)
        for decode_batch in (self, other):
            decode_batch._end_static()
            decode_batch._widen(width)
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.join(theirs, most_rows=self._max_rows // width)
        parts = [pad(c._visible[:, :, : c._keys], (keys - c._keys, 0)) for c in (self, other)]
        self._visible = torch.cat(parts)
        self._keys = keys
        self._tokens = torch.cat([self._tokens, other._tokens])
        self._positions = torch.cat([self._positions, other._positions])
        self.sampler = self.sampler.join(other.sampler)
        self.slots += other.slots
        self._names += other._names

    def compact(self) -> None:
        """Drops finished rows, and the keys that only they could see; at least one row must go on."""
        self._end_static()
        live = self.live
        by_prompt = [
            [i for i in range(start, start + self.width) if live[i]] for start in range(0, len(live), self.width)
        ]
        kept = fill_holes([b for b, slots in enumerate(by_prompt) if slots])
        width = max(len(slots) for slots in by_prompt)
        self._take([by_prompt[b] for b in kept], width)
        batch = self._policy.place(torch.tensor(kept))
        if not self.mergeable:
            self._reorder(batch)
            return
        seen = self._visible[:, :, : self._keys].any(dim=1)
        keys = int(seen.sum(dim=1).max())
        if not bool(seen[:, : self._keys - keys].any()):
            for layer in self._layers:
                layer.keep(kept, keys)
            self._visible = self._visible[:, :, self._keys - keys : self._keys]
        else:
            # Stable: what is seen goes to the end, in the order it was in.
            order = seen.long().argsort(dim=1, stable=True)[:, self._keys - keys :]
            for layer in self._layers:
                layer.gather(batch, order)
            self._visible = self._visible.gather(2, order[:, None].expand(-1, self.width, -1))
        self._keys = keys

    def _reorder(self, batch: torch.Tensor) -> None:
        # What beam search reorders by: unlike batch_repeat_interleave, linear attention has it too.
        self._cache.reorder_cache(cast(torch.LongTensor, batch))

    def _widen(self, width: int) -> None:
        if width > self.width:
            starts = range(0, len(self.slots), self.width)
            self._take([list(range(start, start + self.width)) for start in starts], width)

    def _take(self, slots: list[list[int]], width: int) -> None:
        """Arranges the given slots of each batch row in `width` slots; those left over become empty."""
        # An empty slot goes on with what some other one has: the numbers are computed and nobody reads them.
        flat = [row[q] if q < len(row) else row[0] for row in slots for q in range(width)]
        filled = [q < len(row) for row in slots for q in range(width)]
        index, mask = self._policy.place(torch.tensor(flat)), self._policy.place(torch.tensor(filled))[:, None]
        self.slots = [self.slots[i] if is_filled else None for i, is_filled in zip(flat, filled, strict=True)]
        self.sampler = self.sampler.select(flat)
        self._first = None if self._first is None else self._first[index]
        self._tokens = self._tokens.flatten()[index].view(-1, width)
        self._positions = self._positions.flatten()[index].view(-1, width)
        self._visible = (self._visible.flatten(0, 1)[index] & mask).view(len(slots), width, -1)
        self._own = torch.eye(width, dtype=torch.bool, device=index.device)
        self.width = width
        self._note_adapters()

    def _note_adapters(self) -> None:
        """The adapter of each batch row: rows of one prompt share it."""
        starts = range(0, len(self.slots), self.width)
        prompts = [self.slots[start : start + self.width] for start in starts]
        self._names = [next(row.adapter for row in prompt if row is not None) for prompt in prompts]

    def _add_own_keys(self) -> None:
        """Each slot's next token gets a key that only the slot itself sees."""
        end = self._keys + self.width
        if end > self._visible.shape[2]:
            self._visible = pad(self._visible, (0, self.width * _ROOM_STEPS))
        self._visible[:, :, self._keys : end] = self._own
        self._keys = end

    def _attention_mask(self, visible: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            return visible[:, 0].long()
        if self._attention == "sdpa":
            return visible[:, None]
        lowest = torch.finfo(self._policy.dtype).min
        hidden = torch.zeros(visible.shape, dtype=self._policy.dtype, device=visible.device)
        return hidden.masked_fill(~visible, lowest)[:, None]


def _keys_of(layer: Any, prompts: list[int], index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each slot's prompt."""
    if prompts == list(range(layer.keys.shape[0])):
        return layer.keys, layer.values
    return layer.keys[index], layer.values[index]
