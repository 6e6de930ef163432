"""`learner.blind_check`: when a run looks whether its policy looks at its pictures, and what it does if not."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmrl_ray.config.sections import Section

EVERY = 30
"""Steps, where nothing is written and there are held-out captions."""


class BlindCheckSection(Section):
    """The blindness alarm: on held-out captions, what a sample's own picture is worth beside another's."""

    every: int | None = Field(None, ge=0)
    """Steps from one look to the next, each of which is a checkpoint; 0: never. By default 30 where there is
    `data.eval`. A run also looks before and after it learns."""
    samples: int = Field(32, ge=2)
    """Of `data.eval` that are looked at, the same ones each time."""
    on_blind: Literal["warn", "stop"] = "warn"
    """What an alarm does: tell it (terminal, event `blind`, report), or also end the run with an error, its checkpoints
    kept."""
    looks: int = Field(2, ge=1)
    """So many looks running have to find it blind."""
    min_gap: float = Field(0.01, ge=0)
    """Nats a token that a caption must be likelier with its own picture than with another's: blind where the 95 %
    interval of that gap does not lie above this."""
    keep: float = Field(0.25, ge=0, lt=1)
    """The share of the first look's gaps (of references, beside another's picture and beside their own upside down)
    that must be left: blind where the interval of what is left lies below it; 0 compares with no earlier look."""

    def cadence(self, *, is_held_out: bool) -> int:
        """`every`, or what it is by default; 0: never."""
        if self.every is None:
            return EVERY if is_held_out else 0
        return self.every

    def problems(self, *, is_held_out: bool, has_workers: bool) -> dict[str, bool]:
        """What does not fit a run: with whether it has `data.eval`, and rollout workers."""
        written = [
            *([f"every={self.every}"] if self.every else []),
            *(["on_blind=stop"] if self.on_blind == "stop" else []),
        ]
        asked = f"learner.blind_check.{' and '.join(written)}"
        return {
            f"{asked}: looks at held-out captions, and there are none: write data.eval": (
                bool(written) and not is_held_out
            ),
            f"{asked}: asks rollout workers for captions, and this algorithm has none: take it away": (
                bool(written) and not has_workers
            ),
            "learner.blind_check.on_blind=stop and every=0, which never looks: write another every": (
                self.on_blind == "stop" and self.every == 0
            ),
        }
