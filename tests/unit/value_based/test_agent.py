"""The Q network by each fusion, greedy captions, the agent's files, and the replay buffer as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmrl_ray.algorithms.dqn.agent import Agent, AgentFacts
from mmrl_ray.algorithms.dqn.algorithm import ValueBasedSection
from mmrl_ray.algorithms.dqn.network import LIMIT, FeatureScale, QNetwork, Vocabulary
from mmrl_ray.errors import ModelError
from mmrl_ray.reward_model.fusion import FUSIONS

from .conftest import WORDS, World

TEMPLATE = Vocabulary(WORDS, 3, (("a",), ("red", "blue"), ("circle", "star")))


def make_agent(world: World, cfg: ValueBasedSection, vocabulary: Vocabulary = TEMPLATE) -> Agent:
    facts = AgentFacts.of(cfg, vocabulary, FeatureScale.of(world.images), world.images.shape[1:])
    torch.manual_seed(0)
    return Agent(facts, QNetwork(facts.shape, cfg.fusion, cfg.width, dueling=cfg.dueling).state_dict())


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dueling", [False, True])
def test_q_depends_on_picture_and_on_words_and_their_order(world: World, fusion: str, dueling: bool) -> None:
    cfg = ValueBasedSection(fusion=fusion, width=16, dueling=dueling)
    network = make_agent(world, cfg).network
    images = torch.from_numpy(world.images)
    words = torch.tensor([[1, 2, 0], [1, 2, 0]])
    both = network({"image": images, "words": words})
    assert both.shape == (2, 6)
    assert not torch.allclose(both[0], both[1])
    swapped = network({"image": images, "words": torch.tensor([[2, 1, 0], [1, 2, 0]])})
    assert not torch.allclose(swapped[0], both[0])
    torch.testing.assert_close(swapped[1], both[1])
    # The picture's share is no constant that the words' values are added to: what is best depends on both.
    mixed = both - network({"image": images, "words": torch.tensor([[1, 3, 0], [1, 3, 0]])})
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-4)


def test_dueling_is_v_plus_a_less_its_mean(world: World) -> None:
    network = make_agent(world, ValueBasedSection(width=16, dueling=True)).network
    observation = {"image": torch.from_numpy(world.images), "words": torch.zeros(2, 3, dtype=torch.int64)}
    fused = network.encoder(observation).vector
    assert network.vf is not None
    scores = network.af(fused)
    expected = network.vf(fused) + scores - scores.mean(dim=1, keepdim=True)
    torch.testing.assert_close(network(observation), expected)


def test_captions_keep_to_the_template_and_repeat(world: World) -> None:
    agent = make_agent(world, ValueBasedSection(width=16))
    greedy = agent.captions(world.images)
    assert greedy == agent.captions(world.images)
    drawn = agent.captions(np.repeat(world.images, 50, axis=0), epsilon=1.0, seed=1)
    assert {tuple(text.split()) for text in drawn} == {
        ("a", colour, shape) for colour in ("red", "blue") for shape in ("circle", "star")
    }
    assert drawn == agent.captions(np.repeat(world.images, 50, axis=0), epsilon=1.0, seed=1)
    free = make_agent(world, ValueBasedSection(width=16), Vocabulary(WORDS, 4))
    lengths = {len(text.split()) for text in free.captions(np.repeat(world.images, 50, axis=0), epsilon=1.0)}
    assert lengths == {0, 1, 2, 3, 4}


def test_the_files_give_the_same_agent(world: World, tmp_path: Path) -> None:
    agent = make_agent(world, ValueBasedSection(width=16, fusion="weighted_sum", dueling=True, blind=True))
    agent.save(tmp_path)
    again = Agent.load(tmp_path)
    assert again.captions(world.images) == agent.captions(world.images)
    assert again.facts.vocabulary == agent.facts.vocabulary
    assert again.facts.blind
    for name, tensor in agent.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor)
    (tmp_path / "agent.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no agent that can be read"):
        Agent.load(tmp_path)


def test_features_are_standardised_cut_and_blinded() -> None:
    images = np.random.default_rng(0).normal(3, 2, (50, 4, 5)).astype(np.float32)
    scale = FeatureScale.of(images)
    scaled = scale(images)
    np.testing.assert_allclose(scaled.mean(axis=(0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(axis=(0, 1)), 1, atol=1e-5)
    assert scale(images * 1e6).max() == LIMIT
    assert not scale(images, blind=True).any()
    constant = FeatureScale.of(np.ones((2, 3, 4), np.float32))
    assert np.isfinite(constant(np.ones((2, 3, 4), np.float32))).all()
