from __future__ import annotations

import numpy as np
import pytest
import torch

from mmrl_ray.errors import RolloutError
from mmrl_ray.rollouts.weights import VersionTable, decode_state, encode_state


def state(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.arange(4.0).reshape(2, 2).t()}


def test_weights_come_back_bit_for_bit() -> None:
    encoded = encode_state(state(0.1))
    assert encoded.dtype == np.uint8
    decoded = decode_state(encoded)
    assert decoded.keys() == {"a", "b"}
    assert all(torch.equal(decoded[name], tensor) for name, tensor in state(0.1).items())


def test_versions_are_held_while_somebody_may_ask() -> None:
    table = VersionTable(lambda encoded: f"ref-{encoded[0]}")
    assert (table.newest, table.reference(0)) == (0, ())
    for version in (1, 2, 3):
        table.publish(version, np.array([version]))
    assert (table.newest, table.reference(2)) == (3, ("ref-2",))
    table.drop_before(3)
    with pytest.raises(RolloutError, match=r"version 2 is not held; there are \[0, 3\]"):
        table.reference(2)
    table.rewind(1)
    assert table.newest is None
    table.publish(1, np.array([9]))
    assert table.reference(1) == ("ref-9",)
    table.rewind(0)
    assert (table.newest, table.reference(0)) == (0, ())
