"""Distributed RLHF-style fine-tuning of multimodal models on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrl_ray.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports what only some programs need when it is first asked for."""
    if name == "Client":
        from mmrl_ray.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
