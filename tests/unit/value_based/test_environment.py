"""`mmrl/Caption-v0`: gymnasium's checker, what is paid when, and that shaping changes no best policy."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from mmrl_ray.algorithms.dqn.algorithm import ValueBasedSection
from mmrl_ray.algorithms.dqn.environment import CAPTION_ENV, CaptionEnv
from mmrl_ray.algorithms.dqn.network import Vocabulary
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, DataError
from mmrl_ray.experience.carriers import RewardBreakdown, TruncatedCaption

from .conftest import WORDS, World

TEMPLATE = Vocabulary(WORDS, 3, (("a",), ("red", "blue"), ("circle", "star")))


def say(env: CaptionEnv, index: int, actions: tuple[int, ...]) -> tuple[list[float], dict[str, object]]:
    """Rewards of an episode, and its last info."""
    env.reset(options={"index": index})
    rewards: list[float] = []
    info: dict[str, object] = {}
    for place, action in enumerate(actions):
        _, reward, ended, cut, info = env.step(np.int64(action))
        rewards.append(reward)
        assert not cut
        assert ended == (place == len(actions) - 1)
    return rewards, info


@pytest.mark.parametrize("vocabulary", [Vocabulary(WORDS, 4), TEMPLATE])
def test_gymnasiums_own_checker(world: World, vocabulary: Vocabulary) -> None:
    made = gym.make(
        CAPTION_ENV,
        images=world.images,
        samples=world.samples,
        reward=world.reward,
        vocabulary=vocabulary,
        shaping={"caption": 1.0},
        render_mode="ansi",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped)


def test_a_caption_is_paid_for_at_its_end(world: World) -> None:
    env = world.environment()
    rewards, info = say(env, 0, (0, 1, 3, 5))
    expected = world.reward.score_batch(world.samples[:1], ["a red circle"])[0]
    assert rewards == [0, 0, 0, expected.total]
    assert info["caption"] == "a red circle"
    assert info["reward"] == expected.total
    assert info["parts"] == dict(expected.parts)
    assert env.render() == "a red circle"
    # The last word that there is room for ends it, too.
    assert len(say(env, 1, (0, 2, 4, 4))[0]) == 4
    assert say(env, 1, (5,))[0] == [0.0]


def test_a_caption_that_fills_all_places_was_cut_off_unless_a_template_ends_it(world: World) -> None:
    seen: list[tuple[str, bool]] = []

    class Watching:
        def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
            seen.extend((str(caption), isinstance(caption, TruncatedCaption)) for caption in captions)
            return [RewardBreakdown(0.0, {"caption": 0.0}, {"caption": 1.0})] * len(captions)

    for vocabulary, actions in ((Vocabulary(WORDS, 2), (0, 1)), (Vocabulary(WORDS, 2), (0, 5)), (TEMPLATE, (0, 1, 3))):
        env = CaptionEnv(world.images, world.samples, Watching(), vocabulary)
        info = say(env, 0, actions)[1]
        assert type(info["caption"]) is str
    assert seen == [("a red", True), ("a", False), ("a red circle", False)]
    # A caption that goes on has no end yet.
    env = CaptionEnv(world.images, world.samples, Watching(), Vocabulary(WORDS, 3), shaping={"caption": 1.0})
    seen.clear()
    say(env, 0, (0, 5))
    assert seen == [("", True), ("a", True), ("a", False)]


def test_observations_say_what_was_said_and_what_may_follow(world: World) -> None:
    env = world.environment(TEMPLATE)
    first, _ = env.reset(options={"index": 1})
    assert first["image"].tolist() == world.images[1].tolist()
    assert first["words"].tolist() == [0, 0, 0]
    assert first["valid"].tolist() == [1, 0, 0, 0, 0, 0]
    second, *_ = env.step(np.int64(0))
    assert second["words"].tolist() == [1, 0, 0]
    assert second["valid"].tolist() == [0, 1, 1, 0, 0, 0]
    env.step(np.int64(2))
    last, _, ended, *_ = env.step(np.int64(4))
    assert ended
    assert last["words"].tolist() == [1, 3, 5]
    assert last["valid"].tolist() == [0, 0, 0, 0, 0, 1]
    # What is not allowed says nothing and ends the caption.
    env.reset(options={"index": 1})
    _, _, ended, _, info = env.step(np.int64(3))
    assert ended
    assert info["caption"] == ""


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_shaping_pays_earlier_and_leaves_the_best_caption_the_best(world: World, gamma: float) -> None:
    """Of every caption the discounted sum changes by one constant: so no policy gains on another."""
    plain = world.environment(gamma=gamma)
    shaped = world.environment(gamma=gamma, shaping={"caption/detail": 0.7, "caption/bleu": 0.4, "caption/length": 2.0})
    changes = []
    for count in range(4):
        for words in itertools.product(range(5), repeat=count):
            actions = (*words, 5)
            before, after = (say(env, 0, actions)[0] for env in (plain, shaped))
            changes.append(sum(gamma**t * (b - a) for t, (a, b) in enumerate(zip(before, after, strict=True))))
    assert len(changes) == 1 + 5 + 25 + 125
    np.testing.assert_allclose(changes, changes[0], atol=1e-12)
    assert say(shaped, 0, (1, 5))[0][0] > say(shaped, 1, (1, 5))[0][0]  # "red" is paid for at once, where it is true


def test_shaping_keeps_the_optimal_policy_of_a_small_process() -> None:
    """Value iteration on a random process, with and without a potential; a bonus that is none changes the policy."""
    rng = np.random.default_rng(1)
    states, actions, gamma = 6, 3, 0.9
    moves = rng.dirichlet(np.full(states, 0.3), size=(states, actions))
    rewards, potential = rng.normal(size=(states, actions)), rng.normal(size=states) * 5
    potential[-1] = 0  # the terminal state

    def optimal(paid: np.ndarray) -> np.ndarray:
        q = np.zeros((states, actions))
        for _ in range(500):
            value = q.max(axis=1)
            value[-1] = 0
            q = paid + gamma * moves @ value
        return q[:-1]

    plain = optimal(rewards)
    shaped = optimal(rewards + gamma * moves @ potential - potential[:, None])
    np.testing.assert_allclose(shaped, plain - potential[:-1, None], atol=1e-9)
    assert (shaped.argmax(axis=1) == plain.argmax(axis=1)).all()
    assert (optimal(rewards + moves @ potential).argmax(axis=1) != plain.argmax(axis=1)).any()


def test_refusals(world: World) -> None:
    with pytest.raises(DataError, match=r"got \[2, 3, 4\] for 1"):
        CaptionEnv(world.images, world.samples[:1], world.reward, TEMPLATE)
    with pytest.raises(ConfigError, match="shaping names 'cider', which the reward has not; it has caption, "):
        world.environment(shaping={"cider": 1.0}).reset()


def test_resets_draw_pictures_by_the_seed(world: World) -> None:
    env = world.environment()
    drawn = [[env.reset(seed=seed)[1]["index"]] + [env.reset()[1]["index"] for _ in range(20)] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {0, 1}


def test_vocabularies() -> None:
    references = [("the red cat", "a red dog"), ("a cat",)]
    assert Vocabulary.of(ValueBasedSection(vocabulary_size=3), references).words == ("a", "cat", "red")
    assert Vocabulary.of(ValueBasedSection(vocabulary=["x", "y"]), references).words == ("x", "y")
    made = Vocabulary.of(ValueBasedSection(template=[["a"], ["red", "a"]]), references)
    assert made.words == ("a", "red")
    assert made.max_words == 2
    assert made.text([0, 1]) == "a red"
    with pytest.raises(ConfigError, match="no words"):
        Vocabulary.of(ValueBasedSection(), [])
