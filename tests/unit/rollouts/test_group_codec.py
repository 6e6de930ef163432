"""The one form of a group: what is sent is what arrives, what is stored comes back, and the log says the same."""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.experience.carriers import (
    CaptionState,
    EncodedPrompt,
    GroupKey,
    RewardFailure,
    RolloutGroup,
    SamplingParams,
    ScoredGroup,
    VisionFeatures,
)
from mmrl_ray.experience.schema import decode_records
from mmrl_ray.rollouts.group_codec import (
    PARCEL_BYTES,
    Parcel,
    Parcelled,
    decode_checkpoint,
    encode_checkpoint,
    open_payload,
    pack,
)
from tests.unit.experience.factories import group_table, rollout_group, scored


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))  # type: ignore[arg-type]
    return one == other


def whole(reference: bool, greedy: bool) -> RolloutGroup:
    wide = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    return replace(
        rollout_group((2, 3), reference=reference, greedy=greedy),
        prompt=EncodedPrompt(
            torch.arange(5), {"grid": torch.tensor([[1, 2, 2]]), "pixel_values": torch.ones(1, 3)}, "k"
        ),
        sampling=SamplingParams(temperature=0.7, stop=("\n",), seed=2**62 + 1),
        vision=VisionFeatures(wide[:, ::2], (wide[1:3], wide[:1])),
    )


def several(reference: bool = True, greedy: bool = True) -> list[ScoredGroup]:
    """Scored groups of every kind, each with its `RolloutGroup`."""
    some = scored(2, 2)
    failed = replace(some, rewards=(some.rewards[0], RewardFailure("it hung")), greedy_reward=RewardFailure("too"))
    missing = replace(some.rewards[0], missing={"c": "no number"})
    return [
        replace(
            scored(2, 0, attempt=1, kl1=(0.1, 0.2), greedy_reward=0.3 if greedy else None),
            payload=whole(reference, greedy),
        ),
        replace(scored(2, 1, masked="no references"), payload=rollout_group((4, 1))),
        replace(failed, key=GroupKey(2, 2), payload=whole(reference, greedy)),
        replace(some, key=GroupKey(2, 3), rewards=(missing, missing), payload=whole(reference, greedy)),
    ]


def sent(value: Any) -> Any:
    """As a process at the other end has it: buffers beside the pickle, read-only."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(pickled, buffers=[bytes(buffer.raw()) for buffer in buffers])


def arrived(group: RolloutGroup) -> RolloutGroup:
    parcels, (packed,) = pack("r", [replace(scored(), payload=group)])
    return open_payload(replace(packed.payload, parcel=sent(parcels[0])), lambda value: value)


# -- travelling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_what_is_sent_is_what_arrives(reference: bool, greedy: bool) -> None:
    groups = several(reference, greedy)
    parcels, packed = pack("r", groups)
    assert [replace(group, payload=None) for group in packed] == [replace(group, payload=None) for group in groups]
    for group, original in zip(packed, groups, strict=True):
        found = open_payload(group.payload, lambda number: sent(parcels[number]))
        assert same(asdict(found), asdict(original.payload))
    state = CaptionState(torch.ones(2), {"image": torch.zeros(2), "text": torch.ones(2)}, torch.full((2,), 0.1))
    assert same(asdict(arrived(replace(rollout_group(), state=state))), asdict(replace(rollout_group(), state=state)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (300, 64)])
def test_a_tensor_arrives_as_it_was_and_may_be_written(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    view = tensor.T[:, :2] if tensor.dim() == 2 else tensor.clone()
    vision = arrived(replace(rollout_group(), vision=VisionFeatures(tensor, (view,)))).vision
    assert vision is not None
    for found, was in ((vision.tokens, tensor), (vision.deepstack[0], view)):
        assert (found.dtype, found.shape, found.tolist()) == (was.dtype, was.shape, was.tolist())
        found.zero_()


def test_small_groups_share_a_parcel_up_to_its_size_and_a_large_one_has_its_own() -> None:
    quarter, large = PARCEL_BYTES // 4 + 1, 2 * PARCEL_BYTES
    groups = [
        replace(
            scored(0, index),
            payload=replace(rollout_group(), vision=VisionFeatures(torch.arange(n // 4, dtype=torch.int32))),
        )
        for index, n in enumerate((1000, quarter, quarter, quarter, quarter, large, 1000))
    ]
    parcels, packed = pack("r", groups)
    places = [group.payload for group in packed]
    assert [(place.parcel, place.place) for place in places] == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0),
    ]  # fmt: skip
    for place, was in zip(places, groups, strict=True):
        found = open_payload(place, parcels.__getitem__)
        assert found.vision is not None
        assert torch.equal(found.vision.tokens, was.payload.vision.tokens)
        assert found.sample == was.payload.sample


def test_a_view_does_not_drag_its_storage_along() -> None:
    group = replace(rollout_group(), vision=VisionFeatures(torch.zeros(1_000_000)[:1500]))
    (parcel,), (packed,) = pack("r", [replace(scored(), payload=group)])
    assert len(pickle.dumps(parcel)) < 30_000
    stored = replace(packed, payload=Parcelled(parcel, 0))
    assert len(encode_checkpoint("r", 0, {}, [stored], lambda value: value)["buffer.arrow"]) < 30_000


def test_what_is_no_parcel_is_fetched_as_it_is() -> None:
    assert open_payload("reference", {"reference": "the group"}.get) == "the group"


def test_facts_of_a_sample_that_json_has_no_form_for_go_as_text() -> None:
    sample = replace(rollout_group().sample, metadata={"taken": date(2024, 5, 1), "at": {"lat": 1.5}})
    found = arrived(replace(rollout_group(), sample=sample)).sample
    assert found.metadata == {"taken": "2024-05-01", "at": {"lat": 1.5}}


def test_the_log_says_what_the_group_says() -> None:
    groups = several()
    (parcel,), _ = pack("my-run", groups)
    rows = decode_records(parcel.rows).to_pylist()
    assert rows == [row for g in groups for row in group_table("my-run", g, g.payload).to_pylist()]


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_parcels", [False, True])
def test_a_checkpoint_gives_back_what_was_in_the_buffer(in_parcels: bool) -> None:
    groups, store = several(), dict[str, Parcel]()
    buffered = groups
    if in_parcels:
        parcels, packed = pack("r", groups)
        store = {f"ref-{i}": sent(parcel) for i, parcel in enumerate(parcels)}
        buffered = [replace(g, payload=replace(g.payload, parcel=f"ref-{g.payload.parcel}")) for g in packed]
    state = encode_checkpoint("r", 3, {"position": 7}, buffered, lambda v: store[v] if isinstance(v, str) else v)
    step, stream, decoded = decode_checkpoint("r", state)
    assert (step, stream) == (3, {"position": 7})
    assert [s for s, _ in decoded] == [replace(group, payload=None) for group in groups]
    for (_, parcel), original in zip(decoded, groups, strict=True):
        assert same(asdict(open_payload(Parcelled(parcel, 0), lambda v: v)), asdict(original.payload))
        logged = group_table("r", original, original.payload)
        assert decode_records(parcel.rows).to_pylist() == logged.to_pylist()


def test_nothing_is_something_too() -> None:
    assert decode_checkpoint("r", encode_checkpoint("r", 1, {}, [], lambda value: value)) == (1, {}, [])


def test_a_checkpoint_in_the_first_format_is_read() -> None:
    """Its groups are those of `several`, stored by a version that had no rows beside them."""
    stored = (Path(__file__).parent / "buffer_format_1.arrow").read_bytes()
    state = {"format": 1, "next_step": 3, "stream": {"position": 7}, "buffer.arrow": stored}
    step, stream, decoded = decode_checkpoint("r", state)
    assert (step, stream) == (3, {"position": 7})
    assert [s for s, _ in decoded] == [replace(group, payload=None) for group in several()]
    for (_, parcel), original in zip(decoded, several(), strict=True):
        found = open_payload(Parcelled(parcel, 0), lambda value: value)
        images = found.sample.images  # as Pillow wrote them then
        expected = replace(original.payload, sample=replace(original.payload.sample, images=images))
        assert same(asdict(found), asdict(expected))
        assert decode_records(parcel.rows).to_pylist() == group_table("r", original, expected).to_pylist()
