"""Distributed RLHF-style fine-tuning of multimodal models on Ray."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrl_ray.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]
_HOMES = {"Client": "mmrl_ray.client"}
"""Of what only some programs need: imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    """Imports a name of `_HOMES` when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
