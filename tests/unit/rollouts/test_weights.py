from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load

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


def test_what_came_lies_in_one_buffer_and_is_safetensors() -> None:
    """One copy puts it where the device reads it; other programs read what travels."""
    sent = {**state(0.1), "half": torch.tensor([0.5, 2.0, 3.0], dtype=torch.bfloat16), "version": torch.tensor(4)}
    encoded = encode_state(sent)
    encoded.flags.writeable = False  # as out of the object store
    decoded = decode_state(encoded)
    assert len({tensor.untyped_storage().data_ptr() for tensor in decoded.values()}) == 1
    read = load(encoded.tobytes())
    assert read.keys() == decoded.keys() == sent.keys()
    for name, tensor in read.items():
        assert decoded[name].dtype == tensor.dtype
        assert torch.equal(decoded[name], tensor)


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
