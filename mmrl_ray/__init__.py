"""Distributed RLHF-style fine-tuning of multimodal models on Ray."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrl_ray.api.inference import caption, evaluate
    from mmrl_ray.api.run import Run, load_run
    from mmrl_ray.api.training import train
    from mmrl_ray.client import Client
    from mmrl_ray.config import Config

__version__ = "0.1.0"
__all__ = ["Client", "Config", "Run", "__version__", "caption", "evaluate", "load_run", "train"]
_HOMES = {
    "Client": "mmrl_ray.client",
    "Config": "mmrl_ray.config",
    "Run": "mmrl_ray.api.run",
    "caption": "mmrl_ray.api.inference",
    "evaluate": "mmrl_ray.api.inference",
    "load_run": "mmrl_ray.api.run",
    "train": "mmrl_ray.api.training",
}
"""Of what only some programs need: imported when it is first asked for."""
_FORMER = {
    "mmrl_ray.config.model": "mmrl_ray.config.sections",
    "mmrl_ray.policy.decode": "mmrl_ray.policy.generation.decode",
    "mmrl_ray.policy.prefix": "mmrl_ray.policy.scoring.prefix",
}
"""Modules that scripts outside import from where they were in 0.1.0, and where they are."""


def __getattr__(name: str) -> Any:
    """Imports a name of `_HOMES` when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """With the names of `_HOMES`, for completion in notebooks."""
    return sorted({*globals(), *_HOMES})


class _FormerPlaces:
    """Finds the modules of `_FORMER`, each as one that holds what the module in the new place does."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Of Python's import system: whether it is one of them."""
        return ModuleSpec(name, _FormerPlaces()) if name in _FORMER else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """An empty one, as Python makes it."""

    def exec_module(self, module: ModuleType) -> None:
        """Fills it."""
        here = import_module(_FORMER[module.__name__])
        vars(module).update({name: value for name, value in vars(here).items() if not name.startswith("__")})


sys.meta_path.append(_FormerPlaces)
