"""`algorithm: value_based` and its section: what goes together, and what is said where it does not."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from mmrl_ray.algorithms.dqn.algorithm import Fusion
from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config, load_config, parse_config
from mmrl_ray.errors import ConfigError

CONFIG = Path(__file__).parents[3] / "configs" / "value_based.yaml"


def read(*overrides: str) -> Config:
    return load_config(CONFIG, overrides)


def test_reads_back_and_resolves_nothing_else() -> None:
    cfg = read("value_based.exploration.kind=boltzmann", "value_based.double_q=true")
    assert parse_config(dump_config(cfg), "again.yaml") == cfg
    assert cfg.value_based is not None
    assert cfg.value_based.exploration.kind == "boltzmann"


def test_fusions_are_those_that_there_are() -> None:
    from mmrl_ray.reward_model.fusion import FUSIONS

    assert typing.get_args(Fusion) == FUSIONS


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("value_based=null", "algorithm: value_based needs a section `value_based:`"),
        ("algorithm=grpo", "is the section of algorithm: value_based, and this is algorithm: grpo"),
        ("learner.steps=801", r"learner\.steps=801 is no multiple of value_based\.updates=8"),
        ("learner.loss=gspo", "makes no use of learner.loss=gspo; leave that out"),
        ("rollout.group_size=4", "makes no use of rollout.group_size=4; leave that out"),
        ("learner.workers=2", "makes no use of learner.workers=2"),
        ("rollout.workers={min: 1, max: 2}", r"a number of rollout\.workers, no range"),
        ("value_based.shaping={cider: 1.0}", r"shaping names no part of the reward \(caption\) but cider"),
        ("value_based.shaping={caption/bleu: -1.0}", "shaping: a weight is not negative"),
        ("value_based.template=[[a], []]", "template: each place needs at least one word"),
        ("value_based.template=[[a b]]", "a word has no blanks and is not empty, got 'a b'"),
        ("value_based.vocabulary=[large, small]", "template has the word 'blue', which vocabulary lacks"),
        ("value_based.max_words=4", "template has 5 places, max_words=4 is below"),
        ("value_based.buffer_words=500", "buffer_words=500 is below learning_starts=1000"),
        ("value_based.exploration.end=1.5", r"end=1\.5 is above start=1"),
        ("value_based.exploration.start=2.0", "start=2 is no probability"),
        ("value_based.exploration={kind: boltzmann, end: 0.0}", "end=0 is no temperature"),
        ("value_based.fusion=concat", "fusion"),
        ("serving={live_policy: true}", "not served while it trains"),
    ],
)
def test_refusals_name_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(override)
