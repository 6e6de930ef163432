"""Buffers of keys and values, against lists of rows kept in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmrl_ray.policy.generation.kv_cache import KVLayer, fill_holes

HEADS, WIDTH = 2, 3


@pytest.fixture(autouse=True)
def memory_as_found_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *shape: t.new_full(shape, float("nan")))


def numbers(rows: int, keys: int, start: float = 0.0) -> torch.Tensor:
    return (start + torch.arange(rows * HEADS * keys * WIDTH, dtype=torch.float32)).view(rows, HEADS, keys, WIDTH) + 1


class Model:
    """What a layer should hold: each row's own keys, oldest first; shorter rows have anything before theirs."""

    def __init__(self, layer: KVLayer) -> None:
        self.layer = layer
        self.rows = [layer.keys[i].clone() for i in range(layer.keys.shape[0])]

    def check(self) -> None:
        for held, sign in ((self.layer.keys, 1), (self.layer.values, -1)):
            assert held.shape[0] == len(self.rows)
            assert bool(torch.isfinite(held).all())
            for i, row in enumerate(self.rows):
                assert torch.equal(sign * held[i, :, held.shape[2] - row.shape[1] :], row)


def layer_of(rows: int, keys: int, room: int, start: float = 0.0) -> KVLayer:
    made = numbers(rows, keys, start)
    return KVLayer(made, -made, room)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    kinds = st.sampled_from(["step", "join", "drop", "gather"])
    number = st.integers(1, 5)
    return draw(st.lists(st.tuples(kinds, number, number, st.integers(0, 2**16)), max_size=12))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories(), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9))
def test_whatever_comes_and_goes_each_row_keeps_its_own_keys(
    history: list[tuple[str, int, int, int]], rows: int, keys: int, room: int, most_rows: int
) -> None:
    model = Model(layer_of(rows, keys, room))
    layer = model.layer
    for i, (kind, count, length, seed) in enumerate(history):
        chosen = [b for b in range(len(model.rows)) if seed >> b & 1] or [0]
        if kind == "step":
            new = numbers(len(model.rows), 1, 1000.0 * i)
            layer.update(new, -new)
            model.rows = [torch.cat([row, new[b]], dim=1) for b, row in enumerate(model.rows)]
        elif kind == "join":
            other = Model(layer_of(count, length, 1, 1000.0 * i))
            layer.join(other.layer, most_rows=most_rows)
            model.rows += other.rows
        else:
            longest = max(model.rows[b].shape[1] for b in chosen)
            order = fill_holes(chosen)
            if kind == "drop":
                layer.keep(order, longest)
            else:
                tail = torch.arange(layer.keys.shape[2] - longest, layer.keys.shape[2])
                layer.gather(torch.tensor(order), tail.expand(len(order), -1))
            model.rows = [model.rows[b] for b in order]
            assert layer.keys.shape[2] == longest
        model.check()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 20)))
def test_holes_are_filled_by_the_last_rows_and_nothing_is_written_over_too_early(kept: set[int]) -> None:
    order = fill_holes(sorted(kept))
    assert sorted(order) == sorted(kept)
    held = list(range(21))
    for place, row in enumerate(order):
        held[place] = held[row]
    assert set(held[: len(order)]) == kept
    assert sum(place != row for place, row in enumerate(order)) == sum(row >= len(kept) for row in kept)


def test_a_row_that_joins_copies_none_of_the_others() -> None:
    layer = layer_of(1, 4, 8)
    layer.join(layer_of(1, 4, 8), most_rows=8)
    buffer = layer.keys.data_ptr()
    layer.join(layer_of(1, 3, 8), most_rows=8)
    layer.keep(fill_holes([0, 2]), 4)
    assert layer.keys.data_ptr() == buffer


@pytest.mark.parametrize(("most_rows", "fit"), [(100, 6), (4, 4), (2, 3)])
def test_room_for_rows_is_made_ahead_but_for_no_more_than_may_come(most_rows: int, fit: int) -> None:
    layer = layer_of(2, 4, 8)
    layer.join(layer_of(1, 4, 8), most_rows=most_rows)
    assert layer._all_keys.shape[0] == fit


def test_rows_that_join_at_once_are_copied_once() -> None:
    """What a prompt's pass made is taken as it is: it is copied when it joins others, or when its own steps begin."""
    made = numbers(1, 5)
    layer = KVLayer(made, -made, 3)
    assert layer.keys.data_ptr() == made.data_ptr()
    host = layer_of(2, 5, 3)
    host.join(layer, most_rows=9)
    assert torch.equal(host.keys[2:], made)
    layer.update(numbers(1, 1), -numbers(1, 1))
    assert layer.keys.data_ptr() != made.data_ptr()
    assert torch.equal(layer.keys[:, :, :5], made)
