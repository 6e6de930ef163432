"""What a user writes: strict pydantic. Imports neither torch nor ray.

`Config` is imported when it is asked for: algorithms declare their own sections on top of `config.base`, and `Config`
is made of those.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrl_ray.config.schema import Config

__all__ = ["Config"]


def __getattr__(name: str) -> Any:
    if name == "Config":
        from mmrl_ray.config.schema import Config

        return Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
