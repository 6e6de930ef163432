"""Distillation against NumPy in float64, the law that its sampled gradient obeys, and the teacher's own forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mmrl_ray.algorithms.distill import DistillSection, token_advantages
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.load import parse_config
from mmrl_ray.config.sections import LoraSection, ModelSection, TeacherSection
from mmrl_ray.errors import ConfigError, LearnerError, ModelError
from mmrl_ray.experience.carriers import RolloutGroup
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.policy.load import load_policy, load_skeleton
from mmrl_ray.policy.lora.adapter import add_adapter, save_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.rollouts.teacher import Teacher, refuse_other_tokens
from tests.unit.learner.worlds import (
    TEMPERATURE,
    gradient,
    make_groups,
    make_plan,
    make_policy,
    make_rewards,
    payloads,
    reference_logprobs,
)
from tests.unit.learner.worlds import WORDS as VOCABULARY


def section(**keys: Any) -> LearnerSection:
    own = {name: keys.pop(name) for name in ("signal", "weight", "reward_weight") if name in keys}
    base = {"steps": 4, "lr": 1e-2, "max_grad_norm": 1e9, "loss": "distill", "aggregation": "sequence_mean"}
    return LearnerSection(**{**base, **keys}, distill=DistillSection(**own))


def test_the_sampled_gradient_is_that_of_the_reverse_kl_in_the_mean() -> None:
    """Σ_y p(y) · A(y) · ∂ log p(y)/∂z against central differences of −KL(p ‖ q), over a vocabulary of five."""
    rng = np.random.default_rng(0)
    z, q = rng.normal(size=5), rng.dirichlet(np.ones(5))

    def softmax(logits: np.ndarray) -> np.ndarray:
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def kl(logits: np.ndarray) -> float:
        p = softmax(logits)
        return float((p * (np.log(p) - np.log(q))).sum())

    p = softmax(z)
    student, teacher = torch.tensor(np.log(p))[None], torch.tensor(np.log(q))[None]
    advantages = token_advantages(torch.zeros(1, dtype=torch.float64), student, teacher, 1.0).numpy()[0]
    mean = sum(p[y] * advantages[y] * (np.eye(5)[y] - p) for y in range(5))
    step = 1e-6 * np.eye(5)
    expected = np.array([(kl(z + each) - kl(z - each)) / 2e-6 for each in step])
    np.testing.assert_allclose(mean, -expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("signal", ["reward", "loss"])
@pytest.mark.parametrize(("weight", "reward_weight"), [(0.7, 0.0), (0.7, 2.0)])
def test_loss_and_gradient_are_those_of_the_formulas(
    tiny: Path, signal: Literal["reward", "loss"], weight: float, reward_weight: float
) -> None:
    """Coefficients of ∂ log π in float64 NumPy, put through the model's own forward on whole rows."""
    cfg = section(signal=signal, weight=weight, reward_weight=reward_weight, off_policy_cap=1.1, advantage_std=False)
    policy = make_policy(tiny)
    groups = make_groups(policy, noise=0.2)
    rewards = make_rewards(groups)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    count = sum(len(group.completions) for group in groups)
    loss, kl, tokens, outputs, coefficients = 0.0, 0.0, 0, [], []
    for i, group in enumerate(groups):
        for j, completion in enumerate(group.completions):
            output = reference_logprobs(policy, group, completion.token_ids)
            theta = output.detach().double().numpy()
            assert completion.reference_logprobs is not None
            teacher, mu = (t.double().numpy() for t in (completion.reference_logprobs, completion.logprobs))
            d = theta - teacher
            earned = reward_weight * centred[i, j]
            advantage = earned - weight * d if signal == "reward" else earned + 0 * d
            behaviour = np.minimum(np.exp(theta - mu), 1.1)
            slope = -advantage * behaviour
            value = -advantage * behaviour  # the ratio is 1
            if signal == "loss":
                slope, value = slope + weight * d, value + weight * 0.5 * d**2
            scale = 1.0 / (len(theta) * count)
            loss += scale * value.sum()
            kl += d.sum()
            tokens += len(theta)
            outputs.append(output)
            coefficients.append(torch.tensor(scale * slope, dtype=torch.float32))
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(outputs, parameters, grad_outputs=coefficients)])
    metrics = LearnerStep(policy, cfg).run(make_plan(groups, cfg, rewards=rewards), payloads)
    assert torch.allclose(gradient(policy), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert metrics["distill/reverse_kl"] == pytest.approx(kl / tokens, rel=1e-4)


def test_without_a_spread_of_rewards_it_learns_and_without_a_teacher_it_stops(tiny: Path) -> None:
    policy = make_policy(tiny)
    groups = make_groups(policy)
    flat = np.full((len(groups), 4), 0.5)
    cfg = section()
    assert LearnerStep(policy, cfg).run(make_plan(groups, cfg, rewards=flat), payloads)["grad_norm"] > 0
    bare = make_groups(policy, reference=False)
    with pytest.raises(LearnerError, match="without a teacher's log-probs"):
        LearnerStep(policy, cfg).run(make_plan(bare, cfg), payloads)


def test_steps_bring_the_student_nearer_to_its_teacher(tiny: Path, tmp_path: Path) -> None:
    """Fixed captions of the student's, scored again by both: the gap closes where the teacher likes them less."""
    teacher = Teacher(TeacherSection(path=str(larger(tmp_path)), dtype="float32"), device="cpu")
    policy = make_policy(tiny, fresh=True)
    groups = make_groups(policy)
    scored = teacher.logprobs([g.sample for g in groups], [[c.token_ids for c in g.completions] for g in groups], 1.0)
    groups = [with_reference(group, rows) for group, rows in zip(groups, scored, strict=True)]
    cfg = section(signal="loss", lr=3e-2, steps=30)
    learner = LearnerStep(policy, cfg)
    gaps = [learner.run(make_plan(groups, cfg, step=0), payloads)["loss/policy"] for _ in range(30)]
    assert gaps[-1] < 0.8 * gaps[0]


# -- the teacher -------------------------------------------------------------------------------------------------------


def larger(folder: Path, *, vocabulary: Any = VOCABULARY, name: str = "teacher") -> Path:
    """Other weights, another width, and pictures of another size, which are more tokens of the prompt."""
    return build_tiny_llava(
        folder / name,
        vocabulary=vocabulary,
        image_size=24,
        patch_size=8,
        hidden=48,
        layers=2,
        heads=4,
        vision_hidden=32,
        vision_layers=1,
        vision_heads=2,
        context_length=96,
        seed=7,
    )


def with_reference(group: RolloutGroup, rows: Any) -> RolloutGroup:
    completions = zip(group.completions, rows, strict=True)
    return replace(group, completions=tuple(replace(c, reference_logprobs=row) for c, row in completions))


def own_logprobs(policy: Policy, group: RolloutGroup) -> list[torch.Tensor]:
    with torch.no_grad():
        return [reference_logprobs(policy, group, c.token_ids) for c in group.completions]


def test_a_teacher_reads_its_own_picture_and_the_students_tokens(tiny: Path, tmp_path: Path) -> None:
    folder = larger(tmp_path)
    student, plain = make_policy(tiny), load_policy(ModelSection(path=str(folder), dtype="float32"), device="cpu")
    refuse_other_tokens(student, plain)
    groups = make_groups(student)
    broken = replace(groups[0].sample, images=(b"no picture",))
    samples = [groups[0].sample, broken, groups[1].sample]
    tokens = [[c.token_ids for c in group.completions] for group in (groups[0], groups[0], groups[1])]
    # With an adapter that does something, merged.
    add_adapter(plain, LoraSection(r=2), seed=1)
    with torch.no_grad():
        for weight in plain.model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    save_adapter(plain.model, tmp_path / "adapter")
    for adapter in (None, str(tmp_path / "adapter")):
        teacher = Teacher(TeacherSection(path=str(folder), dtype="float32", adapter=adapter), device="cpu")
        first, reason, last = teacher.logprobs(samples, tokens, TEMPERATURE)
        assert isinstance(reason, str)
        assert "the teacher cannot read it: ImageError" in reason
        judge = plain if adapter else load_policy(ModelSection(path=str(folder), dtype="float32"), device="cpu")
        for found, group in ((first, groups[0]), (last, groups[1])):
            for row, expected in zip(found, own_logprobs(judge, group), strict=True):
                assert torch.allclose(row, expected, atol=1e-4)


def test_a_teacher_with_another_vocabulary_is_refused(tiny: Path, tmp_path: Path) -> None:
    student = load_skeleton(ModelSection(path=str(tiny)))
    words = [*list(VOCABULARY)[:-1], "zebra"]
    other = load_skeleton(ModelSection(path=str(larger(tmp_path, vocabulary=words))))
    with pytest.raises(
        ModelError, match=r"teacher .* cannot score .*: its vocabulary .* \('w23' is None there and \d+ here"
    ):
        refuse_other_tokens(student, other)
    same = load_skeleton(ModelSection(path=str(larger(tmp_path, name="same"))))
    refuse_other_tokens(student, same)
    # Rows of the head that no token has, as Qwen2.5-VL-7B has more of than its smaller ones.
    text = same.hf_model.config.get_text_config()
    text.vocab_size += 128
    refuse_other_tokens(student, same)
    text.vocab_size -= 129
    with pytest.raises(ModelError, match=r"it has logits for \d+ tokens, and the student may say any of"):
        refuse_other_tokens(student, same)
    text.vocab_size += 1
    with pytest.raises(ModelError, match="its answers end with"):
        refuse_other_tokens(student, replace(same, end_id=student.pad_token_id))
    with pytest.raises(ModelError, match=r"it never says .*, which the student may"):
        refuse_other_tokens(replace(student, image_token_ids=()), same)


CONFIG = """
run: {name: demo}
model: {path: org/student}
data: {train: data/train}
algorithm: distill
teacher: {path: org/teacher}
learner: {steps: 10}
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null"], "learner.loss=distill needs teacher"),
        (["algorithm=grpo"], "teacher: is read by learner.loss=distill alone"),
        (["learner.kl.weight=0.1"], "kl.weight=0.1 is refused with loss=distill"),
        (["teacher.path=builtin:tiny-llava"], "a built-in model, which nothing was taught"),
        (["teacher.paht=x"], "did you mean `path`?"),
    ],
)
def test_what_a_config_may_not_say(overrides: list[str], message: str) -> None:
    parse_config(CONFIG, "c.yaml")
    with pytest.raises(ConfigError) as caught:
        parse_config(CONFIG, "c.yaml", overrides)
    assert message in str(caught.value)
