"""A prompt's pass needs of the last layer its keys and values everywhere, but its MLP at the last position only.

Nothing reads what the MLP of the last layer would make of the other positions: the completions attend to keys and
values, and the first token is predicted by the last position. Of a model with L layers that is about 0.7 ÷ L of a
prompt's work, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.functional import pad

from mmrl_ray.policy.load import Policy


@contextmanager
def mlp_at_last_position(policy: Policy) -> Iterator[None]:
    """Within it, the MLP of the language model's last layer computes the last position and gives 0 for the others.

    Layers without a submodule called `mlp` are left as they are.
    """
    layers = getattr(policy.hf_model.get_decoder(), "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if not isinstance(mlp, nn.Module):
        yield
        return
    lengths: list[int] = []

    def keep_last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        lengths.append(hidden.shape[1])
        return (hidden[:, -1:], *rest)

    def pad_back(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        padding = (0, 0, lengths.pop() - 1, 0)
        if isinstance(output, tuple):  # a mixture of experts may give its router's logits, too
            return (pad(output[0], padding), *output[1:])
        return pad(output, padding)

    handles = [mlp.register_forward_pre_hook(keep_last), mlp.register_forward_hook(pad_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
