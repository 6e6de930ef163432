"""From logits to tokens: filters, the log-probs of the distribution sampled from, and a seeded draw for each row.

`R` rows (completions being decoded), `V` vocabulary, `T` tokens a completion may have.

A draw is the inverse of the distribution function at one uniform number a row and token. Its numbers come from a
counter-based generator keyed by (seed of the group, row), all of them when the row is admitted. So a row's numbers
depend on nothing but its seed and its place in its group: not on the other groups of the batch, not on the order of
rows, not on how many rows there are or when finished ones are dropped. An exponential race (Gumbel argmax) has the same
law but needs `V` numbers a token, drawn for each group on its own at every step: on a small model that costs more than
the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mmrl_ray.errors import ConfigError
from mmrl_ray.experience.carriers import SamplingParams

logger = logging.getLogger(__name__)


def check_sampling(sampling: SamplingParams) -> None:
    """Refuses parameters that name no distribution.

    Raises:
        ConfigError: naming the parameter.
    """
    refused = {
        "temperature": not (sampling.temperature > 0 and math.isfinite(sampling.temperature)),
        "max_new_tokens": sampling.max_new_tokens < 1,
        "min_new_tokens": not 0 <= (sampling.min_new_tokens or 0) <= sampling.max_new_tokens,
        "top_k": sampling.top_k < 0,
        "top_p": not 0 < sampling.top_p <= 1,
        "stop": any(not text for text in sampling.stop),
        "seed": not 0 <= sampling.seed < 2**64,
        "value_beta": not (sampling.value_beta >= 0 and math.isfinite(sampling.value_beta)),
    }
    for name, is_wrong in refused.items():
        if is_wrong:
            raise ConfigError(
                f"sampling parameter {name}={getattr(sampling, name)!r} is out of range "
                "(temperature > 0, 0 <= min_new_tokens <= max_new_tokens, top_k >= 0, 0 < top_p <= 1, "
                "no empty stop string, seed an unsigned 64-bit integer, value_beta >= 0)"
            )


def behaviour_logprobs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probs, float32 [R, V], of the distribution that tokens are sampled from.

    The order is temperature, then top-k, then top-p of what top-k left. Equal logits at the edge of a filter are kept
    from the lowest token id up, so that top-k leaves exactly k.

    Args:
        logits: [R, V]; minus infinity where a token is forbidden.
        temperature: float32 [R], above 0.
        top_k: int64 [R], 0 keeps every token; None if no row has one.
        top_p: float32 [R] in (0, 1], the smallest set of likeliest tokens that holds this much; None if no row has one.
    """
    scaled = logits.float() / temperature[:, None]
    if top_k is not None or top_p is not None:
        scaled = _filtered(scaled, top_k, top_p)
    return torch.log_softmax(scaled, dim=-1)


def _filtered(scaled: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ranked, dtype=torch.bool)
    if top_k is not None:
        rank = torch.arange(ranked.shape[-1], device=ranked.device)
        drop |= (rank >= top_k[:, None]) & (top_k[:, None] > 0)
    if top_p is not None:
        probabilities = ranked.masked_fill(drop, -math.inf).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities
        # The likeliest token has nothing before it, and top_p is above 0: it always stays.
        drop |= (before >= top_p[:, None]) & (top_p[:, None] < 1)
    return scaled.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """The first `count` numbers, float64 in [0, 1), of row `row` in the group seeded with `seed`.

    Philox, keyed by both: the same on every platform, and a longer table begins with the shorter one.
    """
    raw = np.random.Philox(key=np.array([seed, row], dtype=np.uint64)).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def draw(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Token ids int64 [R], drawn from `logprobs` [R, V] by inversion at `uniform` float64 [R] in [0, 1).

    A token of probability 0 is never drawn, whatever the rounding. Of NaN it draws something, whose log-prob is NaN.
    """
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Below the total even when u rounds up to it: the first sum above the target belongs to a token with p > 0.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logprobs.shape[-1] - 1)


@dataclass(slots=True)
class RowSampler:
    """The sampling parameters of `R` rows as tensors, and how far each has got."""

    uses: np.ndarray
    """bool [R, 5]: whether a row has a top-k, a top-p, a shortest length, is greedy, is drawn. A step skips what no row
    uses; asking the device for it would wait."""
    temperature: torch.Tensor
    """float32 [R]."""
    top_k: torch.Tensor
    """int64 [R]."""
    top_p: torch.Tensor
    """float32 [R]."""
    min_new: torch.Tensor
    """int64 [R]: no end of sequence among a row's first so many tokens."""
    greedy: torch.Tensor
    """bool [R]."""
    uniforms: torch.Tensor
    """float64 [R, T]."""
    age: torch.Tensor
    """int64 [R], tokens sampled so far."""
    _used: list[bool] = field(init=False)
    """Of each column of `uses`, whether any row does."""

    def __post_init__(self) -> None:
        self._used = [bool(column.any()) for column in self.uses.T]

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams, int, bool] | None], device: torch.device) -> RowSampler:
        """For rows given as (parameters, place within the group, greedy); None is a row whose tokens nobody reads."""
        params = [SamplingParams(max_new_tokens=1) if row is None else row[0] for row in rows]
        table = np.zeros((len(rows), max(p.max_new_tokens for p in params)))
        for i, row in enumerate(rows):
            if row is not None and not row[2]:
                table[i, : row[0].max_new_tokens] = uniforms(row[0].seed, row[1], row[0].max_new_tokens)
        return cls(
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            min_new=torch.tensor([p.min_new_tokens or 0 for p in params], device=device),
            greedy=torch.tensor([row is not None and row[2] for row in rows], device=device),
            uniforms=torch.from_numpy(table).to(device),
            age=torch.zeros(len(rows), dtype=torch.int64, device=device),
            uses=np.array([_uses(p, row is not None and row[2]) for p, row in zip(params, rows, strict=True)]),
        )

    def sample(
        self, logits: torch.Tensor, forbidden: torch.Tensor, eos: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of every row and its log-prob under what it was drawn from: int64 [R], float32 [R].

        Args:
            logits: [R, V], of any float dtype.
            forbidden: int64, the tokens that no row may emit.
            eos: int64, the tokens that end a row.
        """
        logits = logits.float().index_fill(-1, forbidden, -math.inf)
        has_top_k, has_top_p, has_min_new, has_greedy, has_drawn = self._used
        if has_min_new:
            early = (self.age < self.min_new)[:, None]
            logits[:, eos] = logits[:, eos].masked_fill(early, -math.inf)
        logprobs = behaviour_logprobs(
            logits,
            self.temperature,
            top_k=self.top_k if has_top_k else None,
            top_p=self.top_p if has_top_p else None,
        )
        # Of the logits, not the log-probs: a temperature or a normaliser can round two of them to one value.
        tokens = logits.argmax(dim=-1) if has_greedy else None
        if tokens is None or has_drawn:
            at = self.age.clamp(max=self.uniforms.shape[1] - 1)[:, None]
            drawn = draw(logprobs, self.uniforms.gather(1, at).squeeze(1))
            tokens = drawn if tokens is None else torch.where(self.greedy, tokens, drawn)
        self.age += 1
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)

    def select(self, rows: Sequence[int]) -> RowSampler:
        """The sampler of `rows`, in that order."""
        index = torch.tensor(rows).to(self.age.device, non_blocking=True)
        return RowSampler(self.uses[list(rows)], *(value[index] for value in self._tensors()))

    def join(self, other: RowSampler) -> RowSampler:
        """The sampler of these rows, then `other`'s."""
        width = max(self.uniforms.shape[1], other.uniforms.shape[1])
        for sampler in (self, other):
            sampler.uniforms = torch.nn.functional.pad(sampler.uniforms, (0, width - sampler.uniforms.shape[1]))
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        uses = np.concatenate([self.uses, other.uses])
        return RowSampler(uses, *(torch.cat(pair) for pair in pairs))

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.temperature, self.top_k, self.top_p, self.min_new, self.greedy, self.uniforms, self.age


def _uses(sampling: SamplingParams, greedy: bool) -> tuple[bool, ...]:
    """A row of `RowSampler.uses`."""
    return sampling.top_k > 0, sampling.top_p < 1, bool(sampling.min_new_tokens), greedy, not greedy
