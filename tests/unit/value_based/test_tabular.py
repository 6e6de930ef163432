"""Q-learning on tables finds the optimal values of small decision processes; value iteration is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mmrl_ray.algorithms.dqn.exploration import boltzmann_probabilities, epsilon_greedy
from mmrl_ray.losses.td import q_learning_target, q_learning_update


@dataclass(frozen=True)
class Process:
    """A finite Markov decision process."""

    moves: np.ndarray
    """[S, A, S], probabilities."""
    rewards: np.ndarray
    """[S, A]."""
    terminal: np.ndarray
    """bool [S]."""
    gamma: float

    def optimal_values(self) -> np.ndarray:
        """Q* [S, A] by value iteration; 0 in terminal states."""
        q = np.zeros_like(self.rewards)
        for _ in range(2000):
            value = np.where(self.terminal, 0.0, q.max(axis=1))
            q = np.where(self.terminal[:, None], 0.0, self.rewards + self.gamma * self.moves @ value)
        return q


def chain() -> Process:
    """Five states in a row: right leads to 1 at the far end, left to a crumb of 0.2 at the near one."""
    moves, rewards = np.zeros((5, 2, 5)), np.zeros((5, 2))
    for s in range(1, 4):
        moves[s, 0, s - 1 if s > 1 else 0] = moves[s, 1, s + 1] = 1
    moves[0, 0, 4], moves[0, 1, 1] = 1, 1
    moves[4, :, 4] = 1
    rewards[0, 0], rewards[3, 1] = 0.2, 1.0
    return Process(moves, rewards, np.arange(5) == 4, 0.9)


def cliff() -> Process:
    """A 3 by 4 grid, four directions, -0.1 a move; the bottom row between start and goal is a cliff: -1 and the end."""
    moves, rewards = np.zeros((12, 4, 12)), np.full((12, 4), -0.1)
    terminal = np.isin(np.arange(12), (9, 10, 11))
    order = [8, *range(8), 9, 10, 11]  # the start, bottom left, is state 0
    for s, cell in enumerate(order):
        for a, (down, right) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            row, column = min(max(cell // 4 + down, 0), 2), min(max(cell % 4 + right, 0), 3)
            arrived = order.index(row * 4 + column)
            moves[s, a, arrived] = 1
            rewards[s, a] += {9: -1.0, 10: -1.0, 11: 1.0}.get(order[arrived], 0.0)
    return Process(moves, rewards, terminal, 0.95)


def slippery() -> Process:
    """Three states without an end; every move goes astray one time in five."""
    moves, rewards = np.zeros((3, 2, 3)), np.array([[0.1, 0.0], [0.0, 0.3], [0.5, 0.0]])
    for s in range(3):
        for a, goal in enumerate(((s + 1) % 3, (s + 2) % 3)):
            moves[s, a] = 0.1
            moves[s, a, goal] = 0.8
    return Process(moves, rewards, np.zeros(3, dtype=bool), 0.6)


Choose = Callable[[torch.Tensor], torch.Tensor]


def learn(
    process: Process, choose: Choose, *, steps: int, learners: int, step_size: Callable[[int], float]
) -> np.ndarray:
    """Tables [learners, S, A] of as many agents, each walking by itself with its own table."""
    rng = np.random.default_rng(0)
    states, actions = process.rewards.shape
    table = torch.zeros(learners, states, actions, dtype=torch.float64)
    starts = np.flatnonzero(~process.terminal)
    each, state = np.arange(learners), rng.choice(starts, learners)
    ending = np.cumsum(process.moves, axis=2)
    for step in range(steps):
        action = choose(table[each, state]).numpy()
        draws = rng.uniform(size=(learners, 1))
        arrived = np.minimum((ending[state, action] < draws).sum(axis=1), states - 1)
        over = process.terminal[arrived]
        target = q_learning_target(
            torch.from_numpy(process.rewards[state, action]),
            table[each, arrived],
            torch.from_numpy(over),
            process.gamma,
        )
        table[each, state, action] = q_learning_update(table[each, state, action], target, step_size(step))
        state = np.where(over | (rng.uniform(size=learners) < 0.1), rng.choice(starts, learners), arrived)
    return table.numpy()


def by_epsilon_greedy() -> Choose:
    draws = torch.Generator().manual_seed(1)
    return lambda q: epsilon_greedy(q, 0.4, draws)


def by_boltzmann() -> Choose:
    draws = torch.Generator().manual_seed(1)
    return lambda q: torch.multinomial(boltzmann_probabilities(q, 1.0), 1, generator=draws)[:, 0]


@pytest.mark.parametrize("explore", [by_epsilon_greedy, by_boltzmann])
@pytest.mark.parametrize("process", [chain, cliff, slippery])
def test_q_learning_finds_the_optimal_values(process: Callable[[], Process], explore: Callable[[], Choose]) -> None:
    made = process()
    moving = process is slippery
    table = learn(
        made,
        explore(),
        steps=4000 if process is cliff else 3000,
        learners=16,
        # Where nothing is left to chance a large step does; otherwise it must shrink.
        step_size=(lambda t: 40 / (80 + t)) if moving else (lambda t: 0.5),
    )
    expected = made.optimal_values()
    error = np.abs(table - expected)
    if moving:
        error = np.abs(table.mean(axis=0) - expected)  # of one table the noise of its own walk is left
    assert error.max() < 1e-2
