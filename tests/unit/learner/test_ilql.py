"""A step of implicit Q-learning against plain transformers on whole rows and autograd; what it moves; checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from mmrl_ray.algorithms.ilql import IlqlSection
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import AdapterError, CheckpointError
from mmrl_ray.experience.carriers import RolloutGroup
from mmrl_ray.learner.checkpoints import load_checkpoint, save_adapter_folder, save_checkpoint
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.policy.heads import HEADS_FILE, LearningHeads, add_learning_heads, learning_heads
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.prefix import ScorePath
from mmrl_ray.run_records.run_dir import RunDir, checkpoint_name
from tests.unit.learner.together import run_together
from tests.unit.learner.worlds import TEMPERATURE, make_groups, make_plan, make_policy, make_rewards, payloads, weights

ILQL: dict[str, Any] = {"gamma": 0.9, "expectile": 0.8, "conservative": 0.3, "target_rate": 0.25, "width": 12}


def section(bc_weight: float = 0.0, **keys: Any) -> LearnerSection:
    ilql = IlqlSection(**ILQL, bc_weight=bc_weight)
    defaults = {"steps": 4, "lr": 1e-2, "max_grad_norm": 1e9, "loss": "ilql", "advantage": "none", "ilql": ilql}
    return LearnerSection(**{**defaults, **keys})


def make_valued(folder: Path, cfg: LearnerSection, *, fresh: bool = False) -> tuple[Policy, LearningHeads]:
    """A policy whose heads say something already, unless they are to be `fresh`."""
    policy = make_policy(folder)
    heads = add_learning_heads(policy, beta=cfg.ilql.beta, width=cfg.ilql.width, seed=0)
    if not fresh:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return policy, heads


def head_weights(heads: LearningHeads) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in heads.parameters()])


def whole_row(policy: Policy, group: RolloutGroup, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, d] that each token was chosen from, and the tokens' log-probs; nothing padded or shared."""
    prompt = encode_prompts(policy, [group.sample])[0]
    row = torch.cat([prompt.input_ids, tokens])[None]
    output = policy.model(
        input_ids=row, pixel_values=prompt.model_inputs["pixel_values"], use_cache=False, output_hidden_states=True
    )
    start = prompt.input_ids.numel() - 1
    logits = output.logits[0, start:-1] / TEMPERATURE
    logits = logits.index_fill(-1, torch.tensor(policy.image_token_ids), -math.inf)
    return output.hidden_states[-1][0, start:-1], torch.log_softmax(logits, -1)[torch.arange(len(tokens)), tokens]


def expected_loss(
    policy: Policy, heads: LearningHeads, groups: Sequence[RolloutGroup], rewards: np.ndarray, w: float
) -> torch.Tensor:
    """The formula, completion by completion and token by token."""
    total, count = torch.zeros(()), 0
    for i, group in enumerate(groups):
        for j, completion in enumerate(group.completions):
            tokens = completion.token_ids
            hidden, logprobs = whole_row(policy, group, tokens)
            v = heads.v(hidden)[:, 0]
            targets = [heads.q[k](hidden).detach() for k in range(2)]
            for t, token in enumerate(tokens.tolist()):
                last = t == len(tokens) - 1
                y = float(rewards[i, j]) if last else ILQL["gamma"] * v[t + 1].detach()
                u = torch.minimum(targets[0][t, token], targets[1][t, token]) - v[t]
                total = total + (ILQL["expectile"] if u > 0 else 1 - ILQL["expectile"]) * u**2
                for k in range(2):
                    q = heads.online[k](hidden[t])
                    total = total + (q[token] - y) ** 2
                    q = q.index_fill(0, torch.tensor(policy.image_token_ids), -math.inf)
                    total = total - ILQL["conservative"] * torch.log_softmax(q, -1)[token]
                total = total - w * logprobs[t]
                count += 1
    return total / count


@pytest.mark.parametrize("path", ["shared_prefix", "packed", "naive"])
@pytest.mark.parametrize(("budget", "w"), [(10_000, 0.0), (1, 0.7), (10_000, 0.7)])
def test_loss_and_gradient_are_those_of_the_formula_on_whole_rows(
    tiny: Path, path: ScorePath, budget: int, w: float
) -> None:
    cfg = section(w, micro_batch_tokens=budget)
    policy, heads = make_valued(tiny, cfg)
    groups = make_groups(policy, reference=False)
    rewards = make_rewards(groups)
    rewards[1] = 0.0  # nothing earned is something learnt
    loss = expected_loss(policy, heads, groups, rewards, w)
    moved = [p for p in policy.model.parameters() if p.requires_grad] if w else []
    slopes = torch.autograd.grad(loss, [*moved, *heads.learnt()])
    learner = LearnerStep(policy, cfg, path=path)
    metrics = learner.run(make_plan(groups, cfg, rewards=rewards, staleness=0), payloads)
    assert not any(name.startswith("sampler_gap/") for name in metrics)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    found = [p.grad for p in [*moved, *heads.learnt()]]
    for grad, slope in zip(found, slopes, strict=True):
        assert grad is not None
        assert float((grad - slope).abs().max()) < 1e-5 * max(1.0, float(slope.abs().max()))
    assert metrics["grad_norm"] == pytest.approx(float(torch.cat([s.flatten() for s in slopes]).norm()), rel=1e-4)
    for name in ("td", "expectile", "conservative", "q", "v", "nll", "advantage"):
        assert math.isfinite(metrics[f"ilql/{name}"])
    assert math.isnan(metrics["kl"])


@pytest.mark.parametrize("w", [0.0, 0.7])
def test_two_ranks_make_the_step_of_one(tiny: Path, w: float) -> None:
    cfg = section(w, micro_batch_tokens=1)

    def make() -> Policy:
        return make_valued(tiny, cfg)[0]

    ((alone, metrics),) = run_together(make, cfg, 1)
    for policy, others in run_together(make, cfg, 2):
        heads, expected = learning_heads(policy), learning_heads(alone)
        assert torch.allclose(head_weights(heads), head_weights(expected), atol=1e-5)  # the targets are in it
        assert torch.allclose(weights(policy), weights(alone), atol=1e-5)
        for name in set(metrics) - {n for n in metrics if n.startswith("seconds/")}:
            assert others[name] == pytest.approx(metrics[name], rel=1e-4, nan_ok=True), name


def test_the_policy_stays_as_it_is_unless_it_clones(tiny: Path) -> None:
    for w in (0.0, 1.0):
        cfg = section(w)
        policy, heads = make_valued(tiny, cfg, fresh=True)
        before, values, targets = weights(policy), head_weights(heads), heads.q[0][0].weight.clone()  # type: ignore[index]
        groups = make_groups(policy)
        learner = LearnerStep(policy, cfg)
        for step in range(2):
            learner.run(make_plan(groups, cfg, step=step), payloads)
        assert torch.equal(weights(policy), before) == (w == 0)
        assert not torch.equal(head_weights(heads), values)
        # The first layer has no slope while the last one is 0: it moves from the second step on.
        online = heads.online[0][0].weight.detach()  # type: ignore[index]
        assert not torch.equal(online, targets)
        assert torch.allclose(heads.q[0][0].weight, targets + 0.25 * (online - targets), atol=1e-6)  # type: ignore[index]
        assert learner.updates == 2


def test_values_of_stored_completions_become_what_they_earned(tiny: Path) -> None:
    """Of completions with one token the value of the token is its reward, and V with τ = ½ the mean of a group's."""
    ilql = IlqlSection(expectile=0.5, conservative=0.0, target_rate=0.2)
    cfg = section(steps=300, lr=5e-3, ilql=ilql)
    policy, heads = make_valued(tiny, cfg, fresh=True)
    groups = make_groups(policy, lengths=((1, 1), (1, 1)), reference=False)
    rewards = np.array([[0.2, 0.8], [1.0, -0.5]])
    learner = LearnerStep(policy, cfg)
    for step in range(300):
        learner.run(make_plan(groups, cfg, step=step, rewards=rewards), payloads)
    for i, group in enumerate(groups):
        hidden, _ = whole_row(policy, group, group.completions[0].token_ids)
        assert heads.v(hidden).item() == pytest.approx(rewards[i].mean(), abs=0.03)
        for j, completion in enumerate(group.completions):
            assert heads.q[0](hidden)[0, completion.token_ids].item() == pytest.approx(rewards[i, j], abs=0.03)


def test_two_steps_and_two_after_a_resume_are_four_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "r1")
    cfg = section(0.5)
    groups = make_groups(make_policy(tiny))

    def learn(learner: LearnerStep, steps: range) -> None:
        for step in steps:
            learner.run(make_plan(groups, cfg, step=step), payloads)

    straight, expected = make_valued(tiny, cfg, fresh=True)
    learn(LearnerStep(straight, cfg), range(4))

    policy, _ = make_valued(tiny, cfg, fresh=True)
    learner = LearnerStep(policy, cfg)
    learn(learner, range(2))
    save_checkpoint(run, 2, policy=policy, learner=learner.state(), controller={}, keep=1)
    assert run.exists(f"{checkpoint_name(2)}/{HEADS_FILE}")

    resumed, found = make_valued(tiny, cfg)
    learner = LearnerStep(resumed, cfg)
    learn(learner, range(1))  # some other past
    learner.restore(load_checkpoint(run, 2, resumed).learner)
    learn(learner, range(2, 4))
    assert torch.equal(head_weights(found), head_weights(expected))
    assert torch.equal(weights(resumed), weights(straight))

    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny), run.full_path(checkpoint_name(2)))
    save_adapter_folder(run, "adapter", resumed, 4)
    assert sorted(run.list("adapter")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        HEADS_FILE,
    ]


def test_a_checkpoint_of_other_heads_or_of_none_is_refused(tiny: Path, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "r1")
    cfg = section()
    bare = make_policy(tiny)
    plain = LearnerSection(steps=4)
    save_checkpoint(run, 1, policy=bare, learner=LearnerStep(bare, plain).state(), controller={}, keep=2)
    policy, _ = make_valued(tiny, cfg)
    save_checkpoint(run, 2, policy=policy, learner=LearnerStep(policy, cfg).state(), controller={}, keep=2)
    with pytest.raises(CheckpointError, match="has no value heads"):
        load_checkpoint(run, 1, policy)
    other, _ = make_valued(tiny, section(ilql=IlqlSection(width=5)))
    with pytest.raises(AdapterError, match="has shape"):
        load_checkpoint(run, 2, other)
    assert learning_heads(policy) is policy.value_heads[None]


def test_without_heads_there_is_nothing_to_learn(tiny: Path) -> None:
    with pytest.raises(ValueError, match="no value heads that learn"):
        LearnerStep(make_policy(tiny), section())
