"""Run by `test_device.py` in a process of its own: what uses a policy, on the pretended device and on the CPU.

Each test does the same on both and asks for equal numbers. That nothing is mixed asks for no assertion: the device
raises (`tests/support/pretended_device.py`). How often the host waits is asked where it happens again and again: in a
decode step and in a micro-batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.algorithms.ilql import IlqlSection
from mmrl_ray.analysis.attribution import caption_importance, caption_states
from mmrl_ray.config import Config
from mmrl_ray.config.learner import KlSection, LearnerSection
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.sections import LoraSection
from mmrl_ray.experience.carriers import (
    Completion,
    GroupKey,
    RolloutGroup,
    SamplingParams,
)
from mmrl_ray.learner.job import LearnerJob
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.learner.train_loop import _Learner
from mmrl_ray.policy import cuda
from mmrl_ray.policy.generation.base import DecodeRequest, GroupOutput
from mmrl_ray.policy.generation.decode import Decoder, decode_groups
from mmrl_ray.policy.generation.local import LocalEngine
from mmrl_ray.policy.heads import LearningHeads, add_learning_heads
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_parameters, adapter_state, add_adapter, save_adapter
from mmrl_ray.policy.lora.pool import AdapterPool
from mmrl_ray.policy.lora.routing import BASE, VersionedPolicy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.prefix import ScorePath, score_completions
from mmrl_ray.policy.vision import VisionCache, vision_features
from mmrl_ray.reward_model.model import RewardModel
from mmrl_ray.reward_model.vision_source import Pixels, PolicyVision
from mmrl_ray.rewards.build import NOTHING, build_reward
from mmrl_ray.rollouts.engine import RolloutEngine
from mmrl_ray.rollouts.scorer import Scorer
from mmrl_ray.rollouts.types import Assignment, GroupRequest
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.serving.adapters import AdapterFolders
from mmrl_ray.serving.engine import Engine
from mmrl_ray.serving.protocols import Generated, GenerateRequest, Turn
from tests.support.pretended_device import MixedDevices, Traffic, device_bytes, register, watched
from tests.support.tiny_models import build_family, image_bytes, make_completions, make_samples, section_of
from tests.unit.learner.test_train_loop import PlainController, config
from tests.unit.learner.worlds import gradient, make_plan, payloads, weights
from tests.unit.reward_model.test_model import CAPTIONS, PICTURES, spec

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "smolvlm")
PATHS: tuple[ScorePath, ...] = ("shared_prefix", "packed")
CPU = torch.device("cpu")
DEVICE = register()
TEMPERATURE = 0.7
LENGTHS = ((3, 1, 6, 4), (2, 8, 5, 1), (4, 4, 7, 2))
SAMPLING = SamplingParams(temperature=TEMPERATURE, max_new_tokens=6, top_k=20, seed=5)
torch.set_num_threads(1)

Make = Callable[[torch.device], Policy]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            made[family] = build_family(family, tmp_path_factory.mktemp(family))
        return made[family]

    return find


@pytest.fixture(scope="session")
def load(folder: Callable[[str], Path]) -> Callable[[str, torch.device], Policy]:
    """A fresh copy of a family's base, which is loaded once on each device."""
    loaded: dict[tuple[str, torch.device], Policy] = {}

    def copied(family: str, device: torch.device) -> Policy:
        if (family, device) not in loaded:
            policy = loaded[family, device] = load_policy(section_of(family, folder(family)), device=device)
            if device == DEVICE:  # nothing can be recorded here: steps that could be are computed
                policy.acceleration = cuda.accelerate(policy.hf_model)
        policy = loaded[family, device]
        return replace(policy, model=deepcopy(policy.model), value_heads={})

    return copied


@pytest.fixture(params=FAMILIES)
def make(request: pytest.FixtureRequest, load: Callable[[str, torch.device], Policy]) -> Make:
    """The family's base on a device."""
    return partial(load, request.param)


@pytest.fixture
def make_llava(load: Callable[[str, torch.device], Policy]) -> Make:
    """Where families are alike."""
    return partial(load, "llava")


def adapted(policy: Policy, seed: int = 1) -> Policy:
    """With an adapter that is felt, the same on every device."""
    add_adapter(policy, LoraSection(r=4, alpha=8.0), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.model):
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.device))
    return policy


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """`found` is on the device, and equals `expected` but for rounding: the CPU's layers go by oneDNN."""
    assert found.device.type == DEVICE.type
    scale = float(expected.abs().max().clamp_min(1.0))
    assert float((found.cpu() - expected).abs().max()) <= tolerance * scale


# -- the device itself -------------------------------------------------------------------------------------------------


def test_the_device_refuses_and_counts_what_a_gpu_would_refuse_and_wait_for() -> None:
    here, there = torch.arange(6.0).to(DEVICE), torch.arange(6.0)
    for mix in (lambda: here + there, lambda: there[here > 2], lambda: torch.cat([here, there]), here.numpy):
        with pytest.raises((MixedDevices, TypeError)):
            mix()
    index = torch.tensor([0, 2]).to(DEVICE)
    free: tuple[Callable[[], Any], ...] = (
        lambda: here[1:3] * 2 + torch.tensor(3.0),
        lambda: here[index].sum(),
        lambda: here.masked_fill(here > 2, 0.0),
        lambda: here.clone().index_put_((here > 2,), torch.tensor(0.0)),
        lambda: there.to(DEVICE, non_blocking=True),
        lambda: torch.zeros(3, device=DEVICE),
    )
    reading: tuple[Callable[[], Any], ...] = (
        lambda: float(here[0]),
        lambda: bool((here > 2).any()),
        lambda: here.tolist(),
        lambda: here[here > 2],
        lambda: here.nonzero(),
        lambda: there.copy_(here),
    )
    writing: tuple[Callable[[], Any], ...] = (
        lambda: here[[0, 1]],
        lambda: torch.tensor([1, 2], device=DEVICE),
        lambda: here.copy_(there),
    )
    for calls, expected in ((free, (0, 0)), (reading, (1, 0)), (writing, (0, 1))):
        for i, call in enumerate(calls):
            with watched() as traffic:
                call()
            assert (traffic.reads.total(), traffic.writes.total()) == expected, (i, traffic.table())


# -- scoring -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_scores_and_their_gradient(make: Make, path: ScorePath) -> None:
    found: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    for device in (CPU, DEVICE):
        policy = adapted(make(device))
        prompts = encode_prompts(policy, make_samples())
        completions = make_completions(policy, LENGTHS)
        features = vision_features(policy, prompts, VisionCache(1 << 20))
        scores = score_completions(policy, prompts, features, completions, TEMPERATURE, path=path, entropy=True)
        assert scores.entropies is not None
        scores.logprobs.sum().backward()
        found[device] = scores.logprobs.detach(), scores.entropies, gradient(policy)
    for on_device, on_cpu in zip(found[DEVICE], found[CPU], strict=True):
        close(on_device, on_cpu)


def test_states_of_captions_and_their_attribution(make: Make) -> None:
    found = []
    for device in (CPU, DEVICE):
        policy = adapted(make(device))
        prompts = encode_prompts(policy, make_samples()[:2])
        captions = [group[0] for group in make_completions(policy, ((3,), (5,)))]
        features = vision_features(policy, prompts)
        states = caption_states(policy, prompts, features, captions)
        importance = caption_importance(policy, prompts[0], features[0], captions[0], temperature=TEMPERATURE)
        assert states[0] is not None
        found.append((states[0].hidden, torch.tensor([*importance.share.values(), *importance.rms.values()])))
    for on_cpu, on_device in zip(*found, strict=True):
        torch.testing.assert_close(on_device, on_cpu, rtol=1e-3, atol=1e-5)


# -- decoding ----------------------------------------------------------------------------------------------------------


def same_outputs(found: Sequence[GroupOutput], expected: Sequence[GroupOutput]) -> None:
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-4)


def test_a_run_s_engine_samples_with_the_adapter_of_a_version(make: Make) -> None:
    """Merged into the weights while it does."""
    outputs = []
    for device in (CPU, DEVICE):
        weights = adapter_state(adapted(make(CPU), seed=2).model)
        policy = adapted(make(device))
        engine = LocalEngine(VersionedPolicy(policy), VisionCache(1 << 20), max_rows=16)
        engine.load(1, weights)
        prompts = encode_prompts(policy, make_samples())
        outputs.append(engine.generate([DecodeRequest(p, 3, SAMPLING, greedy_extra=True) for p in prompts]))
    same_outputs(outputs[1], outputs[0])


def waits_of_a_step(decoder: Decoder) -> Traffic:
    """Of one step in the middle, when prompts have started and no row has ended."""
    for _ in range(3):
        decoder.step()
    with watched() as traffic:
        decoder.step()
    return traffic


def test_a_decode_step_reads_tokens_and_their_logprobs_and_nothing_else(make: Make) -> None:
    policy = adapted(make(DEVICE))
    policy.eos_token_ids = ()
    prompts = encode_prompts(policy, make_samples())
    for packed in (True, False):
        decoder = Decoder(policy, max_rows=16, packed=packed)
        for prompt in prompts:
            decoder.admit(prompt, 4, SAMPLING, greedy_extra=True)
        traffic = waits_of_a_step(decoder)
        # Where rows are not packed, transformers makes the mask, and looks whether it hides anything.
        own = {place: count for place, count in traffic.reads.items() if packed or "masking_utils" not in place}
        assert sum(own.values()) <= 2, traffic.table()
        assert traffic.writes.total() == 0, traffic.table()


def several(policy: Policy, folders: Mapping[str, Path], **settings: Any) -> tuple[AdapterPool, Decoder]:
    pool = AdapterPool(
        policy, AdapterFolders({id: str(at) for id, at in folders.items()}, ()), max_adapters=4, max_rank=16
    )
    pool.scan()
    for id in folders:
        pool.install(pool.read(id))
    return pool, Decoder(policy, max_rows=16, adapters=pool.rows, **settings)


def test_base_and_adapters_of_several_ids_share_a_batch(make: Make, tmp_path: Path) -> None:
    folders = {}
    for seed in (1, 2):
        save_adapter(adapted(make(CPU), seed).model, tmp_path / f"adapter{seed}")
        folders[f"a{seed}"] = tmp_path / f"adapter{seed}"
    outputs = []
    for device in (CPU, DEVICE):
        policy = make(device)
        policy.eos_token_ids = ()
        pool, decoder = several(policy, folders)
        names = [BASE, *(leased.name for leased in map(pool.lease, folders) if leased is not None)]
        prompts = encode_prompts(policy, make_samples())
        handles = [decoder.admit(p, 2, SAMPLING, adapter=name) for p, name in zip(prompts, names, strict=True)]
        traffic = waits_of_a_step(decoder)
        assert traffic.reads.total() <= 2, traffic.table()
        assert traffic.writes.total() == 0, traffic.table()
        decoder.drain()
        outputs.append([decoder.take(handle) for handle in handles])
    same_outputs(outputs[1], outputs[0])


# -- learning ----------------------------------------------------------------------------------------------------------


def make_groups(policy: Policy, sizes: Sequence[Sequence[int]], side: int = 64) -> list[RolloutGroup]:
    """Groups of pictures of one size, whose features did not travel with them; sampled from a policy some way off."""
    samples = make_samples([(side, side)] * len(sizes))
    prompts = encode_prompts(policy, samples)
    completions = make_completions(policy, sizes)
    with torch.no_grad():
        scores = score_completions(policy, prompts, None, completions, TEMPERATURE)
    rows = iter(scores.logprobs)
    noise = torch.Generator().manual_seed(7)

    def completion(tokens: torch.Tensor) -> Completion:
        logprobs = next(rows)[: tokens.numel()].cpu()
        off = [logprobs + 0.2 * torch.randn(logprobs.shape, generator=noise) for _ in range(2)]
        return Completion(tokens, off[0], "", "stop", off[1])

    return [
        RolloutGroup(
            sample=sample,
            prompt=prompt,
            completions=tuple(completion(tokens) for tokens in group),
            policy_version=0,
            sampling=SamplingParams(temperature=TEMPERATURE, max_new_tokens=8),
        )
        for sample, prompt, group in zip(samples, prompts, completions, strict=True)
    ]


def learner(**keys: Any) -> LearnerSection:
    kl = KlSection(weight=0.1, estimator="k3")
    return LearnerSection(**{"steps": 4, "lr": 1e-2, "loss": "clipped", "kl": kl, **keys})


@pytest.mark.parametrize("path", PATHS)
def test_a_learner_step(make: Make, path: ScorePath) -> None:
    """Metrics, weights, and what a checkpoint of it leads to."""
    cfg = learner(adapter_l2=0.01, micro_batch_tokens=150)
    groups = make_groups(adapted(make(CPU)), LENGTHS)
    plan = make_plan(groups, cfg)
    found = []
    for device in (CPU, DEVICE):
        policy = adapted(make(device))
        step = LearnerStep(policy, cfg, path=path, vision_cache=VisionCache(1 << 20))
        metrics = step.run(plan, payloads)
        again = LearnerStep(policy, cfg, path=path)
        again.restore(step.state())
        again.run(plan, payloads)
        found.append((metrics, weights(policy)))
    close(found[1][1], found[0][1], 1e-3)
    for name, expected in found[0][0].items():
        if not name.startswith("seconds/"):
            assert found[1][0][name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def waits_of_a_learner_step(policy: Policy, path: ScorePath, sizes: Sequence[Sequence[int]], budget: int) -> Traffic:
    cfg = learner(micro_batch_tokens=budget)
    plan = make_plan(make_groups(policy, sizes), cfg)
    assert (len(plan.micro_batches[0]) == 1) == (budget > 1)
    step = LearnerStep(policy, cfg, path=path)
    with watched() as traffic:
        step.run(plan, payloads)
    return traffic


@pytest.mark.parametrize("path", PATHS)
def test_a_micro_batch_waits_no_more_often_for_more_pictures_and_completions(make: Make, path: ScorePath) -> None:
    policy = adapted(make(DEVICE))
    few = waits_of_a_learner_step(policy, path, ((3, 5),) * 3, 1 << 20)
    many = waits_of_a_learner_step(policy, path, ((3, 5, 6, 1),) * 6, 1 << 20)
    assert few.reads == many.reads, f"{few.table()}\n\n{many.table()}"
    assert few.writes == many.writes, f"{few.table()}\n\n{many.table()}"


@pytest.mark.parametrize("path", PATHS)
def test_a_learner_reads_a_step_s_figures_and_transformers_its_masks(make_llava: Make, path: ScorePath) -> None:
    """Where the tower asks nothing: 5 reads a step (losses, sums, norm, the sampler gap twice), 3 a micro-batch."""
    policy = adapted(make_llava(DEVICE))
    for budget, batches in ((1 << 20, 1), (1, 3)):
        traffic = waits_of_a_learner_step(policy, path, ((3, 5),) * 3, budget)
        assert traffic.reads.total() <= 5 + 3 * batches, traffic.table()
        assert traffic.writes.total() == 0, traffic.table()


def test_features_that_travel_with_their_group_are_not_waited_for(make_llava: Make) -> None:
    policy = adapted(make_llava(DEVICE))
    groups = make_groups(policy, LENGTHS)
    features = vision_features(policy, [group.prompt for group in groups])
    shipped = [
        replace(group, vision=replace(each, tokens=each.tokens.cpu()))
        for group, each in zip(groups, features, strict=True)
    ]
    cfg = learner()
    step = LearnerStep(policy, cfg)
    plan = make_plan(shipped, cfg)
    with watched() as traffic:
        step.run(plan, payloads)
    assert traffic.writes.total() == 0, traffic.table()


def test_values_are_learnt_and_decoded_by(make: Make) -> None:
    section = IlqlSection(gamma=0.9, expectile=0.8, conservative=0.3, target_rate=0.25, width=12)
    cfg = learner(loss="ilql", advantage="none", kl=KlSection(weight=0.0), ilql=section)
    groups = make_groups(adapted(make(CPU)), LENGTHS)
    plan = make_plan(groups, cfg)
    found: list[tuple[torch.Tensor, list[GroupOutput]]] = []
    for device in (CPU, DEVICE):
        policy = adapted(make(device))
        heads = spread_heads(policy)
        LearnerStep(policy, cfg).run(plan, payloads)
        prompts = encode_prompts(policy, make_samples())
        sampling = replace(SAMPLING, value_beta=0.5)
        decoder = Decoder(policy, max_rows=16)
        made = decode_groups(decoder, [DecodeRequest(prompt, 2, sampling) for prompt in prompts])
        for prompt in prompts:
            decoder.admit(prompt, 2, replace(sampling, min_new_tokens=6))
        traffic = waits_of_a_step(decoder)
        assert traffic.reads.total() <= 2, traffic.table()
        assert traffic.writes.total() == 0, traffic.table()
        found.append((torch.cat([p.detach().flatten() for p in heads.parameters()]), made))
    close(found[1][0], found[0][0], 1e-3)
    same_outputs(found[1][1], found[0][1])


def spread_heads(policy: Policy) -> LearningHeads:
    heads = add_learning_heads(policy, beta=0.5, width=12, seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_((0.4 * torch.randn(parameter.shape, generator=generator)).to(parameter.device))
    return heads


# -- taking turns on a device ------------------------------------------------------------------------------------------


def as_made() -> None:
    """The weights of version 0."""


class Watching(PlainController):
    """Notes how often the learner had emptied its allocator whenever it published a version."""

    def __init__(self, cfg: Config, groups: Sequence[RolloutGroup], traffic: Traffic) -> None:
        super().__init__(cfg, groups)
        self.traffic = traffic
        self.emptied: list[int] = []

    def publish(self, version: int, state: Mapping[str, torch.Tensor]) -> None:
        super().publish(version, state)
        self.emptied.append(self.traffic.emptied)


def test_a_learner_leaves_the_device_to_the_workers(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Before they hear of the new version."""
    cfg = config(folder("llava"), groups_per_step=3, micro_batch_tokens=1 << 14)
    turns = {"learner": {"gpus": 0.5}, "rollout": {"gpus": 0.5}, "placement": "shared"}
    cfg = cfg.model_copy(update={"resources": type(cfg.resources)(**turns)})
    groups = make_groups(adapted(load_policy(cfg.model, device=CPU)), LENGTHS)
    with watched() as traffic:
        controller = Watching(cfg, groups, traffic)
        learner = _Learner(LearnerJob(cfg, RunDir.create(tmp_path, "r"), controller), DEVICE)  # type: ignore[arg-type]
        outcome = learner.run()
    assert (outcome.finished, controller.emptied, len(learner._cache)) == (True, [1, 2, 3], 0)


class Counting(PlainController):
    """Notes how many groups a learner asks for at once."""

    def groups(self, payloads: Sequence[Any]) -> list[RolloutGroup]:
        self.calls.append(f"fetch {len(payloads)}")
        return super().groups(payloads)


@pytest.mark.parametrize(("free", "passes"), [(1 << 40, [3]), (1 << 20, [1, 1, 1])])
def test_a_learner_takes_at_once_what_there_is_memory_for(
    folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int,
    passes: list[int],
) -> None:
    """Where the config does not say: all of the step with plenty, a group with hardly any; on a CPU all."""
    monkeypatch.setattr(torch.get_device_module(DEVICE), "free", free)
    cfg = config(folder("llava"), groups_per_step=3, steps=1)
    made = make_groups(adapted(load_policy(cfg.model, device=CPU)), LENGTHS)
    found = []
    for device, expected in ((CPU, [3]), (DEVICE, passes)):
        controller = Counting(cfg, made)
        run = RunDir.create(tmp_path / device.type, "r")
        learner = _Learner(LearnerJob(cfg, run, controller), device)  # type: ignore[arg-type]
        with caplog.at_level("INFO", logger="mmrl_ray"):
            assert learner.run().finished
        fetched = [call for call in controller.calls if call.startswith("fetch")]
        assert fetched[-len(expected) :] == [f"fetch {count}" for count in expected]
        found.append(weights(learner._policy))
    close(found[1], found[0], 1e-3)
    (told,) = [line for line in caplog.messages if "micro-batches hold up to" in line]
    largest = max(group.prompt.input_ids.numel() + 4 * cfg.rollout.max_new_tokens for group in made)
    assert f"up to {16384 if free > 1 << 20 else largest} tokens" in told


def test_a_worker_leaves_the_device_to_the_learner(make_llava: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but its weights, whether or not its results are still held, and also where it ran out of memory."""
    requests = tuple(
        GroupRequest(GroupKey(0, i), sample, SAMPLING, 3) for i, sample in enumerate(make_samples([(64, 64)] * 4))
    )
    assignment = Assignment(0, "train", requests, version=0, reference_logprobs=True)
    cache, versions = VisionCache(1 << 20), VersionedPolicy(adapted(make_llava(DEVICE)))
    generator = LocalEngine(versions, cache, max_rows=16)
    scorer = Scorer(versions, cache, temperature=TEMPERATURE, engine=generator)
    parts = generator, scorer, build_reward(RewardSection(), NOTHING)
    settings: dict[str, Any] = {"worker": "w", "reward_cfg": RewardSection(), "ship_vision_bytes": 1 << 20}
    alone, in_turn = RolloutEngine(*parts, **settings), RolloutEngine(*parts, **settings, takes_turns=True)
    in_turn.run(assignment, as_made)
    nothing_kept = device_bytes()
    alone.run(assignment, as_made)
    assert (len(cache), device_bytes() > nothing_kept) == (4, True)
    with watched() as traffic:
        result = in_turn.run(assignment, as_made)
    assert [group.payload.vision.tokens.device for group in result.groups] == [CPU] * 4
    assert (len(cache), device_bytes(), traffic.emptied) == (0, nothing_kept, 1)

    def run_out(*arguments: object) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(scorer, "reference_logprobs", run_out)  # when features and keys have been made
    with watched() as traffic, pytest.raises(torch.OutOfMemoryError):
        in_turn.run(assignment, as_made)
    assert (len(cache), device_bytes(), traffic.emptied) == (0, nothing_kept, 1)


# -- rewards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["shared_attention", "coupled_encoders", "attention", "weighted_sum"])
def test_a_learned_reward(fusion: str, make_llava: Make) -> None:
    """On its own pixels and on a policy's features, scored and with a gradient."""
    for vision in (None, make_llava) if fusion == "attention" else (None,):
        scores, gradients = [], []
        for device in (CPU, DEVICE):
            source: Any = Pixels(32, 1 << 20) if vision is None else PolicyVision(vision(device), 1 << 20)
            fields = {} if vision is None else {"feature_dim": source.feature_dim}
            torch.manual_seed(0)
            scorer = RewardModel(spec(fusion=fusion, ensemble="members", prior=0.5).model_copy(update=fields))
            scorer = scorer.eval().to(device)
            scores.append(torch.stack(scorer.score(source, PICTURES, CAPTIONS)[:2]))
            words = scorer.vocabulary.encode(CAPTIONS, 8).to(device)
            outputs = scorer(source.inputs(PICTURES, device), torch.arange(3, device=device), words)
            outputs.mean.sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None]))
        torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)
        close(gradients[1], gradients[0])


# -- serving -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    texts: list[list[str]]
    logprobs: torch.Tensor


def serve(policy: Policy, folders: Mapping[str, Path]) -> Served:
    """What an engine answers to requests of the base and of adapters that come together."""
    policy.eos_token_ids = ()
    sources = AdapterFolders({id: str(at) for id, at in folders.items()}, ())
    pool = AdapterPool(policy, sources, max_adapters=3, max_rank=16)
    settings: dict[str, Any] = {"vision_cache_bytes": 1 << 22, "max_rows": 16, "max_queue": 16, "timeout_s": 120.0}
    engine = Engine(policy, pool, model_id="tiny", created=5, **settings)
    engine.start()
    try:
        answers = asyncio.run(ask_all(engine, ["tiny", *folders]))
    finally:
        engine.close()
    choices = [choice for answer in answers for choice in answer.choices]
    return Served(
        [[choice.text for choice in answer.choices] for answer in answers],
        torch.tensor([token.logprob for choice in choices for token in choice.tokens]),
    )


async def ask_all(engine: Engine, models: Sequence[str]) -> list[Generated]:
    def request(i: int, model: str) -> GenerateRequest:
        turns = (Turn("user", (0, "describe the image .")),)
        return GenerateRequest(f"r{i}", model, turns, (image_bytes(64, 64, seed=i),), SAMPLING, 2)

    return await asyncio.gather(*(engine.generate(request(i, model)) for i, model in enumerate(models)))


def test_the_serving_engine(make: Make, tmp_path: Path) -> None:
    folders = {}
    for seed in (1, 2):
        save_adapter(adapted(make(CPU), seed).model, tmp_path / f"adapter{seed}")
        folders[f"a{seed}"] = tmp_path / f"adapter{seed}"
    on_cpu, on_device = serve(make(CPU), folders), serve(make(DEVICE), folders)
    assert on_device.texts == on_cpu.texts
    assert len({tuple(texts) for texts in on_cpu.texts}) == 3
    torch.testing.assert_close(on_device.logprobs, on_cpu.logprobs, rtol=1e-4, atol=1e-4)
