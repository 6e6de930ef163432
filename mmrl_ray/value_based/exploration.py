"""`mmrl_ray.algorithms.dqn.exploration` under its published name."""

from mmrl_ray.algorithms.dqn.exploration import boltzmann_probabilities, epsilon_greedy, scheduled

__all__ = ["boltzmann_probabilities", "epsilon_greedy", "scheduled"]
