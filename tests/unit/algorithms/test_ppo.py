"""PPO with a critic: literal values of GAE, a step against plain transformers and autograd, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrl_ray.algorithms.ppo import PpoObjective, PpoSection, advantages_and_returns
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import CheckpointError
from mmrl_ray.learner.checkpoints import load_checkpoint, save_checkpoint
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.run_records.run_dir import RunDir
from tests.unit.learner.together import run_together
from tests.unit.learner.worlds import (
    make_groups,
    make_plan,
    make_policy,
    make_rewards,
    payloads,
    reference_logprobs,
    weights,
)


def section(**keys: Any) -> LearnerSection:
    ppo = PpoSection(gamma=0.9, gae_lambda=0.8, value_weight=0.7, value_clip=keys.pop("value_clip", 0.2))
    defaults: dict[str, Any] = {"steps": 4, "lr": 1e-2, "max_grad_norm": 1e9, "loss": "ppo", "advantage": "none"}
    return LearnerSection(**{**defaults, "ppo": ppo, **keys})


def critic_of(learner: LearnerStep) -> torch.nn.Linear:
    assert isinstance(learner._objective, PpoObjective)
    return learner._objective.critic


def with_critic(policy: Policy, cfg: LearnerSection) -> LearnerStep:
    """A learner whose critic says something already."""
    learner = LearnerStep(policy, cfg)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in critic_of(learner).parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return learner


def gae(reward: float, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """From the definition: A_t = Σ_l (γλ)^l δ_t+l."""
    following = np.append(values[1:], 0.0)
    delta = gamma * following - values
    delta[-1] += reward
    return np.array(
        [sum((gamma * lam) ** k * delta[t + k] for k in range(len(values) - t)) for t in range(len(values))]
    )


def test_advantages_and_returns_by_hand() -> None:
    values = torch.tensor([[0.5, 0.2, 0.1], [0.3, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found, returns = advantages_and_returns(torch.tensor([1.0, 0.0]), values, mask, gamma=0.5, gae_lambda=0.5)
    # δ = (0.1 − 0.5, 0.05 − 0.2, 1 − 0.1), weights 1, ¼, 1/16
    expected = torch.tensor([[-0.4 - 0.15 / 4 + 0.9 / 16, -0.15 + 0.9 / 4, 0.9], [-0.3, 0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(found, expected)
    kept = torch.where(mask, values, 0.0)
    assert torch.allclose(returns, expected + kept)


def expected_step(policy: Policy, critic: torch.nn.Linear, cfg: LearnerSection) -> tuple[float, torch.Tensor]:
    """Loss and gradient by critic of a first pass, completion by completion on whole rows."""
    groups = make_groups(policy, noise=0.2)
    rewards = make_rewards(groups)
    total, tokens = torch.zeros(()), 0
    for i, group in enumerate(groups):
        for j, completion in enumerate(group.completions):
            prompt = encode_prompts(policy, [group.sample])[0]
            row = torch.cat([prompt.input_ids, completion.token_ids])[None]
            pixels = prompt.model_inputs["pixel_values"]
            with torch.no_grad():
                output = policy.model(input_ids=row, pixel_values=pixels, use_cache=False, output_hidden_states=True)
                theta = reference_logprobs(policy, group, completion.token_ids)
            hidden = output.hidden_states[-1][0, prompt.input_ids.numel() - 1 : -1]
            values = critic(hidden)[:, 0]
            plain = values.detach().double().numpy()
            advantages = gae(float(rewards[i, j]), plain, 0.9, 0.8)
            weight = (theta - completion.logprobs).exp().clamp(max=cfg.off_policy_cap)  # π_prox/μ
            total = total - (weight * torch.from_numpy(advantages).float()).sum()
            returns = torch.from_numpy(advantages + plain).float()
            total = total + 0.7 * 0.5 * (values - returns).square().sum()
            tokens += len(theta)
    loss = total / tokens
    (slope,) = torch.autograd.grad(loss, [critic.weight])
    return float(loss.detach()), slope


@pytest.mark.parametrize("budget", [10_000, 1])
def test_a_step_is_the_formulas_on_whole_rows(tiny: Path, budget: int) -> None:
    cfg = section(micro_batch_tokens=budget)
    policy = make_policy(tiny)
    learner = with_critic(policy, cfg)
    loss, slope = expected_step(policy, critic_of(learner), cfg)
    groups = make_groups(policy, noise=0.2)
    metrics = learner.run(make_plan(groups, cfg, rewards=make_rewards(groups)), payloads)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    grad = critic_of(learner).weight.grad
    assert grad is not None
    assert torch.allclose(grad, slope, rtol=1e-3, atol=1e-5)


def test_a_value_that_has_moved_too_far_gets_no_gradient(tiny: Path) -> None:
    """With a clip that the first update leaves behind, a second pass moves no value further that way."""
    metrics = {}
    for clip in (1e-6, None):
        cfg = section(passes=2, lr=1e-2, value_clip=clip)
        policy = make_policy(tiny)
        groups = make_groups(policy)
        metrics[clip] = with_critic(policy, cfg).run(make_plan(groups, cfg, rewards=make_rewards(groups)), payloads)
    assert metrics[1e-6]["ppo/value_clipped"] > 0
    assert metrics[None]["ppo/value_clipped"] == 0
    assert metrics[1e-6]["ppo/value_loss"] >= metrics[None]["ppo/value_loss"]


def test_values_become_what_is_earned(tiny: Path) -> None:
    """Where every caption of a picture earns the same, the critic learns it, and advantages end."""
    cfg = section(steps=80, lr=1e-2, ppo=PpoSection(gamma=1.0, gae_lambda=1.0, value_clip=None))
    policy = make_policy(tiny)
    groups = make_groups(policy)
    rewards = np.full((3, 4), 0.6)
    learner = LearnerStep(policy, cfg)
    first = learner.run(make_plan(groups, cfg, rewards=rewards), payloads)
    for step in range(1, 80):
        last = learner.run(make_plan(groups, cfg, step=step, rewards=rewards, staleness=step), payloads)
    assert last["ppo/value_loss"] < 0.05 * first["ppo/value_loss"]


def test_two_ranks_make_the_step_of_one(tiny: Path) -> None:
    cfg = section(micro_batch_tokens=1)
    ((alone, metrics),) = run_together(lambda: make_policy(tiny), cfg, 1)
    for policy, others in run_together(lambda: make_policy(tiny), cfg, 2):
        assert torch.allclose(weights(policy), weights(alone), atol=1e-5)
        for name in ("loss", "grad_norm", "ppo/value_loss", "ppo/return"):
            assert others[name] == pytest.approx(metrics[name], rel=1e-4), name


def test_two_steps_and_two_after_a_resume_are_four_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "r1")
    cfg = section(passes=2)
    groups = make_groups(make_policy(tiny))

    def learn(learner: LearnerStep, steps: range) -> None:
        for step in steps:
            learner.run(make_plan(groups, cfg, step=step), payloads)

    policy = make_policy(tiny)
    straight = LearnerStep(policy, cfg)
    learn(straight, range(2))
    save_checkpoint(run, 2, policy=policy, learner=straight.state(), controller={}, keep=1)
    learn(straight, range(2, 4))

    resumed = make_policy(tiny)
    learner = LearnerStep(resumed, cfg)
    learn(learner, range(1))  # some other past
    learner.restore(load_checkpoint(run, 2, resumed).learner)
    learn(learner, range(2, 4))
    assert torch.equal(critic_of(learner).weight, critic_of(straight).weight)
    assert bool(critic_of(straight).weight.any())
    assert torch.equal(weights(resumed), weights(policy))

    other = LearnerStep(make_policy(tiny), LearnerSection(steps=4))
    save_checkpoint(run, 3, policy=other.policy, learner=other.state(), controller={}, keep=2)
    with pytest.raises(CheckpointError, match="has no critic"):
        learner.restore(load_checkpoint(run, 3, resumed).learner)
