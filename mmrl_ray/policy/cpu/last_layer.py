"""A prompt's pass needs of the last layer its keys and values everywhere, and all else at the last position only.

Nothing reads what the last layer would make of the other positions: the completions attend to keys and values, and the
first token is predicted by the last position. Its MLP and the projections to queries and of what attention gives are
about 0.8 ÷ L of a prompt's products in a model with L layers, forward and backward. Attention itself goes on over all
positions, with queries of 0 for those that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from mmrl_ray.policy.model import Policy

_PER_POSITION = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
"""Submodules of a layer that make of each position something for this position alone."""


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
