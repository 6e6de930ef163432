"""Former home of the fusions, which are in `mmrl_ray.reward_model` now; the old import path stays."""
