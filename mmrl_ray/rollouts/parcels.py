"""Groups on their way from worker to learner: several small ones to one object of the store.

An object of Ray's store (a return value of more than 100 KB) costs about 1 ms of CPU, over the worker that makes it,
the node's raylet and the owner that frees it: measured with 128 and 256 KB alike. So the groups of one assignment
share an object up to `PARCEL_BYTES`; a larger group has one to itself, and a learner's rank on another node pulls
little that it has no use for. Each group is pickled by itself, so whoever wants one of a parcel reads that one.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mmrl_ray.experience.carriers import RolloutGroup

PARCEL_BYTES = 4 * 1024 * 1024
"""A parcel takes no further group that would make it larger."""
_BESIDE_BYTES = 4096
"""Tensors from this size on lie beside the pickle, which Ray copies into its store without another copy."""

PackedGroup = tuple[bytes, tuple[Any, ...]]
"""(pickle, buffers beside it)."""
Parcel = tuple[PackedGroup, ...]


@dataclass(frozen=True, slots=True)
class Parcelled:
    """Where one group lies: a `ScoredGroup.payload`."""

    parcel: Any
    """A `Parcel`, a reference to one, or before its return value has a reference, which of those it is."""
    place: int


@dataclass(slots=True)
class _Open:
    groups: list[PackedGroup] = field(default_factory=list)
    nbytes: int = 0


def pack(groups: Iterable[RolloutGroup]) -> tuple[list[Parcel], list[Parcelled]]:
    """(parcels, where each group lies: the number of its parcel, and its place in that)."""
    parcels: list[_Open] = []
    places = []
    for group in groups:
        packed = _pack_group(group)
        nbytes = len(packed[0]) + sum(buffer.raw().nbytes for buffer in packed[1])
        if not parcels or parcels[-1].nbytes + nbytes > PARCEL_BYTES:
            parcels.append(_Open())
        parcels[-1].groups.append(packed)
        parcels[-1].nbytes += nbytes
        places.append(Parcelled(len(parcels) - 1, len(parcels[-1].groups) - 1))
    return [tuple(parcel.groups) for parcel in parcels], places


def open_payload(payload: Any, fetch: Callable[[Any], Any]) -> RolloutGroup:
    """The group behind a payload; `fetch` turns a reference into the object, and leaves what is none as it is."""
    if not isinstance(payload, Parcelled):
        return fetch(payload)
    pickled, buffers = fetch(payload.parcel)[payload.place]
    return pickle.loads(pickled, buffers=buffers)  # noqa: S301 - from a worker of this run, through Ray, which does the same


class _Pickler(pickle.Pickler):
    """Tensors as their bytes alone: PyTorch's own pickle writes a file for each, with all of the storage behind it."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = flat.tobytes() if flat.nbytes < _BESIDE_BYTES else pickle.PickleBuffer(flat.data)
        return _tensor, (data, value.dtype, tuple(value.shape))


def _pack_group(group: RolloutGroup) -> PackedGroup:
    sink, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(sink, protocol=5, buffer_callback=buffers.append).dump(group)
    return sink.getvalue(), tuple(buffers)


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    # A copy: the store's memory is read-only, and goes when the reference goes.
    writable = bytearray(data)
    return torch.frombuffer(writable, dtype=dtype).reshape(shape) if writable else torch.empty(shape, dtype=dtype)
