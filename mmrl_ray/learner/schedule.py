"""The import path that `mmrl_ray.losses.schedule` had before."""

from mmrl_ray.losses.schedule import cosine_annealing, cosine_scheduler

__all__ = ["cosine_annealing", "cosine_scheduler"]
