"""Whether numbers differ at all. Plain arithmetic, for floats and for arrays of NumPy and PyTorch alike; no torch.

Rewards come as float32 of a network or as float64 sums in some order, and two that mean the same may differ in their
last bits. Divided by their standard deviation, such noise becomes an advantage of 1. So a difference counts only above
what float32 can tell apart at the magnitude of the numbers themselves: 100 and the next float32 are the same, 1e-9 and
2e-9 are not. Every test of "all equal" and every division by a standard deviation asks here.
"""

from __future__ import annotations

from typing import Any

RELATIVE = 4 * 2.0**-23
"""Four steps of float32 at 1."""


def resolution(magnitude: Any) -> Any:
    """Differences up to this are none, between numbers of at most `magnitude`, or made from some of at most that.

    A float gives a float, an array an array of its shape.
    """
    return RELATIVE * magnitude
