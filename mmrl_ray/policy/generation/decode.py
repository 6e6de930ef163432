"""The one decode loop: a rollout worker drains a fixed list of groups, a server admits and cancels between steps.

    admit ──▶ waiting ──prefix once a prompt──▶ batches ──one token a row and step──▶ finished ──take──▶ GroupOutput

Admitted groups wait until there are rows for them (`queue.py` says who is next). Those that start together are one
batch, which joins a running one where their caches allow it (`decode_batch.py`). What a group samples depends on its
logits and its seed alone, and the logits on its neighbours by no more than rounding; the same calls in the same order
give the same tokens bit for bit on the CPU. Groups of several adapters share passes (`policy/lora/routing.py`): a batch
row belongs to one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy.generation.base import DecodeRequest, Event, Failure, GroupOutput
from mmrl_ray.policy.generation.decode_batch import DecodeBatch, keeps_every_key, takes_4d_mask
from mmrl_ray.policy.generation.queue import DecodeQueue, Group, GroupBook
from mmrl_ray.policy.generation.rules import GenerationRules, RuledGroup
from mmrl_ray.policy.lora.routing import RowAdapters
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.prefix import encode_prefix
from mmrl_ray.policy.vision import VisionCache, vision_features

__all__ = ["DecodeRequest", "Decoder", "Event", "Failure", "GroupOutput", "decode_endlessly", "decode_groups"]


class Decoder(GroupBook):
    """Decodes completions of prompts that come and go. Not thread-safe.

    Its `counters` are steps, passes (forwards of batches), prefills, prompts, rows, merges, compactions, and
    unmerged_rows (those whose cache keeps them from joining others: each such batch is a forward of its own).
    """

    def __init__(
        self,
        policy: Policy,
        *,
        vision_cache: VisionCache | None = None,
        max_rows: int = 256,
        prefill_tokens: int = 32768,
        packed: bool | None = None,
        adapters: RowAdapters | None = None,
        rules: GenerationRules | None = None,
    ) -> None:
        """Decodes with `policy`, whose weights may change between groups but not while some are running.

        Args:
            policy: the model; its adapter, if any, is on.
            vision_cache: where the features of prompts admitted without them are looked up and kept.
            max_rows: completions decoded at the same time.
            prefill_tokens: prompt tokens, padding included, that one pass encodes at most (one prompt always may).
            packed: decode the completions of a prompt on one copy of its keys; by default wherever that is possible.
                False is for comparison.
            adapters: lets every group name its adapter; without it all go through whatever is active on the model.
            rules: of the checkpoint, where captions are to be those of `generate`; never where a policy learns.
        """
        super().__init__(policy, DecodeQueue(max_rows), max_rows, names_adapters=adapters is not None)
        self._cache = vision_cache
        self._prefill_tokens = prefill_tokens
        self._packed = packed
        self._adapters = adapters
        self._rules = rules
        self._forbidden = torch.tensor(policy.image_token_ids, dtype=torch.int64, device=policy.device)
        self._eos = torch.tensor(policy.eos_token_ids, dtype=torch.int64, device=policy.device)
        self._batches: list[DecodeBatch] = []

    @property
    def running_rows(self) -> int:
        """Rows that get a token at the next step."""
        return sum(sum(decode_batch.live) for decode_batch in self._batches)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._queue.waiting and not self._batches

    @torch.no_grad()
    def step(self, failures: list[Failure] | None = None) -> list[Event]:
        """Starts what there are rows for, then gives every running row one token; where several callers have rows, only
        those in passes with the one that has had the least.

        Args:
            failures: is given what goes wrong, by group. Those groups are gone then, with everything they held, and the
                others go on. Without it the first error is raised.

        Raises:
            ModelError: a row's logits are NaN, or a prompt's vision features do not fit it; the groups that were to
                start are dropped then.
        """
        self._start_waiting(failures)
        events = [
            event
            for decode_batch in self._queue.in_turn(self._batches)
            for event in self._advance(decode_batch, failures)
        ]
        self._settle()
        self.counters["steps"] += 1
        return events

    def _free(self, group: Group) -> None:
        self._settle(freed=group)

    def _ruled(self, prompt: EncodedPrompt, rows: int, sampling: SamplingParams) -> RuledGroup | None:
        if self._rules is None:
            return None
        return RuledGroup(self._rules, prompt.input_ids.to(self._policy.device), rows, sampling)

    def _start_waiting(self, failures: list[Failure] | None) -> None:
        batch: list[Group] = []
        for group in self._queue.starting():
            width = max(g.request.prompt.input_ids.numel() for g in (*batch, group))
            if batch and (width * (len(batch) + 1) > self._prefill_tokens or self._keeps_apart(batch[0], group)):
                self._try_to_start(batch, failures)
                batch = []
            batch.append(group)
        if batch:
            self._try_to_start(batch, failures)

    def _keeps_apart(self, first: Group, second: Group) -> bool:
        """Whether two prompts cannot share a pass: PEFT does not tell the rows of a vision tower inside it apart."""
        return first.adapter != second.adapter and not self._policy.inject_vision

    def _try_to_start(self, batch: list[Group], failures: list[Failure] | None) -> None:
        if failures is None:
            self._start(batch)
            return
        try:
            self._start(batch)
        except Exception as error:  # noqa: BLE001 - whatever a model's forward raises is this batch's affair
            if len(batch) == 1:
                failures.append(Failure(batch[0].handle, error))
                return
            for group in batch:  # one of them is to blame, or all together were too much
                self._try_to_start([group], failures)

    def _start(self, batch: list[Group]) -> None:
        """Encodes the prompts of `batch` in one pass and makes a batch of its rows."""
        # Out of the books while it can fail: a group that cannot be encoded is gone, the others go on.
        for group in batch:
            self._groups.pop(group.handle, None)
        self._find_features(batch)
        prompts = [group.request.prompt for group in batch]
        with self._on([group.adapter for group in batch]):
            prefix = encode_prefix(self._policy, prompts, [g.vision for g in batch if g.vision is not None])
        self._groups.update((group.handle, group) for group in batch)
        steps = max(group.request.sampling.max_new_tokens for group in batch)
        packed = self._packed is not False and takes_4d_mask(self._policy) and keeps_every_key(prefix.cache, steps)
        rows_of = [group.rows for group in batch]
        decode_batch = DecodeBatch(
            self._policy, prefix, rows_of, packed=packed, max_rows=self._max_rows, adapters=self._adapters
        )
        self._batches.append(decode_batch)
        rows = sum(len(group.rows) for group in batch)
        self.counters.update(prefills=1, prompts=len(batch), rows=rows)
        self.counters["unmerged_rows"] += 0 if decode_batch.mergeable else rows

    def _find_features(self, batch: list[Group]) -> None:
        missing = [group for group in batch if group.request.features is None]
        # Features that adapters have a part in are made under one at a time.
        trainable = None if self._adapters is None else self._adapters.adapts_vision
        by_adapter: dict[str | None, list[Group]] = {}
        for group in missing:
            by_adapter.setdefault(group.adapter if trainable else None, []).append(group)
        for adapter, groups in by_adapter.items():
            with self._on([adapter]):
                prompts = [g.request.prompt for g in groups]
                made = vision_features(self._policy, prompts, self._cache, trainable=trainable)
            for group, features in zip(groups, made, strict=True):
                group.vision = features
        for group in batch:
            group.vision = group.request.features or group.vision

    def _on(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        return nullcontext() if self._adapters is None else self._adapters.on(names)

    def _advance(self, decode_batch: DecodeBatch, failures: list[Failure] | None) -> list[Event]:
        """One token for every row of `batch`."""
        self.counters["passes"] += not decode_batch.is_fresh
        try:
            logits = decode_batch.logits()
            if self._rules is not None:
                logits = decode_batch.ruled(logits)
            tokens, logprobs = decode_batch.sampler.sample(logits, self._forbidden, self._eos)
            decode_batch.put(tokens)
            drawn = list(zip(decode_batch.slots, tokens.tolist(), logprobs.tolist(), strict=True))
        except Exception as error:
            if failures is None:
                raise
            self._fail({row.handle for row in decode_batch.slots if row is not None}, error, failures)
            return []
        events = []
        for row, token, logprob in drawn:
            if row is None or row.finish_reason is not None:
                continue
            if logprob == logprob:
                events.append(self._add_token(row, token, logprob))
                continue
            broken = ModelError(
                f"the model's logits are NaN at token {len(row.tokens)} of row {row.index}; "
                "its weights or its adapter are broken: take an earlier checkpoint"
            )
            if failures is None:
                raise broken
            self._fail({row.handle}, broken, failures)
        return events

    def _settle(self, freed: Group | None = None) -> None:
        """Between steps: finished batches go, new ones join where they can, finished rows are dropped."""
        self._batches = [decode_batch for decode_batch in self._batches if any(decode_batch.live)]
        settled: list[DecodeBatch] = []
        for decode_batch in self._batches:
            held = freed is not None and any(row in freed.rows for row in decode_batch.slots)
            if held or decode_batch.is_wasteful:
                decode_batch.compact()
                self.counters["compactions"] += 1
            host = next(
                (o for o in settled if o.accepts(decode_batch) and self._queue.may_share(o, decode_batch)), None
            )
            if host is None:
                settled.append(decode_batch)
            else:
                host.absorb(decode_batch)
                self.counters["merges"] += 1
        self._batches = settled


def decode_groups(decoder: GroupBook, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
    """Admits `requests`, decodes until all are finished, and returns their outputs in order.

    Raises:
        What `Decoder.admit` and `Decoder.step` raise; nothing of `requests` is left in the decoder then.
    """
    handles: list[int] = []
    try:
        for r in requests:
            handles.append(decoder.admit(r.prompt, r.n, r.sampling, greedy_extra=r.greedy_extra, features=r.features))
        while any(decoder.unfinished(handle) for handle in handles):
            decoder.step()
        return [decoder.take(handle) for handle in handles]
    finally:
        for handle in handles:
            if decoder.unfinished(handle):
                decoder.cancel(handle)


def decode_endlessly(policy: Policy, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
    """`decode_groups` by a decoder of its own in which no token ends a completion: every one has `max_new_tokens`.

    For comparisons, which want a log-prob everywhere; what the policy's next token is drawn from stays the same.
    """
    rows = sum(request.n for request in requests)
    return decode_groups(Decoder(replace(policy, eos_token_ids=()), max_rows=rows), requests)
