"""The agent of a value-based run behind the policy's protocol, without Ray."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.algorithms.dqn.agent import Agent, AgentFacts, save_agent_folder
from mmrl_ray.algorithms.dqn.algorithm import ValueBasedSection
from mmrl_ray.algorithms.dqn.network import FeatureScale, QNetwork, Vocabulary, image_features
from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, DataError, OverloadedError, RunError, UnknownModelError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.serving.agent_engine import AgentEngine
from mmrl_ray.serving.engine import export_engine_metrics
from mmrl_ray.serving.protocols import Delta, GenerateRequest, Served, Turn
from tests.support.meters import MemoryMeter
from tests.support.tiny_models import build_family, image_bytes

WORDS = Vocabulary(("red", "blue", "circle", "star"), 2, (("red", "blue"), ("circle", "star")))
PROMPT = "describe the image ."
GREEDY = SamplingParams(greedy=True)
SETTINGS: dict[str, Any] = {"vision_cache_bytes": 1 << 20, "max_rows": 64, "max_queue": 4, "timeout_s": 60.0}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = build_family("llava", tmp_path_factory.mktemp("llava"))
    return load_policy(ModelSection(path=str(folder), dtype="float32"), device="cpu")


@pytest.fixture(scope="module")
def agent(policy: Policy) -> Agent:
    images = image_features(policy, [Sample("a", (image_bytes(),), PROMPT)], 4, VisionCache(1 << 20))
    cfg = ValueBasedSection(width=16)
    facts = AgentFacts.of(cfg, WORDS, FeatureScale.of(images), images.shape[1:])
    torch.manual_seed(0)
    return Agent(facts, QNetwork(facts.shape, cfg.fusion, cfg.width, dueling=False).state_dict())


@pytest.fixture
def engine(policy: Policy, agent: Agent, tmp_path: Path) -> Iterator[AgentEngine]:
    run = RunDir.create(tmp_path, "seen")
    save_agent_folder(run, agent, 40)
    made = AgentEngine(policy, run, model_id="seen", **SETTINGS)
    made.start()
    try:
        yield made
    finally:
        made.close()


def ask(n: int = 1, sampling: SamplingParams = GREEDY, model: str = "seen", text: str = PROMPT) -> GenerateRequest:
    return GenerateRequest("r", model, (Turn("user", (0, text)),), (image_bytes(),), sampling, n)


def test_greedy_answers_are_the_agents_own(engine: AgentEngine, policy: Policy, agent: Agent) -> None:
    made = asyncio.run(engine.generate(ask()))
    images = image_features(policy, [Sample("a", (image_bytes(),), PROMPT)], 4, VisionCache(1 << 20))
    (choice,) = made.choices
    assert choice.text == agent.captions(images)[0]
    assert choice.finish_reason == "stop"
    assert "".join(token.text for token in choice.tokens) == choice.text
    assert made.served.version == 40
    (info,) = asyncio.run(engine.models())
    assert (info.id, info.version) == ("seen", 40)
    assert info.created > 0
    short = asyncio.run(engine.generate(ask(sampling=SamplingParams(greedy=True, max_new_tokens=1)))).choices[0]
    assert (short.text, short.finish_reason) == (choice.text.split()[0], "length")


def test_a_temperature_draws_by_boltzmann_and_tells_the_log_probabilities(engine: AgentEngine) -> None:
    hot = SamplingParams(temperature=5.0, seed=1)
    drawn = asyncio.run(engine.generate(ask(64, hot))).choices
    assert drawn == asyncio.run(engine.generate(ask(64, hot))).choices
    seen = Counter(choice.text for choice in drawn)
    assert len(seen) == 4
    for choice in drawn:
        chance = math.exp(sum(token.logprob for token in choice.tokens))
        assert abs(seen[choice.text] / 64 - chance) < 5 * math.sqrt(chance * (1 - chance) / 64)
    cold = asyncio.run(engine.generate(ask(8, SamplingParams(temperature=1e-6, seed=1)))).choices
    assert {choice.text for choice in cold} == {asyncio.run(engine.generate(ask())).choices[0].text}


def test_a_stream_says_the_same(engine: AgentEngine) -> None:
    async def collect() -> list[Served | Delta]:
        return [item async for item in engine.stream(ask(2))]

    served, *deltas = asyncio.run(collect())
    assert isinstance(served, Served)
    said = asyncio.run(engine.generate(ask(2))).choices
    for i, choice in enumerate(said):
        mine = [d for d in deltas if isinstance(d, Delta) and d.index == i]
        assert "".join(d.text for d in mine) == choice.text
        assert [d.finish_reason for d in mine] == [None, "stop"]


def test_refusals_and_figures(engine: AgentEngine, policy: Policy, tmp_path: Path) -> None:
    for request, error, message in (
        (ask(model="other"), UnknownModelError, "there is 'seen'"),
        (ask(n=65), ConfigError, "n=65"),
        (ask(sampling=SamplingParams(top_p=0.5)), ConfigError, "leave top_k, top_p, stop"),
        (ask(text="<image>"), DataError, "special token"),
    ):
        with pytest.raises(error, match=message):
            asyncio.run(engine.generate(request))
    meter = MemoryMeter()
    export_engine_metrics(meter, engine.stats)
    assert engine.stats()["requests"] == 4
    assert engine.stats()["failed_requests"] == 4
    empty = RunDir.create(tmp_path, "empty")
    with pytest.raises(RunError, match="has no agent and no checkpoint yet"):
        AgentEngine(policy, empty, model_id="x", **SETTINGS)
    engine.close()
    with pytest.raises(OverloadedError, match="not ready"):
        asyncio.run(engine.generate(ask()))
