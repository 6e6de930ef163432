"""Keys and values of rows that come and go, in buffers with room on every side.

`B` batch rows, `K` keys, `H` heads, `d` head width.

    buffer   [rows that fit, H, keys that fit, d]
    in use    └ rows 0…B ┘      └ lo…hi ┘

A step writes its own keys at `hi` instead of copying all of them; a row that joins is written behind the others, with
its last key at `hi`; a row that leaves is overwritten by the last one; keys at the left that nobody sees any more are
left behind by moving `lo`. What is in use holds numbers everywhere, also where a mask hides them: zeros or what was
left over, never memory as it was found, which might be NaN.

A step that is recorded (`StaticStep`) is done again and again by a device that asks Python nothing: which keys there
are is data then, not shape. For as many steps as there is room for, attention goes over `W` keys, those in use and the
room behind them, and the mask says how many of them count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from mmrl_ray.policy.model import Captured

_WORTH_STEPS = 4
"""With fewer steps to come recording one costs more than it saves: it takes the time of about two."""


class KVLayer(DynamicLayer):
    """One layer's keys and values; `keys` and `values` are views [B, H, K, d] of what is in use."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        """Takes over `keys` and `values` [B, H, K, d], which are copied only once they need more place.

        `room` is for how many keys there is place at a time.
        """
        super().__init__()
        # What `lazy_initialization` does, without the two empty tensors that it makes.
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._room = room
        self._rows, self._lo, self._hi = keys.shape[0], 0, keys.shape[2]
        self._all_keys, self._all_values = keys, values
        self._place: torch.Tensor | None = None
        self._still: tuple[torch.Tensor, torch.Tensor] = (keys, values)
        self._look()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends one step's keys and values; returns all of them, or what `hold_still` says."""
        if self._place is not None:
            for held, new in zip(self._still, (key_states, value_states), strict=True):
                held.index_copy_(2, self._place, new.to(held.dtype))
            return self._still
        end = self._hi + key_states.shape[2]
        if end > self._all_keys.shape[2]:
            self._move(self.keys, self.values, rows=self._all_keys.shape[0])
            end = self._hi + key_states.shape[2]
        self._all_keys[: self._rows, :, self._hi : end] = key_states
        self._all_values[: self._rows, :, self._hi : end] = value_states
        self._hi = end
        self._look()
        return self.keys, self.values

    def room(self, keys: int) -> int:
        """For how many keys there is place behind those in use, after making it for at least `keys`."""
        if self._hi + keys > self._all_keys.shape[2]:
            self._room = max(self._room, keys)
            self._move(self.keys, self.values, rows=self._all_keys.shape[0])
        return self._all_keys.shape[2] - self._hi

    def hold_still(self, place: torch.Tensor, width: int) -> None:
        """From now on a step's keys and values go to `place`, int64 [Q], and `update` returns `width` of them: those in
        use, and behind them those of later steps, 0 until they come. `advance` says when they have."""
        end = self._lo + width
        for all_ in (self._all_keys, self._all_values):
            all_[: self._rows, :, self._hi : end] = 0
        self._place = place
        self._still = (
            self._all_keys[: self._rows, :, self._lo : end],
            self._all_values[: self._rows, :, self._lo : end],
        )

    def advance(self, keys: int) -> None:
        """So many keys were written by a step while the layer held still."""
        self._hi += keys
        self._look()

    def let_go(self) -> None:
        """A step's keys are appended again."""
        self._place, self._still = None, (self.keys, self.values)

    def join(self, other: KVLayer, *, most_rows: int) -> None:
        """Takes in the rows of `other`; K is the longer of the two then, and the shorter ones have it on their right.

        `most_rows`: for more than these there is never room made ahead of need.
        """
        rows, keys = self._rows + other._rows, max(self._hi - self._lo, other._hi - other._lo)
        if rows > self._all_keys.shape[0] or keys > self._hi:
            fit = self._all_keys.shape[0]
            grown = fit if rows <= fit else max(rows, min(2 * rows, most_rows))
            self._move(self.keys, self.values, rows=grown, width=keys)
        low, start = self._hi - keys, self._hi - (other._hi - other._lo)
        for all_, theirs in ((self._all_keys, other.keys), (self._all_values, other.values)):
            all_[: self._rows, :, low : self._lo] = 0
            all_[self._rows : rows, :, low:start] = 0
            all_[self._rows : rows, :, start : self._hi] = theirs
        self._rows, self._lo = rows, low
        self._look()

    def keep(self, rows: Sequence[int], keys: int) -> None:
        """Keeps the batch rows `rows` in that order, and of each the last `keys` keys; copies those rows that move.

        No row may be written over before it has moved itself: `fill_holes` gives such an order.
        """
        for place, row in enumerate(rows):
            if place != row:
                for t in (self._all_keys, self._all_values):
                    t[place, :, self._lo : self._hi] = t[row, :, self._lo : self._hi]
        self._rows, self._lo = len(rows), self._hi - keys
        self._look()

    def gather(self, rows: torch.Tensor, keys: torch.Tensor) -> None:
        """Keeps the batch rows `rows` int64 [B'] and, of each, the keys `keys` int64 [B', K']; copies everything."""
        index = keys[:, None, :, None]
        kept = [t[rows].gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in (self.keys, self.values)]
        self._move(kept[0], kept[1], rows=len(rows))

    def _move(self, keys: torch.Tensor, values: torch.Tensor, *, rows: int, width: int = 0) -> None:
        """Into new buffers for `rows` rows, `keys` at their right end where there is place for `width` of them."""
        used, count = keys.shape[2], keys.shape[0]
        self._rows, self._hi = count, max(used, width)
        self._lo = self._hi - used
        self._all_keys, self._all_values = (
            t.new_empty(rows, t.shape[1], self._hi + self._room, t.shape[3]) for t in (keys, values)
        )
        self._all_keys[:count, :, self._lo : self._hi] = keys
        self._all_values[:count, :, self._lo : self._hi] = values
        self._look()

    def _look(self) -> None:
        self.keys = self._all_keys[: self._rows, :, self._lo : self._hi]
        self.values = self._all_values[: self._rows, :, self._lo : self._hi]


class StaticStep:
    """Steps of a batch on tensors that stay in place: the first as it comes, then one recorded, then that one again.

    `B` batch rows, `Q` slots a batch row, `W` keys.
    """

    def __init__(
        self,
        layers: Sequence[KVLayer],
        visible: torch.Tensor,
        capture: Callable[[Callable[[], tuple[torch.Tensor, ...]]], Captured | None],
        *,
        steps: int,
        most_steps: int,
    ) -> None:
        """Makes room for the `steps` to come, but for no more than `most_steps` at a time.

        Args:
            layers: they hold still until `end`.
            visible: bool [B, Q, K], the keys in use that each slot sees.
            capture: see `Acceleration`.
            steps: that the longest row may still take.
            most_steps: see above.
        """
        rows, self._width, keys = visible.shape
        rooms = [layer.room(self._width * min(steps, most_steps)) for layer in layers]
        self.visible = pad(visible, (0, min(rooms)))
        """bool [B, Q, W]."""
        self._layers, self._capture = layers, capture
        self._steps, self._left = steps, min(rooms) // self._width
        device = visible.device
        self._own = torch.eye(self._width, dtype=torch.bool, device=device).expand(rows, -1, -1)
        self._place = torch.arange(keys, keys + self._width, device=device)
        for layer in layers:
            layer.hold_still(self._place, self.visible.shape[2])
        self._ran = False
        self._captured: Captured | None = None

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another step."""
        return self._left == 0

    def run(self, forward: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """What `forward` returns; good until the next step.

        It makes one step under the mask [B, Q, W], for tokens and positions that it knows, which it moves on. It is not
        kept: whose method it is could not go before the garbage collector came by, nor its keys and what was recorded.
        """
        # A first one goes by itself: libraries set themselves up in it, which cannot be recorded.
        if self._captured is None and self._ran and min(self._left, self._steps) >= _WORTH_STEPS:
            self._captured = self._capture(partial(self._compute, forward))
        if self._captured is None:
            made = self._compute(forward)
        else:
            self._captured.replay()
            made = self._captured.made
        self._ran = True
        self._steps, self._left = self._steps - 1, self._left - 1
        for layer in self._layers:
            layer.advance(self._width)
        return made

    def end(self) -> None:
        """The layers grow again; nothing recorded is used any more."""
        self._captured = None
        for layer in self._layers:
            layer.let_go()

    def _compute(self, forward: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        self.visible.index_copy_(2, self._place, self._own)
        made = forward(self.visible)
        self._place.add_(self._width)
        return made


def fill_holes(kept: Sequence[int]) -> list[int]:
    """The rows of `kept`, ascending, in an order that moves the fewest: the last ones fill the holes."""
    stay = [row for row in kept if row < len(kept)]
    late = iter([row for row in kept if row >= len(kept)])
    present = set(stay)
    return [place if place in present else next(late) for place in range(len(kept))]
