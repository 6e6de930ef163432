"""What a user writes: strict pydantic. Imports neither torch nor ray."""

from mmrl_ray.config.schema import Config

__all__ = ["Config"]
