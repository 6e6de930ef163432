"""RLlib's pieces as we set them up, in this process and without Ray: env runner, module, loss, state, replay buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.dqn.dqn import DQNConfig
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.replay_buffers import EpisodeReplayBuffer

from mmrl_ray.algorithms.dqn.agent import Agent, AgentFacts
from mmrl_ray.algorithms.dqn.network import FeatureScale, Vocabulary
from mmrl_ray.algorithms.dqn.rllib import (
    TemporalDifferenceLearner,
    dqn_config,
    environment_arguments,
    episodes_from_tensors,
    episodes_to_tensors,
)
from mmrl_ray.config import Config
from mmrl_ray.losses.schedule import cosine_annealing

from .conftest import WORDS, World

TEMPLATE = Vocabulary(WORDS, 3, (("a",), ("red", "blue"), ("circle", "star")))
STEPS = 40


def config(**agent: Any) -> Config:
    values = {"width": 16, "pictures": 3, "words": 4, "batch_size": 6, "updates": 2, "gamma": 0.9, **agent}
    return Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"path": "x"},
            "data": {"train": "x"},
            "algorithm": "value_based",
            "value_based": values,
            "learner": {"steps": STEPS, "lr": 1e-2, "lr_min": 1e-4},
        }
    )


class Pieces:
    """An env runner and a learner of one config."""

    def __init__(self, world: World, **agent: Any) -> None:
        self.cfg = config(**agent)
        section = self.cfg.value_based
        assert section is not None
        self.section = section
        self.arguments = environment_arguments(self.cfg, world.images, world.samples, world.reward, TEMPLATE)
        self.dqn: DQNConfig = dqn_config(self.cfg, self.arguments)
        self.runner = SingleAgentEnvRunner(config=self.dqn.copy(), worker_index=1)
        spec = self.dqn.get_multi_rl_module_spec(spaces=self.runner.get_spaces())
        self.learner = TemporalDifferenceLearner(config=self.dqn.copy(), module_spec=spec)
        self.learner.build()

    def transitions(self, count: int) -> list[SingleAgentEpisode]:
        """Of one step each, as the replay buffer hands them out."""
        buffer = EpisodeReplayBuffer(capacity=100)
        buffer.add(self.runner.sample())
        return buffer.sample(num_items=count, n_step=1, sample_episodes=True)

    def update(self) -> Any:
        return self.learner.update(episodes=self.transitions(6), timesteps={"num_env_steps_sampled_lifetime": 0})


def batch(world: World, size: int = 8) -> dict[str, Any]:
    rng = np.random.default_rng(2)

    def observations(ended: np.ndarray) -> dict[str, torch.Tensor]:
        said = np.where(ended, TEMPLATE.max_words, rng.integers(TEMPLATE.max_words, size=size))
        return {
            "image": torch.from_numpy(world.images[rng.integers(2, size=size)]),
            "words": torch.from_numpy(rng.integers(0, 6, (size, 3))),
            "valid": torch.from_numpy(np.stack([TEMPLATE.valid(int(n)) for n in said])),
        }

    ended = np.arange(size) % 3 == 0
    return {
        Columns.OBS: observations(np.zeros(size, dtype=bool)),
        Columns.NEXT_OBS: observations(ended),
        Columns.ACTIONS: torch.from_numpy(rng.integers(0, 6, size)),
        Columns.REWARDS: torch.from_numpy(rng.normal(size=size).astype(np.float32)),
        Columns.TERMINATEDS: torch.from_numpy(ended),
        "weights": torch.ones(size),
        "n_step": torch.ones(size),
    }


@pytest.mark.parametrize(("double_q", "alpha"), [(False, 1.0), (True, 0.3)])
def test_the_loss_is_row_3(world: World, double_q: bool, alpha: float) -> None:
    """Against NumPy, from the network's own outputs, with a target network that has drifted."""
    pieces = Pieces(world, double_q=double_q, alpha=alpha)
    learner, module = pieces.learner, pieces.learner.agent
    with torch.no_grad():
        for parameter in module._target_af.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    rows = batch(world)
    out = module.forward_train(rows)
    loss = learner.compute_loss_for_module(module_id="default_policy", config=learner.config, batch=rows, fwd_out=out)
    q = module.compute_q_values({Columns.OBS: rows[Columns.OBS]})["qf_preds"].detach().numpy()
    online = module.compute_q_values({Columns.OBS: rows[Columns.NEXT_OBS]})["qf_preds"].detach().numpy()
    target = module.forward_target({Columns.OBS: rows[Columns.NEXT_OBS]})["qf_preds"].detach().numpy()
    valid = rows[Columns.NEXT_OBS]["valid"].numpy().astype(bool)
    total = 0.0
    for i in range(8):
        allowed = np.flatnonzero(valid[i])
        best = max(allowed, key=lambda a, i=i: (online if double_q else target)[i, a])
        goal = rows[Columns.REWARDS][i].item() + (0 if i % 3 == 0 else 0.9 * target[i, best])
        chosen = q[i, rows[Columns.ACTIONS][i]]
        total += 0.5 * (chosen - (chosen + alpha * (goal - chosen))) ** 2
    assert loss.item() == pytest.approx(total / 8, rel=1e-5)


@pytest.mark.parametrize("kind", ["epsilon_greedy", "boltzmann"])
def test_workers_never_take_a_masked_word_and_explore_less_as_learning_goes_on(world: World, kind: str) -> None:
    exploration = {"kind": kind, "schedule": "cosine", "start": 1.0, "end": 0.2, "share": 0.5}
    pieces = Pieces(world, exploration=exploration)
    said = [episode.get_infos(-1)["caption"] for _ in range(6) for episode in pieces.runner.sample() if episode.is_done]
    assert len(said) > 10
    assert {len(text.split()) for text in said} == {3}  # a masked word would have ended the caption
    assert pieces.runner.module.unwrapped().exploring == 1.0
    for _ in range(10):
        pieces.update()
    state = pieces.learner.agent.get_state(inference_only=True)
    pieces.runner.module.unwrapped().set_state(state)
    assert pieces.runner.module.unwrapped().exploring == pytest.approx(cosine_annealing(10, 20, 1.0, 0.2))


def test_the_rate_follows_the_cosine_and_a_restored_learner_goes_on_alike(world: World) -> None:
    first, second = Pieces(world), Pieces(world)
    for step in range(5):
        assert rate(first) == pytest.approx(cosine_annealing(step, STEPS, 1e-2, 1e-4))
        first.update()
    kept = first.learner.captured()
    second.update()  # so that there is something to undo
    second.learner.restore(kept)
    assert rate(second) == pytest.approx(cosine_annealing(5, STEPS, 1e-2, 1e-4))
    transitions = first.transitions(6)
    for pieces in (first, second):
        pieces.learner.update(episodes=transitions, timesteps={"num_env_steps_sampled_lifetime": 0})
    one, two = (pieces.learner.captured().tensors for pieces in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert int(one["module/updates"]) == 6
    assert any(not torch.equal(one[name], kept.tensors[name]) for name in one)


def rate(pieces: Pieces) -> float:
    return pieces.learner.get_optimizer("default_policy").param_groups[0]["lr"]


def test_the_agent_without_rllib_takes_the_modules_actions(world: World) -> None:
    pieces = Pieces(world, dueling=True, fusion="shared_attention")
    unit = FeatureScale(np.zeros(4, np.float32), np.ones(4, np.float32))
    facts = AgentFacts.of(pieces.section, TEMPLATE, unit, world.images.shape[1:])
    agent = Agent(facts, pieces.learner.agent.state_dict())
    rows = batch(world)
    expected = pieces.learner.agent.compute_q_values(rows)["qf_preds"]
    torch.testing.assert_close(agent.network(rows[Columns.OBS]), expected)
    actions = pieces.learner.agent.forward_inference(rows)[Columns.ACTIONS]
    assert rows[Columns.OBS]["valid"].gather(1, actions[:, None]).all()


def test_a_replay_buffer_comes_back_from_its_arrays(world: World) -> None:
    pieces = Pieces(world, shaping={"caption": 1.0})
    episodes = pieces.runner.sample()
    tensors = episodes_to_tensors(episodes)
    again = episodes_from_tensors(tensors, world.images, TEMPLATE)
    assert len(again) == len(episodes) > 3
    for one, two in zip(episodes, again, strict=True):
        assert one.is_terminated == two.is_terminated
        assert two.is_done
        assert list(one.get_actions()) == list(two.get_actions())
        np.testing.assert_allclose(one.get_rewards(), two.get_rewards())
        for t in range(len(one) + 1):
            a, b = one.get_observations(t), two.get_observations(t)
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a)
