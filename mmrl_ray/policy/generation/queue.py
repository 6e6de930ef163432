"""Who is next in a decode loop: which groups start, and whose rows get a token; and the book that is kept of them.

Groups wait until there are rows for them, strictly in their order; where they name callers, those of the caller with
the fewest rows start first, no caller has all rows, and all have as much of the time: fair queueing by what each has
cost (Demers et al., 1989). A caller is a name, or None where nobody shares.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmrl_ray.errors import ConfigError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams, VisionFeatures
from mmrl_ray.policy.generation.base import DecodeRequest, Event, Failure, GroupOutput
from mmrl_ray.policy.generation.decode_batch import DecodeBatch, Row
from mmrl_ray.policy.generation.rules import RuledGroup
from mmrl_ray.policy.generation.sampling import check_sampling
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import check_context
from mmrl_ray.policy.tokens import TextStream

_FOR_OTHERS = 4
"""One caller leaves one in so many of the rows free, so that nobody else waits for a whole group of its to end."""
_PASS_COST = 8
"""Of a pass beside that of its rows, each of which counts 1, as does a token of a prompt. The measure is rough, and the
same on every machine, so that the order of steps is, too."""
LIGHT_ROWS = 8
"""With more rows in a pass a caller has it to itself: others would wait for its rows at each token."""
_SAVED = 256
"""What a caller may have had less, or more, than the others when it comes back: about a short answer. So much of those
who ask now and then goes before those who ask all the time, and nobody waits longer for what was long ago."""


@dataclass(slots=True, eq=False)
class Group:
    """One admitted request."""

    handle: int
    request: DecodeRequest
    rows: list[Row]
    streams: bool
    caller: str | None
    vision: VisionFeatures | None = None

    @property
    def adapter(self) -> str | None:
        """PEFT's name of the one that all its rows go through."""
        return self.rows[0].adapter

    @property
    def unfinished(self) -> int:
        """Rows that get more tokens."""
        return sum(row.finish_reason is None for row in self.rows)


class DecodeQueue:
    """The groups of a decode loop, those that wait and those that run."""

    def __init__(self, max_rows: int, *, by_cost: bool = True) -> None:
        """`max_rows` run at the same time. Without `by_cost` what callers have had does not count, only their rows: all
        that run get a token at each step, and who waits for somebody else to catch up leaves rows empty."""
        self._by_cost = by_cost
        self.groups: dict[int, Group] = {}
        """By handle; those that run and those that wait."""
        self.waiting: deque[Group] = deque()
        self._max_rows = max_rows
        self._shares = Shares(max_rows)

    def add(self, group: Group) -> None:
        """Puts a group at the end."""
        self.groups[group.handle] = group
        self.waiting.append(group)

    def starting(self) -> Iterator[Group]:
        """The groups that start now, as long as there are rows for them.

        Each leaves the queue when the next one is asked for: one that is not started in the end goes on waiting.
        """
        if not self.waiting:
            return
        running = self._rows_by_caller()
        self._shares.keep(running)
        while (group := self._next(running)) is not None:
            yield group
            self.waiting.remove(group)
            running[group.caller] += len(group.rows)
            self._shares.started(group.caller, group.request.prompt.input_ids.numel() if self._by_cost else 0)

    def in_turn(self, batches: Sequence[DecodeBatch]) -> Sequence[DecodeBatch]:
        """Those of `batches` that get a token at this step; each is counted for its callers."""
        if not self._shares.named:
            return batches
        callers = [self._callers(decode_batch) for decode_batch in batches]
        everybody = set().union(*callers)
        if not everybody:
            return batches
        least = self._shares.least(everybody)
        chosen = [(decode_batch, found) for decode_batch, found in zip(batches, callers, strict=True) if least in found]
        for decode_batch, found in chosen:
            self._shares.passed(found, len(decode_batch.slots))
        return [decode_batch for decode_batch, _ in chosen]

    def may_share(self, one: DecodeBatch, other: DecodeBatch) -> bool:
        """Whether the rows of two batches may be decoded by the same passes."""
        if not self._shares.several:
            return True
        rows = self._callers(one, other)
        return len(rows) < 2 or max(rows.values()) <= LIGHT_ROWS

    def _callers(self, *batches: DecodeBatch) -> Counter[str | None]:
        """Rows of each caller in a pass."""
        slots = (row for decode_batch in batches for row in decode_batch.slots)
        return Counter(self.groups[r.handle].caller for r in slots if r is not None and r.finish_reason is None)

    def _rows_by_caller(self) -> Counter[str | None]:
        """Rows that get a token at the next step."""
        waiting = {group.handle for group in self.waiting}
        running: Counter[str | None] = Counter()
        for handle, group in self.groups.items():
            if handle not in waiting:
                running[group.caller] += group.unfinished
        return running

    def _next(self, running: Counter[str | None]) -> Group | None:
        """What starts next, if there are rows for it.

        Where it has to wait for rows so do all others, or small groups would keep out a large one for ever.
        """
        first: dict[str | None, Group] = {}
        for group in self.waiting:
            first.setdefault(group.caller, group)
        free = self._max_rows - running.total()
        for caller in self._shares.next_caller({caller: len(g.rows) for caller, g in first.items()}, running):
            return first[caller] if len(first[caller].rows) <= free else None
        return None


class Shares:
    """What callers with rows have had."""

    def __init__(self, max_rows: int) -> None:
        self._most = max_rows - max_rows // _FOR_OTHERS
        self._cost: dict[str | None, float] = {}
        """Of those with rows."""
        self._left: dict[str | None, float] = {}
        """Of those that had rows before."""
        self._last: dict[str | None, int] = {}
        """By caller that waits, how many groups had started when its last one did."""
        self._starts = 0

    @property
    def named(self) -> bool:
        """Whether callers with rows have names."""
        return any(caller is not None for caller in self._cost)

    @property
    def several(self) -> bool:
        """Whether there may be more than one caller with rows."""
        return len(self._cost) > 1

    def keep(self, running: Mapping[str | None, int]) -> None:
        """Tells who has rows: `running` of each caller."""
        for caller in [caller for caller in self._cost if not running.get(caller)]:
            self._left[caller] = self._cost.pop(caller)

    def next_caller(self, wanted: Mapping[str | None, int], running: Counter[str | None]) -> Collection[str | None]:
        """Whose group starts next, or nobody's: whoever has the fewest rows, of several to whom the last one started
        longest ago. Passed over are those who have their part of the rows or have had more than another one with rows.

        Args:
            wanted: rows of the first group of each caller that waits, in the order in which they came.
            running: rows of each caller.
        """
        least = min((cost for caller, cost in self._cost.items() if running[caller]), default=math.inf)
        may_start = [
            caller
            for caller, rows in wanted.items()
            if caller is None
            or (self._cost_of(caller) <= least and (not running[caller] or running[caller] + rows <= self._most))
        ]
        self._last = {caller: self._last.get(caller, 0) for caller in wanted}
        return sorted(may_start, key=lambda caller: (running[caller], self._last[caller]))[:1]

    def started(self, caller: str | None, tokens: int) -> None:
        """A group of the caller's, whose prompt has so many tokens."""
        self._starts += 1
        self._last[caller] = self._starts
        self._charge({caller}, tokens)

    def passed(self, callers: Collection[str | None], rows: int) -> None:
        """A pass of so many rows, for these callers together."""
        self._charge(callers, _PASS_COST + rows)

    def least(self, callers: Collection[str | None]) -> str | None:
        """Who has had the least of them."""
        return min(callers, key=lambda caller: (self._cost_of(caller), caller or ""))

    def _charge(self, callers: Collection[str | None], cost: float) -> None:
        for caller in callers:
            self._cost[caller] = self._cost_of(caller) + cost / len(callers)
            self._left.pop(caller, None)

    def _cost_of(self, caller: str | None) -> float:
        """Who is new begins where the others are, who comes back near them."""
        if caller in self._cost:
            return self._cost[caller]
        others = min(self._cost.values(), default=0.0)
        return min(max(self._left.get(caller, others), others - _SAVED), others + _SAVED)


class GroupBook(ABC):
    """The groups of a decode loop from their admission until they are handed out, whatever makes their tokens."""

    def __init__(self, policy: Policy, queue: DecodeQueue, max_rows: int, *, names_adapters: bool) -> None:
        """`names_adapters` says whether every group names its adapter, or none does."""
        self.counters: Counter[str] = Counter()
        """Since the start."""
        self._policy = policy
        self._max_rows = max_rows
        self._names_adapters = names_adapters
        self._ends = frozenset(policy.eos_token_ids)
        self._next_handle = 0
        self._queue = queue
        self._groups = queue.groups

    @property
    @abstractmethod
    def running_rows(self) -> int:
        """Rows that get a token at the next step."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether nothing runs or waits."""

    @abstractmethod
    def step(self, failures: list[Failure] | None = None) -> list[Event]:
        """Starts what there are rows for, and gives running rows their next tokens.

        Args:
            failures: is given what goes wrong, by group. Those groups are gone then, with everything they held, and the
                others go on. Without it the first error is raised.
        """

    @abstractmethod
    def _free(self, group: Group) -> None:
        """The group's rows, which have started, get no more tokens."""

    def _ruled(self, prompt: EncodedPrompt, rows: int, sampling: SamplingParams) -> RuledGroup | None:
        """What the group's checkpoint asks of every next token, where that is done here."""
        return None

    @property
    def waiting(self) -> int:
        """Groups that have not started."""
        return len(self._queue.waiting)

    def admit(
        self,
        prompt: EncodedPrompt,
        n: int,
        sampling: SamplingParams,
        *,
        greedy_extra: bool = False,
        features: VisionFeatures | None = None,
        stream: bool = False,
        adapter: str | None = None,
        caller: str | None = None,
    ) -> int:
        """Puts a group of `n` completions of `prompt` in the queue; it starts at the next step that has rows for it.

        Args:
            prompt: from `encode_prompts`.
            n: completions; all alike if `sampling.greedy`.
            sampling: for every one of them; row i draws from the stream (sampling.seed, i).
            greedy_extra: one more row that takes the likeliest token each time, beside the n.
            features: the prompt's vision features where the caller has them.
            stream: report text with each event.
            adapter: PEFT's name of the group's adapter, or `row_adapters.BASE`; exactly where the decoder has
                `adapters`. It must stay on the model until the group has ended.
            caller: who asks, in a queue that several share; None for a caller that has the decoder to itself.

        Returns:
            the handle that events and `take` name the group by.

        Raises:
            ConfigError: `n` or `sampling` is out of range, the group has more rows than `max_rows`, or it is to be
                decoded by values and its adapter has no value heads.
            ContextLengthError: prompt and completion exceed the model's context.
            ValueError: an adapter is named without `adapters`, or none is with them.
        """
        if (adapter is None) == self._names_adapters:
            raise ValueError(f"adapter={adapter!r}: groups name an adapter exactly where the decoder was given them")
        rows = n + greedy_extra
        if n < 1 or rows > self._max_rows:
            raise ConfigError(
                f"n={n} completions (with greedy {rows} rows) must be from 1 to max_rows={self._max_rows}"
            )
        check_sampling(sampling)
        if sampling.value_beta > 0 and adapter not in self._policy.value_heads:
            raise ConfigError(
                f"value_beta={sampling.value_beta:g} needs value heads, which algorithm: ilql trains, and this policy "
                "has none: leave beta at 0"
            )
        check_context(self._policy, prompt, sampling.max_new_tokens)
        handle = self._next_handle
        self._next_handle += 1
        follow = stream or bool(sampling.stop)
        ruled = self._ruled(prompt, rows, sampling)
        group = Group(
            handle=handle,
            request=DecodeRequest(prompt, n, sampling, greedy_extra, features),
            rows=[
                Row(
                    handle,
                    i,
                    sampling,
                    sampling.greedy or i == n,
                    TextStream(self._policy.tokenizer, sampling.stop) if follow else None,
                    adapter,
                    ruled,
                )
                for i in range(rows)
            ],
            streams=stream,
            caller=caller,
        )
        self._queue.add(group)
        return handle

    def cancel(self, handle: int) -> GroupOutput:
        """Ends a group at once, wherever it is, and returns what there is of it; its unfinished rows are "cancelled".

        Raises:
            KeyError: no such group, or it was taken already.
        """
        group = self._groups[handle]
        for row in group.rows:
            if row.finish_reason is None:
                row.finish_reason = "cancelled"
                if row.text is not None:
                    row.text.finish()
        if group in self._queue.waiting:
            self._queue.waiting.remove(group)
        else:
            self._free(group)
        return self.take(handle)

    def take(self, handle: int) -> GroupOutput:
        """Hands out a finished group and forgets it.

        Raises:
            KeyError: no such group, or it was taken already.
            ValueError: some of its rows are still running.
        """
        group = self._groups[handle]
        if group.unfinished:
            raise ValueError(f"group {handle} has {group.unfinished} unfinished rows; step on, or cancel it")
        del self._groups[handle]
        made = [row.completion(self._policy.tokenizer) for row in group.rows]
        n = group.request.n
        return GroupOutput(tuple(made[:n]), made[n] if group.request.greedy_extra else None, group.vision)

    def unfinished(self, handle: int) -> int:
        """Rows of a group that get more tokens; 0 also for one that was taken, was cancelled or failed."""
        group = self._groups.get(handle)
        return 0 if group is None else group.unfinished

    def drain(self) -> None:
        """Steps until every admitted group is finished: `max_new_tokens` steps for each that waits, at most."""
        while not self.idle:
            self.step()

    def _fail(self, handles: set[int], error: Exception, failures: list[Failure]) -> None:
        for handle in sorted(handles):
            if self.unfinished(handle):
                for row in self._groups.pop(handle).rows:
                    row.finish_reason = row.finish_reason or "cancelled"
                failures.append(Failure(handle, error))

    def _add_token(self, row: Row, token: int, logprob: float) -> Event:
        row.tokens.append(token)
        row.logprobs.append(logprob)
        text, stopped = "", False
        if row.text is not None:
            text, stopped = row.text.push(token)
        if stopped or token in self._ends:
            row.finish_reason = "stop"
        elif len(row.tokens) >= row.sampling.max_new_tokens:
            row.finish_reason = "length"
        if row.text is not None and row.finish_reason is not None and not stopped:
            text += row.text.finish()
        return Event(row.handle, row.index, token, logprob, text if self._streams(row) else "", row.finish_reason)

    def _streams(self, row: Row) -> bool:
        return row.text is not None and self._groups[row.handle].streams
