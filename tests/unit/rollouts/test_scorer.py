"""The local engine and the scorer on a tiny model; oracles are the model's own laws, not this code."""

from __future__ import annotations

import pickle
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.config.schema import torch_threads
from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import ContextLengthError, ImageError, ModelError
from mmrl_ray.experience.carriers import GroupKey, SamplingParams
from mmrl_ray.policy import memory, prompt_pool
from mmrl_ray.policy.generation.base import DecodeRequest, GroupOutput
from mmrl_ray.policy.generation.sampling import RowSampler
from mmrl_ray.policy.lora.adapter import adapter_state
from mmrl_ray.policy.model import Acceleration
from mmrl_ray.policy.scoring import prefix
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.rewards.multimodal import MultimodalReward
from mmrl_ray.rewards.text import RougeReward
from mmrl_ray.rollouts.engine import RolloutEngine
from mmrl_ray.rollouts.factory import PolicyEngineFactory
from mmrl_ray.rollouts.types import Assignment, GroupRequest
from tests.unit.rollouts.fakes import config, samples


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(
        tmp_path_factory.mktemp("model") / "tiny",
        vocabulary=["a", "red", "green", "blue", "circle", "square", "left", "of", "Describe", "the", "image", "."],
        image_size=16,
        hidden=32,
        layers=2,
        heads=2,
        vision_hidden=32,
        vision_layers=2,
        vision_heads=2,
        context_length=64,
    )


@pytest.fixture
def factory(model_folder: Path, tmp_path: Path) -> PolicyEngineFactory:
    cfg = config(
        tmp_path,
        model={"path": str(model_folder), "lora": LoraSection(r=2).model_dump()},
        rollout={"group_size": 3, "max_new_tokens": 5, "temperature": 0.8},
        resources={"rollout": {"threads": 1}},
    )
    return PolicyEngineFactory(cfg, MultimodalReward({"rouge": RougeReward()}, {"rouge": 1.0}))


@pytest.fixture
def engine(factory: PolicyEngineFactory) -> RolloutEngine:
    return pickle.loads(pickle.dumps(factory))("worker-0")


def assignment(version: int = 0, count: int = 3, max_new_tokens: int = 5) -> Assignment:
    groups = tuple(
        GroupRequest(GroupKey(0, i), s, SamplingParams(0.8, max_new_tokens=max_new_tokens, seed=10 + i), 3)
        for i, s in enumerate(samples(count))
    )
    return Assignment(1, "train", groups, version, greedy_baseline=True, reference_logprobs=True)


def trained(engine: RolloutEngine) -> dict[str, torch.Tensor]:
    state = adapter_state(engine._scorer.policy.model)
    generator = torch.Generator().manual_seed(5)
    return {name: 0.3 * torch.randn(t.shape, generator=generator) for name, t in state.items()}


def tokens(result: object) -> list[list[int]]:
    return [c.token_ids.tolist() for g in result.groups for c in g.payload.completions]  # type: ignore[attr-defined]


def test_the_comparison_at_start_is_of_the_engine_that_samples(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = engine._generator
    sample = generator.sample_for_comparison

    def shifted(requests: Any) -> list[GroupOutput]:
        return [
            replace(output, completions=tuple(replace(c, logprobs=c.logprobs - 0.1) for c in output.completions))
            for output in sample(requests)
        ]

    monkeypatch.setattr(generator, "sample_for_comparison", shifted)
    with pytest.raises(ModelError, match=r"the sampler differs from the model's own forward by 0\.1 nats"):
        engine.run(assignment(), lambda: None)


def test_a_fresh_adapter_is_the_reference_and_a_trained_one_is_not(engine: RolloutEngine) -> None:
    """B = 0 changes nothing, so sampler and reference agree; that also ties the two code paths together."""
    fresh = engine.run(assignment(), lambda: None)
    for group in fresh.groups:
        assert len(group.rewards) == 3
        assert group.kl1 == pytest.approx((0.0, 0.0, 0.0), abs=1e-5)
        for completion in group.payload.completions:
            torch.testing.assert_close(completion.reference_logprobs, completion.logprobs, rtol=1e-5, atol=1e-5)
    changed = engine.run(assignment(version=1), lambda: trained(engine))
    assert max(abs(kl) for group in changed.groups for kl in group.kl1) > 1e-2


def test_no_weights_means_the_adapter_as_it_was_made(engine: RolloutEngine) -> None:
    before = engine.run(assignment(), lambda: None)
    weights = trained(engine)
    other = engine.run(assignment(version=1), lambda: weights)
    after = engine.run(assignment(), lambda: None)
    assert tokens(before) == tokens(after)
    assert tokens(before) != tokens(other)
    assert tokens(other) == tokens(engine.run(assignment(version=2), lambda: weights))


def test_two_workers_give_the_same_bit_for_bit(factory: PolicyEngineFactory) -> None:
    one, two = (factory(name).run(assignment(), lambda: None) for name in ("worker-0", "worker-1"))
    assert tokens(one) == tokens(two)
    for a, b in zip(one.groups, two.groups, strict=True):
        assert a.rewards == b.rewards
        for x, y in zip(a.payload.completions, b.payload.completions, strict=True):
            assert torch.equal(x.logprobs, y.logprobs)
            assert torch.equal(x.reference_logprobs, y.reference_logprobs)


def test_the_vision_tower_runs_once_an_image(engine: RolloutEngine) -> None:
    counts = [engine.run(assignment(), lambda: None).groups[0].counters for _ in range(2)]
    assert [(c["vision_hits"], c["vision_misses"], c["naive_path"]) for c in counts] == [(0, 3, 0), (3, 0, 0)]


def test_prompts_of_captions_beside_training_are_made_once_and_are_the_same(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, made = assignment(), []
    expected = tokens(engine.run(given, lambda: None))
    encode = prompt_pool.encode_prompts
    monkeypatch.setattr(prompt_pool, "encode_prompts", lambda *a: made.append(a[1][0].id) or encode(*a))
    beside = replace(given, kind="aside")
    assert tokens(engine.run(beside, lambda: None)) == expected
    assert tokens(engine.run(beside, lambda: None)) == expected
    assert made == [group.sample.id for group in given.groups]
    first = given.groups[0]
    other = replace(first, sample=replace(first.sample, images=given.groups[1].sample.images))
    engine.run(replace(beside, groups=(other,)), lambda: None)
    assert made[-1] == first.sample.id, "of the same name, and another picture"
    assert len(made) == len(given.groups) + 1


def test_states_come_with_the_groups_that_ask_for_them_and_follow_the_adapter(engine: RolloutEngine) -> None:
    given = assignment()
    asked = replace(given, groups=tuple(replace(g, wants_state=g.key.index != 1) for g in given.groups))
    fresh = [group.payload.state for group in engine.run(asked, lambda: None).groups]
    assert [state is None for state in fresh] == [False, True, False]
    assert {t.shape for t in (fresh[0].action, fresh[0].hidden, *fresh[0].modalities.values())} == {(32,)}
    generator, scorer = engine._generator, engine._scorer
    prompts = [scorer.encode(g.sample, 5) for g in given.groups]
    outputs = generator.generate([DecodeRequest(p, 1, SamplingParams(greedy=True, max_new_tokens=5)) for p in prompts])
    before = scorer.states(prompts, outputs)
    weights = trained(engine)
    generator.load(1, weights)
    after = scorer.states(prompts, outputs)
    for a, b in zip(before, after, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.action, b.action), "the same words"
        assert torch.equal(a.modalities["image"], b.modalities["image"]), "the same picture"
        assert float((a.hidden - b.hidden).norm()) > 1e-2, "another policy"


def test_a_model_whose_modalities_cannot_be_told_is_evaluated_without(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = assignment()
    asked = replace(given, groups=tuple(replace(g, wants_state=True) for g in given.groups))

    def fail(*arguments: object) -> None:
        raise ModelError("no embeddings")

    monkeypatch.setattr("mmrl_ray.rollouts.scorer.caption_states", fail)
    groups = engine.run(asked, lambda: None).groups
    assert [group.payload.state for group in groups] == [None, None, None]


def test_broken_and_overlong_samples_are_told_apart(engine: RolloutEngine) -> None:
    scorer = engine._scorer
    broken = samples(1)[0]
    with pytest.raises(ImageError):
        scorer.encode(type(broken)(id="x", images=(b"no image",), prompt="Describe."), 5)
    with pytest.raises(ContextLengthError, match="context of 64"):
        scorer.encode(broken, 64)


def test_threads_follow_from_the_config_alone(tmp_path: Path) -> None:
    """All processes of a run together have no more threads than there are cores, until each has a single one."""
    for workers, expected in ((1, 4), (3, 2), (7, 1), (20, 1)):
        cfg = config(tmp_path, rollout={"workers": workers})
        assert torch_threads(cfg, cfg.resources.rollout, cores=8) == expected
    cfg = config(tmp_path, rollout={"workers": 1}, resources={"rollout": {"threads": 3, "cpus": 2}})
    assert torch_threads(cfg, cfg.resources.rollout, cores=8) == 3
    cfg = config(tmp_path, rollout={"workers": 1}, resources={"rollout": {"gpus": 1, "cpus": 2}})
    assert torch_threads(cfg, cfg.resources.rollout, cores=8) == 2
    assert torch_threads(cfg, cfg.resources.learner, cores=8) == 8


def test_a_sampler_that_differs_from_the_model_is_the_models_error_at_once(
    engine: RolloutEngine, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any group is handed on; the pool ends the run on such an error."""
    right = RowSampler.sample

    def scaled(self: RowSampler, logits: torch.Tensor, *args: Any) -> Any:
        return right(self, 2.0 * logits, *args)

    monkeypatch.setattr(RowSampler, "sample", scaled)
    with pytest.raises(
        ModelError, match=rf"model '{model_folder}' \(llava\) does not pass .*: the sampler differs from"
    ):
        engine.run(assignment(), lambda: None)


def test_scoring_in_parts_holds_fewer_keys_and_gives_the_same(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, layers = trained(engine), 2
    held: list[int] = []
    update = prefix._RepeatedLayer.update
    policy = engine._scorer.policy
    policy.acceleration = replace(policy.acceleration, completions=Acceleration().completions)  # a CPU copies no keys

    def noted(*args: Any) -> Any:
        made = update(*args)
        held.append(layers * sum(each.nbytes for each in made))
        return made

    engine.run(assignment(), lambda: None)  # the comparison at start
    monkeypatch.setattr(prefix._RepeatedLayer, "update", noted)
    whole = engine.run(assignment(version=1, count=5), lambda: weights)
    for groups in (2, 1):
        budget = max(held) * groups // 5
        monkeypatch.setattr(memory, "MOST_KEYS_BYTES", budget)
        held.clear()
        parts = engine.run(assignment(version=1, count=5), lambda: weights)
        assert 0.9 * budget <= max(held) <= budget
        for a, b in zip(whole.groups, parts.groups, strict=True):
            for one, other in zip(a.payload.completions, b.payload.completions, strict=True):
                assert one.reference_logprobs is not None
                assert other.reference_logprobs is not None
                torch.testing.assert_close(one.reference_logprobs, other.reference_logprobs, rtol=1e-5, atol=1e-6)
        held[:] = [5 * max(held) // groups]


@pytest.mark.parametrize("processes", [1, 2])
def test_prompts_of_processes_give_the_same_rollouts(factory: PolicyEngineFactory, processes: int) -> None:
    """To the last bit, whatever was told before; and what was told in time is there."""
    rollout = factory.cfg.resources.rollout.model_copy(update={"picture_processes": processes})
    resources = factory.cfg.resources.model_copy(update={"rollout": rollout})
    beside = replace(factory, cfg=factory.cfg.model_copy(update={"resources": resources}))("worker-1")
    here = factory("worker-0")
    broken = GroupRequest(GroupKey(0, 9), replace(samples(1)[0], images=(b"\x89PNG\r\n\x1a\n",)), SamplingParams(), 3)
    first, second = assignment(), assignment(count=5)
    first = replace(first, groups=(*first.groups, broken), ahead=second.samples[3:5])
    prompts = beside._scorer._prompts
    try:
        found = []
        for asked in (first, second):
            wanted, made = here.run(asked, lambda: None), beside.run(asked, lambda: None)
            assert made.failures == wanted.failures
            assert tokens(made) == tokens(wanted)
            for one, other in zip(made.groups, wanted.groups, strict=True):
                assert one.rewards == other.rewards
                for mine, theirs in zip(one.payload.completions, other.payload.completions, strict=True):
                    assert torch.equal(mine.logprobs, theirs.logprobs)
                    assert torch.equal(mine.reference_logprobs, theirs.reference_logprobs)
                assert torch.equal(one.payload.prompt.input_ids, other.payload.prompt.input_ids)
            assert len(made.failures) == (asked is first)
            found.append([group.counters.get("prompts_ahead", 0) for group in made.groups])
            wait(prompts._prepared.values(), 60.0)
        assert len(found[1]) == 5
        assert found[1][0] >= 2, "those that were told"
        assert sum(found[1][1:]) == 0
    finally:
        prompts.close()
