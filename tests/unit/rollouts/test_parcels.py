"""Groups in parcels: what is sent is what arrives, in few objects of bounded size."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmrl_ray.experience.carriers import RolloutGroup, VisionFeatures
from mmrl_ray.rollouts.parcels import PARCEL_BYTES, Parcel, open_payload, pack
from tests.unit.experience.factories import rollout_group


def group(nbytes: int) -> RolloutGroup:
    return replace(rollout_group(), vision=VisionFeatures(torch.arange(nbytes // 4, dtype=torch.int32)))


def sent(parcel: Parcel) -> Any:
    """As a process at the other end has it: buffers beside the pickle, read-only."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(parcel, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(pickled, buffers=[bytes(buffer.raw()) for buffer in buffers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (300, 64)])
def test_a_tensor_arrives_as_it_was_and_may_be_written(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    view = tensor.T[:, :2] if tensor.dim() == 2 else tensor.clone()
    parcels, (place,) = pack([replace(rollout_group(), vision=VisionFeatures(tensor, (view,)))])
    vision = open_payload(replace(place, parcel=sent(parcels[0])), lambda value: value).vision
    assert vision is not None
    for found, was in ((vision.tokens, tensor), (vision.deepstack[0], view)):
        assert (found.dtype, found.shape, found.tolist()) == (was.dtype, was.shape, was.tolist())
        found.zero_()


def test_small_groups_share_a_parcel_up_to_its_size_and_a_large_one_has_its_own() -> None:
    quarter, large = PARCEL_BYTES // 4 + 1, 2 * PARCEL_BYTES
    groups = [group(n) for n in (1000, quarter, quarter, quarter, quarter, large, 1000)]
    parcels, places = pack(groups)
    assert [(place.parcel, place.place) for place in places] == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0),
    ]  # fmt: skip
    for place, was in zip(places, groups, strict=True):
        found = open_payload(replace(place, parcel=parcels[place.parcel]), lambda value: value)
        assert found.vision is not None
        assert was.vision is not None
        assert torch.equal(found.vision.tokens, was.vision.tokens)
        assert found.sample == was.sample


def test_a_view_does_not_drag_its_storage_along() -> None:
    parcels, _ = pack([replace(rollout_group(), vision=VisionFeatures(torch.zeros(1_000_000)[:1500]))])
    ((pickled, buffers),) = parcels[0]
    assert len(pickled) + sum(buffer.raw().nbytes for buffer in buffers) < 10_000


def test_what_is_no_parcel_is_fetched_as_it_is() -> None:
    assert open_payload("reference", {"reference": "the group"}.get) == "the group"
