"""One optimiser step against plain transformers and autograd: loss, gradient, split, ranks, schedule, errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrl_ray.algorithms.dpo import DpoSection
from mmrl_ray.algorithms.registry import PRESETS
from mmrl_ray.config.learner import KlSection, LearnerSection
from mmrl_ray.errors import ConfigError, LearnerError, NonFiniteError, RolloutError
from mmrl_ray.experience.carriers import PlannedGroup, RolloutGroup
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.losses.regularizers import adapter_l2, l2_to_pretrained
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from tests.unit.learner.together import run_together
from tests.unit.learner.worlds import (
    LENGTHS,
    TEMPERATURE,
    gradient,
    make_groups,
    make_plan,
    make_policy,
    make_rewards,
    payloads,
    reference_logprobs,
    truth,
    weights,
)


def section(**keys: Any) -> LearnerSection:
    return LearnerSection(**{"steps": 4, "lr": 1e-2, "max_grad_norm": 1e9, **keys})


def assert_close(found: torch.Tensor | float, expected: torch.Tensor | float, tolerance: float = 1e-5) -> None:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    scale = expected.abs().max().clamp_min(1e-6)
    assert float((found - expected).abs().max() / scale) < tolerance


COMBINATIONS = [
    ("reward_guided", "none", "token_mean", 0.0, "k3"),
    ("reward_guided", "batch_mean", "sequence_sum", 0.0, "k3"),
    ("reward_guided", "greedy", "constant", 0.1, "k1"),
    ("reward_guided", "leave_one_out", "sequence_mean", 0.1, "k2"),
    ("clipped", "group", "token_mean", 0.1, "k3"),
    ("clipped", "group", "sequence_mean", 0.1, "k2"),
    ("clipped", "leave_one_out", "sequence_sum", 0.0, "k3"),
    ("clipped", "batch_mean", "constant", 0.1, "k1"),
    ("gspo", "group", "sequence_mean", 0.0, "k3"),
    ("cispo", "group", "token_mean", 0.0, "k3"),
    ("cispo", "greedy", "constant", 0.2, "k3"),
]


@pytest.mark.parametrize(("loss", "advantage", "aggregation", "kl", "estimator"), COMBINATIONS)
@pytest.mark.parametrize("budget", [10_000, 1])
def test_loss_and_gradient_are_those_of_the_formulas(
    tiny: Path, loss: str, advantage: str, aggregation: str, kl: float, estimator: str, budget: int
) -> None:
    cfg = section(
        loss=loss,
        advantage=advantage,
        aggregation=aggregation,
        kl=KlSection(weight=kl, estimator=estimator),
        off_policy_cap=1.1,
        micro_batch_tokens=budget,
    )
    policy = make_policy(tiny)
    groups = make_groups(policy, noise=0.2)
    rewards = make_rewards(groups)
    expected = truth(policy, groups, cfg, rewards)
    plan = make_plan(groups, cfg, rewards=rewards)
    assert len(plan.micro_batches[0]) == (1 if budget > 1 else len(groups))
    metrics = LearnerStep(policy, cfg).run(plan, payloads)
    assert_close(gradient(policy), expected.gradient)
    assert metrics["loss"] == pytest.approx(expected.loss, rel=1e-5, abs=1e-7)
    assert metrics["loss/policy"] == pytest.approx(expected.policy, rel=1e-5, abs=1e-7)
    assert metrics["loss/kl"] == pytest.approx(expected.kl, rel=1e-5, abs=1e-7)
    assert metrics["grad_norm"] == pytest.approx(float(expected.gradient.norm()), rel=1e-5)


@pytest.mark.parametrize("loss", ["clipped", "gspo", "cispo"])
def test_a_second_pass_measures_its_ratio_from_the_start_of_the_step(tiny: Path, loss: str) -> None:
    cfg = section(
        loss=loss,
        aggregation="sequence_mean",
        passes=2,
        lr=3e-3,
        clip_low=0.05,
        clip_high=0.05,
        micro_batch_tokens=1,
    )
    policy = make_policy(tiny)
    groups = make_groups(policy, noise=0.2)
    rewards = make_rewards(groups)
    start = truth(policy, groups, cfg, rewards)
    metrics = LearnerStep(policy, cfg).run(make_plan(groups, cfg, rewards=rewards), payloads)
    found = gradient(policy)
    # The second gradient was taken between the updates: go back to where the first one led.
    again = make_policy(tiny)
    LearnerStep(again, cfg.model_copy(update={"passes": 1, "steps": 8})).run(
        make_plan(groups, cfg, rewards=rewards), payloads
    )
    expected = truth(again, groups, cfg, rewards, proximal=start.logprobs)
    assert_close(found, expected.gradient, 1e-4)
    assert metrics["loss"] == pytest.approx(expected.loss, rel=1e-4)
    assert metrics["clip_fraction"] > 0


def test_on_policy_ratio_is_one(tiny: Path) -> None:
    policy = make_policy(tiny)
    metrics = LearnerStep(policy, section()).run(make_plan(make_groups(policy), section()), payloads)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["behaviour_ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["effective_samples"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["behaviour_capped_fraction"] == 0


# -- sampler and learner -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
def test_sampler_gaps_are_those_before_the_first_update_stale_groups_apart(tiny: Path, size: int) -> None:
    cfg = section(passes=2, micro_batch_tokens=1, max_sampler_gap=0)
    policy = make_policy(tiny)
    groups = make_groups(policy, noise=0.2)
    plan = make_plan(groups, cfg, world_size=size)
    stale = {1}
    planned = tuple(replace(group, staleness=2 * (i in stale)) for i, group in enumerate(plan.groups))
    gaps: dict[bool, list[float]] = {False: [], True: []}
    with torch.no_grad():
        for i, group in enumerate(groups):
            for c in group.completions:
                gap = reference_logprobs(policy, group, c.token_ids).double() - c.logprobs.double()
                gaps[i in stale] += gap.abs().tolist()
    for _, metrics in run_together(partial(make_policy, tiny), cfg, size, plan=replace(plan, groups=planned), steps=1):
        for name, values in (("", gaps[False]), ("stale_", gaps[True])):
            assert metrics[f"sampler_gap/{name}max"] == pytest.approx(max(values), abs=1e-5)
            assert metrics[f"sampler_gap/{name}mean"] == pytest.approx(np.mean(values), abs=1e-5)


def test_on_policy_there_is_no_gap_but_rounding(tiny: Path) -> None:
    policy = make_policy(tiny)
    metrics = LearnerStep(policy, section()).run(make_plan(make_groups(policy), section(), staleness=0), payloads)
    assert 0 <= metrics["sampler_gap/mean"] <= metrics["sampler_gap/max"] < 1e-5
    assert "sampler_gap/stale_max" not in metrics


@pytest.mark.parametrize("bound", [None, 1.0])
def test_a_sampler_with_a_policy_of_its_own_stops_the_run_before_the_optimiser_moves(
    tiny: Path, bound: float | None
) -> None:
    """The largest gap is above the default; at 1 it is the mean that stops."""
    cfg = section(max_sampler_gap=bound)
    policy = make_policy(tiny)
    groups = make_groups(policy, noise=0.2)
    stale = LearnerStep(make_policy(tiny), cfg).run(make_plan(groups, cfg), payloads)
    largest, mean = stale["sampler_gap/stale_max"], stale["sampler_gap/stale_mean"]
    assert 0.1 < mean < largest < 1
    plan = make_plan(groups, cfg, step=3, world_size=2, staleness=0)
    for error in run_together(partial(make_policy, tiny), cfg, 2, plan=plan, steps=1):
        assert isinstance(error, LearnerError)
        assert f"step 3: model {str(tiny)!r} (llava) is sampled from by another policy than learns" in str(error)
        assert f"is {largest:.3g} at most and {mean:.3g} on average, above learner.max_sampler_gap=" in str(error)
    learner, before = LearnerStep(policy, cfg), weights(policy)
    with pytest.raises(LearnerError, match="this update was not made"):
        learner.run(make_plan(groups, cfg, staleness=0), payloads)
    assert torch.equal(weights(policy), before)
    assert learner.updates == 0


@pytest.mark.parametrize("bound", [0, 3.0])
def test_a_gap_within_its_bound_is_told_and_no_more(tiny: Path, bound: float) -> None:
    cfg, policy = section(max_sampler_gap=bound), make_policy(tiny)
    groups = make_groups(policy, noise=0.2)
    metrics = LearnerStep(policy, cfg).run(make_plan(groups, cfg, staleness=0), payloads)
    assert 0.1 < metrics["sampler_gap/mean"] < metrics["sampler_gap/max"] < 1


def test_naive_and_shared_prefix_path_make_the_same_step(tiny: Path) -> None:
    found = []
    for path in ("shared_prefix", "naive"):
        policy = make_policy(tiny)
        cfg = section(kl=KlSection(weight=0.1))
        metrics = LearnerStep(policy, cfg, path=path).run(make_plan(make_groups(policy), cfg), payloads)  # type: ignore[arg-type]
        assert metrics["shared_prefix"] is (path == "shared_prefix")
        found.append(gradient(policy))
    assert_close(found[0], found[1])


def test_entropy_kl_and_counts(tiny: Path) -> None:
    policy = make_policy(tiny)
    groups = make_groups(policy)
    cfg = section(kl=KlSection(weight=0.1, estimator="k2"), micro_batch_tokens=1)
    metrics = LearnerStep(policy, cfg).run(make_plan(groups, cfg), payloads)
    tokens = sum(c.token_ids.numel() for g in groups for c in g.completions)
    k3 = sum(
        float((torch.exp(c.reference_logprobs - c.logprobs) - 1 - (c.reference_logprobs - c.logprobs)).sum())
        for g in groups
        for c in g.completions
        if c.reference_logprobs is not None
    )
    assert metrics["kl"] == pytest.approx(k3 / tokens, rel=1e-4)
    assert metrics["tokens/completion"] == metrics["tokens/scored"] == tokens
    assert metrics["vision/recomputed"] == len(groups)
    assert 0 < metrics["entropy"] <= math.log(policy.vocab_size - 1)
    without = make_groups(policy, reference=False)
    assert math.isnan(LearnerStep(policy, section()).run(make_plan(without, section()), payloads)["kl"])


def test_regularisers_enter_once_a_step(tiny: Path) -> None:
    plain, regular = section(micro_batch_tokens=1), section(micro_batch_tokens=1, adapter_l2=0.3, l2_to_pretrained=0.2)
    policy = make_policy(tiny)
    groups = make_groups(policy)
    LearnerStep(policy, plain).run(make_plan(groups, plain), payloads)
    without = gradient(policy).clone()
    policy = make_policy(tiny)
    # By the definitions: ‖φ‖² and ‖s·B·A‖² of each adapted layer, built in full.
    phi = sum(p.double().square().sum() for p in policy.model.parameters() if p.requires_grad)
    distance = torch.zeros((), dtype=torch.float64)
    for module in policy.model.modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            b, a = module.lora_B["default"].weight.double(), module.lora_A["default"].weight.double()
            distance = distance + (module.scaling["default"] * b @ a).square().sum()
    penalty = 0.3 * phi + 0.2 * distance
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(penalty, parameters)]).float()
    metrics = LearnerStep(policy, regular).run(make_plan(groups, regular), payloads)
    assert_close(gradient(policy) - without, expected, 1e-4)
    assert metrics["loss/adapter_l2"] == pytest.approx(0.3 * phi.item(), rel=1e-5)
    assert metrics["loss/l2_to_pretrained"] == pytest.approx(0.2 * distance.item(), rel=1e-5)
    terms = [metrics[f"loss/{name}"] for name in ("policy", "kl", "adapter_l2", "l2_to_pretrained")]
    assert metrics["loss"] == pytest.approx(sum(terms))


@pytest.mark.parametrize(("key", "term"), [("l2_to_pretrained", l2_to_pretrained), ("adapter_l2", adapter_l2)])
def test_a_regulariser_holds_the_adapter_the_nearer_the_stronger_it_is(tiny: Path, key: str, term: Any) -> None:
    """Real steps on the same groups, off and at two strengths: what is held is ‖θ − θ_pretrained‖², or ‖φ‖²."""
    found: list[float] = []
    for strength in (0.0, 0.03, 3.0):
        cfg = section(steps=12, lr=1e-2, **{key: strength})
        policy = make_policy(tiny)
        step = LearnerStep(policy, cfg)
        plan = make_plan(make_groups(policy), cfg)
        before = term(policy.model).item()
        logged = [step.run(plan, payloads)[f"loss/{key}"] for _ in range(12)]
        assert logged[0] == pytest.approx(strength * before, rel=1e-5)  # a term of its own, 0 where it is off
        found.append(term(policy.model).item())
    assert found[0] > 1.1 * found[1] > 1.1 * 1.1 * found[2]


def test_an_entropy_bonus_is_that_of_every_token_also_without_signal(tiny: Path) -> None:
    """Against autograd on whole rows of the model's own forward; all rewards alike, so that nothing else is there."""
    policy = make_policy(tiny)
    groups = make_groups(policy)
    cfg = section(entropy_bonus=0.3, aggregation="sequence_mean", micro_batch_tokens=1)
    plan = make_plan(groups, cfg, rewards=np.full((len(groups), 4), 0.5))
    total, count = torch.zeros(()), 0
    for group in groups:
        prompt = encode_prompts(policy, [group.sample])[0]
        for completion in group.completions:
            row = torch.cat([prompt.input_ids, completion.token_ids])[None]
            output = policy.model(input_ids=row, pixel_values=prompt.model_inputs["pixel_values"], use_cache=False)
            logits = output.logits[0, prompt.input_ids.numel() - 1 : -1] / TEMPERATURE
            logits[:, list(policy.image_token_ids)] = float("-inf")
            total = total + torch.distributions.Categorical(logits=logits).entropy().mean()
            count += 1
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    loss = -0.3 * total / count
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    metrics = LearnerStep(policy, cfg).run(plan, payloads)
    assert_close(gradient(policy), expected, 1e-4)
    assert metrics["loss"] == metrics["loss/entropy"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_group_without_signal_is_skipped_but_counts_in_the_denominator(tiny: Path) -> None:
    policy = make_policy(tiny)
    groups = make_groups(policy)
    rewards = make_rewards(groups)
    rewards[1] = 0.5
    cfg = section(aggregation="token_mean", micro_batch_tokens=1)
    expected = truth(policy, groups, cfg, rewards)
    fetched: list[str] = []

    def watching(planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
        fetched.extend(g.sample_id for g in planned)
        return payloads(planned)

    plan = make_plan(groups, cfg, rewards=rewards)
    metrics = LearnerStep(policy, cfg).run(plan, watching)
    assert sorted(fetched) == ["s0", "s2"]
    assert_close(gradient(policy), expected.gradient)
    assert metrics["loss"] == pytest.approx(expected.loss, rel=1e-5)
    # With KL in the loss it has a gradient of its own.
    fetched.clear()
    cfg = section(aggregation="token_mean", kl=KlSection(weight=0.1))
    policy = make_policy(tiny)
    expected = truth(policy, groups, cfg, rewards)
    LearnerStep(policy, cfg).run(make_plan(groups, cfg, rewards=rewards), watching)
    assert sorted(fetched) == ["s0", "s1", "s2"]
    assert_close(gradient(policy), expected.gradient)


@pytest.mark.parametrize(
    ("advantage", "aggregation"),
    [("group", "sequence_mean"), ("leave_one_out", "token_mean"), ("greedy", "constant"), ("none", "sequence_sum")],
)
def test_a_completion_without_a_reward_might_as_well_not_be_there(tiny: Path, advantage: str, aggregation: str) -> None:
    """Loss, gradient and figures are those of plain autograd without it."""
    policy = make_policy(tiny)
    groups = make_groups(policy)
    rewards = make_rewards(groups)
    cfg = section(advantage=advantage, aggregation=aggregation, kl=KlSection(weight=0.1))
    fewer = [replace(g, completions=g.completions[:1] + g.completions[2:]) for g in groups]
    expected = truth(policy, fewer, cfg, np.delete(rewards, 1, axis=1))
    rewards[:, 1] = np.nan
    metrics = LearnerStep(policy, cfg).run(make_plan(groups, cfg, rewards=rewards), payloads)
    assert_close(gradient(policy), expected.gradient)
    assert metrics["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert metrics["tokens/scored"] == metrics["tokens/completion"] == sum(sum(row) - row[1] for row in LENGTHS)


def test_a_step_without_any_signal_still_ends(tiny: Path) -> None:
    policy = make_policy(tiny)
    groups = make_groups(policy)
    before = weights(policy)
    rewards = np.full((len(groups), 4), 0.5)
    metrics = LearnerStep(policy, section()).run(make_plan(groups, section(), rewards=rewards), payloads)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert math.isnan(metrics["entropy"])
    assert torch.equal(weights(policy), before)


@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks_make_the_step_of_one(tiny: Path, size: int) -> None:
    cfg = section(kl=KlSection(weight=0.1), adapter_l2=0.01, l2_to_pretrained=0.01, micro_batch_tokens=1)
    ((alone, metrics),) = run_together(partial(make_policy, tiny), cfg, 1)
    ranks = run_together(partial(make_policy, tiny), cfg, size)  # of 4 ranks one has no group at all
    for policy, others in ranks:
        assert_close(gradient(policy), gradient(alone))
        assert_close(weights(policy), weights(alone), 1e-4)
        for name in set(metrics) - {n for n in metrics if n.startswith("seconds/")}:
            assert others[name] == pytest.approx(metrics[name], rel=1e-4, nan_ok=True), name
    assert torch.equal(weights(ranks[0][0]), weights(ranks[1][0]))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_in_lockstep_make_as_many_passes_as_the_busiest(tiny: Path, size: int) -> None:
    cfg = section(kl=KlSection(weight=0.1), adapter_l2=0.01, micro_batch_tokens=1)
    ((alone, metrics),) = run_together(partial(make_policy, tiny), cfg, 1, steps=1)
    fetched: dict[int, list[str]] = {rank: [] for rank in range(size)}

    def counting(rank: int) -> Any:
        def watching(planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
            fetched[rank].extend(g.sample_id for g in planned)
            return payloads(planned)

        return watching

    changes = {f"payloads{rank}": counting(rank) for rank in range(size)}
    ranks = run_together(partial(make_policy, tiny), cfg, size, steps=1, in_lockstep=True, **changes)
    assert [len(fetched[rank]) for rank in range(size)] == [2 if size == 2 else 1] * size
    for policy, others in ranks:
        assert_close(gradient(policy), gradient(alone))
        for name in ("loss", "loss/policy", "loss/kl", "grad_norm", "tokens/scored", "entropy"):
            assert others[name] == pytest.approx(metrics[name], rel=1e-5), name


@pytest.mark.parametrize("in_lockstep", [False, True])
def test_an_error_on_one_rank_is_raised_on_all(tiny: Path, in_lockstep: bool) -> None:
    def lost(planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
        raise RolloutError("the group is gone")

    for result in run_together(partial(make_policy, tiny), section(), 2, in_lockstep=in_lockstep, payloads1=lost):
        assert isinstance(result, RolloutError)
        assert str(result) == "the group is gone"


@pytest.mark.parametrize("metric", ["loss", "gradient norm"])
def test_nan_stops_before_the_optimiser_moves(tiny: Path, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(tiny)
    groups = make_groups(policy)
    if metric == "loss":
        broken = groups[1].completions[0]
        bad = replace(broken, logprobs=torch.full_like(broken.logprobs, float("nan")))
        groups[1] = replace(groups[1], completions=(bad, *groups[1].completions[1:]))
    else:
        # A finite loss whose gradient is not: what a saturated float does in the backward pass.
        parameter = next(p for p in policy.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda g: g * float("inf"))
    before = weights(policy)
    cfg = section(micro_batch_tokens=1)
    learner = LearnerStep(policy, cfg)
    with pytest.raises(NonFiniteError, match=rf"step 3: {metric} is (nan|inf).* on samples .*s1"):
        learner.run(make_plan(groups, cfg, step=3), payloads)
    assert torch.equal(weights(policy), before)
    assert learner.updates == 0
    assert not any(name.startswith("optimizer/") for name in learner.state().tensors)


def test_the_gradient_is_clipped_by_its_global_norm(tiny: Path) -> None:
    policy = make_policy(tiny)
    groups = make_groups(policy)
    expected = truth(policy, groups, section(), make_rewards(groups)).gradient
    cfg = section(max_grad_norm=float(expected.norm()) / 4)
    metrics = LearnerStep(policy, cfg).run(make_plan(groups, cfg), payloads)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)
    assert_close(gradient(policy), expected / 4)


def test_updates_are_adamws_on_the_cosine_schedule(tiny: Path) -> None:
    cfg = section(lr=1e-2, lr_min=1e-3, warmup_steps=1, weight_decay=0.1, betas=(0.8, 0.9), adapter_l2=0.05)
    policy = make_policy(tiny)
    groups = make_groups(policy)
    learner = LearnerStep(policy, cfg)
    mine = weights(policy).double()
    m, v = torch.zeros_like(mine), torch.zeros_like(mine)
    for step in range(4):
        t = step - 1
        rate = 0.0 if step < 1 else 1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * t / 3))
        metrics = learner.run(make_plan(groups, cfg, step=step), payloads)
        assert metrics["lr"] == pytest.approx(rate)
        g = gradient(policy).double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        bias = math.sqrt(1 - 0.9 ** (step + 1)) / (1 - 0.8 ** (step + 1))
        eps = 1e-8 * math.sqrt(1 - 0.9 ** (step + 1))
        mine = mine * (1 - rate * 0.1) - rate * bias * m / (v.sqrt() + eps)
        assert_close(weights(policy).double(), mine, 1e-5)


def test_steps_are_bitwise_the_same_again(tiny: Path) -> None:
    results = []
    for _ in range(2):
        policy = make_policy(tiny)
        groups = make_groups(policy)
        learner = LearnerStep(policy, section(micro_batch_tokens=64))
        for step in range(2):
            learner.run(make_plan(groups, section(), step=step), payloads)
        results.append(weights(policy))
    assert torch.equal(*results)


def test_the_plan_must_be_for_as_many_ranks(tiny: Path) -> None:
    policy = make_policy(tiny)
    with pytest.raises(LearnerError, match="plan of step 0 is for 2 learners, and there are 1"):
        LearnerStep(policy, section()).run(make_plan(make_groups(policy), section(), world_size=2), payloads)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_micro_batch_that_does_not_fit_is_halved(tiny: Path, passes: int) -> None:
    """Memory runs out late in the backward pass, when most of the gradient has been added to already."""
    cfg = section(passes=passes, kl=KlSection(weight=0.1), adapter_l2=0.01, loss="ppo", advantage="none")
    whole, halved = make_policy(tiny), make_policy(tiny)
    groups = make_groups(whole)
    expected = LearnerStep(whole, cfg).run(make_plan(groups, cfg), payloads)
    taken: list[int] = []

    def fetch(planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
        taken.append(len(planned))
        return payloads(planned)

    def run_out(gradient: torch.Tensor) -> None:
        if taken[-1] > 1:
            raise torch.OutOfMemoryError("planted")

    next(p for p in halved.model.parameters() if p.requires_grad).register_hook(run_out)
    learner = LearnerStep(halved, cfg)
    metrics = learner.run(make_plan(groups, cfg), fetch)
    assert taken == [3, 1, 2, 1, 1] + [1, 1, 1] * (passes - 1)
    assert_close(weights(halved), weights(whole))
    assert metrics["micro_batches/halved"] == 2
    same = {name for name in expected if not name.startswith("seconds/")}
    assert {n: metrics[n] for n in same} == pytest.approx({n: expected[n] for n in same}, rel=1e-4, abs=1e-6)
    taken.clear()
    learner.run(make_plan(groups, cfg, step=1), fetch)
    assert taken == [1, 1, 1] * passes  # it remembers


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("planted"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_one_rank_that_runs_out_of_memory_holds_no_other_up_and_changes_no_gradient(
    tiny: Path, error: RuntimeError
) -> None:
    """The second rank of two, in a step of six groups: the first makes one pass, it four. Then both know."""
    cfg = section(kl=KlSection(weight=0.1))
    lengths = LENGTHS + LENGTHS
    taken: list[list[int]] = [[], []]

    def fetch(rank: int, planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
        taken[rank].append(len(planned))
        return payloads(planned)

    def make(rank: int) -> Policy:
        def run_out(gradient: torch.Tensor) -> None:
            if rank == 1 and taken[rank][-1] > 1:
                raise error

        policy = make_policy(tiny)
        next(p for p in policy.model.parameters() if p.requires_grad).register_hook(run_out)
        return policy

    ranks = iter(range(2))
    changes = {f"payloads{rank}": partial(fetch, rank) for rank in range(2)}
    results = run_together(lambda: make(next(ranks)), cfg, 2, lengths=lengths, **changes)
    ((alone, expected),) = run_together(partial(make_policy, tiny), cfg, 1, lengths=lengths)
    ones = [1, 1, 1]  # of the second step
    for policy, metrics in results:
        assert_close(weights(policy), weights(alone))
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert taken == [[3, *ones], [3, 1, 2, 1, 1, *ones]]


def test_one_group_on_one_rank_that_does_not_fit_ends_the_step_of_all(tiny: Path) -> None:
    def too_large(planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
        raise torch.OutOfMemoryError("planted")

    policy = make_policy(tiny)
    before = weights(policy)
    results = run_together(partial(make_policy, tiny), section(), 2, payloads1=too_large)
    for result in results:
        assert isinstance(result, LearnerError)
        assert "a micro-batch of 1 groups" in str(result)
    assert torch.equal(weights(policy), before)


def test_one_group_that_does_not_fit_ends_the_step(tiny: Path) -> None:
    policy = make_policy(tiny)
    groups = make_groups(policy)
    before = weights(policy)

    def run_out(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("planted")

    next(p for p in policy.model.parameters() if p.requires_grad).register_hook(run_out)
    with pytest.raises(LearnerError, match=r"step 0: a micro-batch of 1 groups, \d+ tokens, does not fit"):
        LearnerStep(policy, section()).run(make_plan(groups, section()), payloads)
    assert torch.equal(weights(policy), before)


def test_a_bfloat16_base_learns_in_float32(tiny: Path) -> None:
    policy = make_policy(tiny)
    groups = make_groups(policy)
    expected = truth(policy, groups, section(), make_rewards(groups))
    half = make_policy(tiny, dtype="bfloat16")
    metrics = LearnerStep(half, section()).run(make_plan(groups, section()), payloads)
    assert {p.dtype for p in half.model.parameters() if p.requires_grad} == {torch.float32}
    assert float(torch.cosine_similarity(gradient(half), expected.gradient, dim=0)) > 0.98
    assert metrics["loss"] == pytest.approx(expected.loss, abs=0.05)


def test_float16_is_refused(tiny: Path) -> None:
    policy = replace(make_policy(tiny), dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"model.dtype=float16"):
        LearnerStep(policy, section())


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"distill", "dpo", "ilql"}))
def test_each_preset_trains_two_steps(tiny: Path, name: str) -> None:
    cfg = LearnerSection(steps=2, lr=1e-3, **PRESETS[name])
    policy = make_policy(tiny, fresh=True)
    groups = make_groups(policy)
    rewards = make_rewards(groups)
    learner = LearnerStep(policy, cfg)
    before = weights(policy)
    best = [(i, int(row.argmax())) for i, row in enumerate(rewards)]

    def chosen() -> float:
        with torch.no_grad():
            found = [reference_logprobs(policy, groups[i], groups[i].completions[j].token_ids) for i, j in best]
        return sum(float(logprobs.sum()) for logprobs in found)

    start = chosen()
    for step in range(2):
        metrics = learner.run(make_plan(groups, cfg, step=step, rewards=rewards), payloads)
        assert all(math.isfinite(metrics[key]) for key in ("loss", "grad_norm", "entropy", "lr"))
        assert metrics["grad_norm"] > 0
    assert learner.updates == 2
    assert not torch.equal(weights(policy), before)
    assert chosen() > start, "the best caption of each group became less likely"


@pytest.mark.parametrize("budget", [10_000, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_is_the_papers_loss_on_whole_rows(tiny: Path, budget: int, smoothing: float) -> None:
    """Each caption scored by itself with plain transformers, against both of a pair on one shared prefix."""
    dpo = DpoSection(beta=0.3, label_smoothing=smoothing)
    cfg = section(loss="dpo", advantage="none", dpo=dpo, micro_batch_tokens=budget)
    policy = make_policy(tiny)
    groups = make_groups(policy, lengths=((3, 6), (8, 2), (4, 4)), noise=1.0)
    labels = np.array([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]])
    losses, correct = [], []
    for group, (p, _) in zip(groups, labels, strict=True):
        a, b = (
            0.3 * (reference_logprobs(policy, group, c.token_ids) - c.reference_logprobs).sum()
            for c in group.completions
        )
        q = p * (1 - smoothing) + (1 - p) * smoothing
        losses.append(-(q * torch.log(torch.sigmoid(a - b)) + (1 - q) * torch.log(torch.sigmoid(b - a))))
        correct.append(float(((a - b) > 0) == (p > 0.5)))
    expected = torch.stack(losses).mean()
    parameters = [each for each in policy.model.parameters() if each.requires_grad]
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
    plan = make_plan(groups, cfg, rewards=labels, staleness=0)
    assert plan.denominator == 3
    metrics = LearnerStep(policy, cfg).run(plan, payloads)
    assert_close(gradient(policy), slopes)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["dpo/accuracy"] == pytest.approx(np.mean(correct))
    assert math.isnan(metrics["kl"])  # stored captions say nothing of it
    assert not any(name.startswith("sampler_gap/") for name in metrics)  # nor were they sampled from this policy


def test_dpo_without_reference_logprobs_is_refused(tiny: Path) -> None:
    cfg = section(loss="dpo", advantage="none")
    policy = make_policy(tiny)
    groups = make_groups(policy, lengths=((3, 6),), reference=False)
    with pytest.raises(LearnerError, match="pairs s0 came without reference log-probs"):
        LearnerStep(policy, cfg).run(make_plan(groups, cfg, rewards=np.array([[1.0, 0.0]])), payloads)
