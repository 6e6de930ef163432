"""What each next token is worth: Q and V heads on a policy's hidden states, and decoding with log π + β(Q − V).

`M` tokens, `S` slots that are decoded, `d` hidden width, `V` vocabulary.

A head is a small network in float32, whatever the policy's dtype: d → width → V for the two Qs, d → width → 1 for V.
Values over the vocabulary are made for completion tokens only, in chunks; of the targets, which follow the learning
heads slowly, only the token that was said. Their smaller one is what decoding trusts (Snell et al. 2022,
arXiv:2206.11871; Fujimoto et al. 2018, arXiv:1802.09477, for the two).

Nothing of a file is trusted: it is safetensors, and its shapes are held against the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmrl_ray.errors import AdapterError
from mmrl_ray.losses.ilql import TokenValues
from mmrl_ray.policy.logits import CHUNK_ELEMENTS, policy_logits

if TYPE_CHECKING:
    from mmrl_ray.policy.model import Policy
    from mmrl_ray.policy.scoring.collate import LearnerBatch
    from mmrl_ray.policy.scoring.prefix import Scores

HEADS_FILE = "value_heads.safetensors"
"""Beside an adapter's own files, which PEFT loads as if it were not there."""
_PREFIX = "value_heads."
_BETA = "beta"
_HEADS = 2


class ValueHeads(nn.Module):
    """What decoding needs: the two targets, as `q`, and V. Takes no gradient.

    Args:
        hidden: d.
        vocabulary: V.
        width: of the layer in between.
        beta: how much decoding makes of them where nobody says otherwise.
    """

    def __init__(self, hidden: int, vocabulary: int, width: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.vocabulary = vocabulary
        self.width = width
        self.q = nn.ModuleList(_head(hidden, width, vocabulary) for _ in range(_HEADS))
        self.v = _head(hidden, width, 1)
        self.requires_grad_(False)

    @torch.no_grad()
    def advantages(self, hidden: torch.Tensor) -> torch.Tensor:
        """Q − V of every next token, float32 [S, V], with the smaller of the two Qs; `hidden` is [S, d]."""
        hidden = hidden.float()
        q = torch.stack([head(hidden) for head in self.q]).amin(dim=0)
        return q - self.v(hidden)

    def decoding_state(self) -> dict[str, torch.Tensor]:
        """The tensors that `from_state` makes such heads of: float32 copies on the CPU."""
        state = self.state_dict()
        return {name: _copy(state[name]) for name in state if name.startswith(("q.", "v."))}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor], *, hidden: int, vocabulary: int, beta: float) -> ValueHeads:
        """Heads with the weights of `decoding_state`, or of the whole state of learning ones; for a model of that size.

        Raises:
            AdapterError: they do not fit the model, or a value is not finite.
        """
        weights = {name: tensor for name, tensor in state.items() if name.startswith(("q.", "v."))}
        first = weights.get("v.0.weight")
        if first is None or first.ndim != 2:
            raise AdapterError("the value heads lack the weight of their first layer; they were not written by a run")
        with torch.device("meta"):
            made = ValueHeads(hidden, vocabulary, first.shape[0], beta)
        _check(made, weights)
        made.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
        return made.requires_grad_(False)


class LearningHeads(ValueHeads):
    """With the two Qs that learn (`online`), which those of decoding follow. They and V take gradients.

    The same `seed` gives the same weights; every value is 0 at first.
    """

    def __init__(self, hidden: int, vocabulary: int, width: int, beta: float, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(hidden, vocabulary, width, beta)
            self.online = nn.ModuleList(_head(hidden, width, vocabulary) for _ in range(_HEADS))
        for head in (*self.q, *self.online, self.v):
            last = head[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.q.load_state_dict(self.online.state_dict())
        for parameter in self.learnt():
            parameter.requires_grad_(True)

    def learnt(self) -> list[nn.Parameter]:
        """The parameters that an optimiser moves, in a fixed order."""
        return [*self.online.parameters(), *self.v.parameters()]

    def values(self, hidden: torch.Tensor, tokens: torch.Tensor, forbidden: Sequence[int]) -> TokenValues:
        """What the heads say of `tokens` int64 [M], each chosen from the state `hidden` [M, d].

        The fields are [2, M] and [M]: what `ilql_loss` takes, before it is put into rows. `forbidden` tokens are
        outside the conservative term.
        """
        hidden = hidden.float()
        size = max(1, CHUNK_ELEMENTS // self.vocabulary)
        taken, conservative = [], []
        for head in self.online:
            parts = []
            for start in range(0, len(tokens), size):
                chunk = (head, hidden[start : start + size], tokens[start : start + size], forbidden)
                if len(tokens) > size and torch.is_grad_enabled():
                    parts.append(checkpoint(_taken, *chunk, use_reentrant=False))
                else:
                    parts.append(_taken(*chunk))
            taken.append(torch.cat([q for q, _ in parts]))
            conservative.append(torch.cat([term for _, term in parts]))
        with torch.no_grad():
            target = torch.stack([_only(head, hidden, tokens) for head in self.q])
        return TokenValues(torch.stack(taken), torch.stack(conservative), target, self.v(hidden)[:, 0])

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Moves the targets towards what has been learnt: Q̂ ← Q̂ + rate·(Q − Q̂)."""
        for target, online in zip(self.q.parameters(), self.online.parameters(), strict=True):
            target.lerp_(online, rate)

    def load_whole(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a checkpoint, in place: optimisers keep their parameters.

        Raises:
            AdapterError: the weights are not those of such heads.
        """
        _check(self, state)
        self.load_state_dict(dict(state))


def learning_heads(policy: Policy) -> LearningHeads:
    """The heads of a policy that learns values.

    Raises:
        ValueError: it has none that learn.
    """
    heads = policy.value_heads.get(None)
    if not isinstance(heads, LearningHeads):
        raise ValueError(f"{policy.path} has no value heads that learn")
    return heads


def values_of(heads: LearningHeads, policy: Policy, batch: LearnerBatch, scores: Scores) -> TokenValues:
    """Values of a micro-batch's tokens, [2, N, T] and [N, T]; 0 where nothing stands."""
    assert scores.hidden is not None
    tokens = policy.place(torch.cat([tokens for group in batch.completions for tokens in group]))
    flat = heads.values(scores.hidden, tokens, policy.image_token_ids)

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros((*values.shape[:-1], *scores.mask.shape)).masked_scatter(scores.mask, values)

    return TokenValues(rows(flat.q), rows(flat.conservative), rows(flat.target_q), rows(flat.v))


def add_learning_heads(policy: Policy, *, beta: float, width: int | None, seed: int) -> LearningHeads:
    """Puts fresh heads on the policy.

    Args:
        policy: without any.
        beta: how much decoding makes of them.
        width: of the layer in between; twice the model's hidden width by default.
        seed: of their weights.
    """
    width = width or 2 * policy.hidden_size
    heads = LearningHeads(policy.hidden_size, policy.vocab_size, width, beta, seed).to(policy.device)
    policy.value_heads[None] = heads
    return heads


def published(heads: ValueHeads) -> dict[str, torch.Tensor]:
    """What decoding needs, under names that can travel beside an adapter's weights; `split_heads` tells them apart."""
    return {f"{_PREFIX}{name}": tensor for name, tensor in heads.decoding_state().items()}


def split_heads(
    weights: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An adapter's weights, and those of value heads, of which there may be none."""
    adapter = {name: tensor for name, tensor in weights.items() if not name.startswith(_PREFIX)}
    return adapter, {name.removeprefix(_PREFIX): weights[name] for name in weights.keys() - adapter.keys()}


def decoding_heads(policy: Policy, state: Mapping[str, torch.Tensor], beta: float = 0.0) -> ValueHeads:
    """Heads with those weights, on the policy's device.

    Raises:
        AdapterError: they do not fit the model.
    """
    made = ValueHeads.from_state(state, hidden=policy.hidden_size, vocabulary=policy.vocab_size, beta=beta)
    return made.to(policy.device)


def add_decoding_heads(policy: Policy, folder: Path, adapter: str | None = None) -> None:
    """Puts the heads in an adapter's folder on the policy, for decoding; nothing where the folder has none.

    Raises:
        AdapterError: of `read_heads_state`, or they do not fit the model.
    """
    if (found := read_heads_state(folder)) is not None:
        policy.value_heads[adapter] = decoding_heads(policy, *found)


def save_value_heads(heads: ValueHeads, folder: Path, *, whole: bool) -> None:
    """Writes `HEADS_FILE`: what decoding needs, or with `whole` what learning goes on from.

    Raises:
        OSError, SafetensorError: of the file system.
    """
    state = {name: _copy(t) for name, t in heads.state_dict().items()} if whole else heads.decoding_state()
    # One entry and no more: several come in any order, and the file would not be a function of the heads.
    save_file(state, str(folder / HEADS_FILE), metadata={_BETA: repr(heads.beta)})


def read_heads_state(folder: Path) -> tuple[dict[str, torch.Tensor], float] | None:
    """Tensors and β of the heads in an adapter's folder; None where there are none.

    Raises:
        AdapterError: the file is a link, is broken, or says no β.
    """
    file = folder / HEADS_FILE
    if file.is_symlink():
        raise AdapterError(f"{file} is a symbolic link; an adapter's files must lie in its own folder")
    if not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="pt") as opened:
            # Copies: whoever overwrites a mapped file takes the process down that looks at it.
            state = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - no mapping
            beta = float((opened.metadata() or {}).get(_BETA, "nan"))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is broken: {error}; take another checkpoint") from error
    if not (math.isfinite(beta) and beta >= 0):
        raise AdapterError(f"{file} says beta={beta}, which is no weight of values; it was not written by a run")
    return state, beta


def _head(hidden: int, width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden, width, dtype=torch.float32), nn.ReLU(), nn.Linear(width, out, dtype=torch.float32)
    )


def _taken(
    head: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor, forbidden: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q of the tokens, and −log softmax(Q) of them, [m]."""
    q = policy_logits(head(hidden), forbidden, 1.0)
    taken = q.gather(-1, tokens[:, None])[:, 0]
    return taken, q.logsumexp(dim=-1) - taken


def _only(head: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Q of the tokens without that of all others, [M]."""
    first, between, last = head.children()
    assert isinstance(last, nn.Linear)
    return (between(first(hidden)) * last.weight[tokens]).sum(dim=-1) + last.bias[tokens]


def _check(heads: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    live = heads.state_dict()
    if live.keys() != state.keys():
        odd = sorted(live.keys() ^ state.keys())
        raise AdapterError(f"the value heads do not fit: {odd[0]} and {len(odd) - 1} others are missing or unknown")
    for name, tensor in state.items():
        if tensor.shape != live[name].shape:
            raise AdapterError(
                f"value heads: {name} has shape {list(tensor.shape)}, this model needs {list(live[name].shape)}; "
                "they were made for another model"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"value heads: {name} holds NaN or infinity, or no numbers; take an earlier version")


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
