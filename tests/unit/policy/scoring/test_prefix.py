"""The shared prefix against the model itself, one completion a call, with the model's own positions and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.model import Acceleration, Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring import prefix
from mmrl_ray.policy.scoring.prefix import encode_prefix, score_completions, select_cache
from mmrl_ray.policy.vision import VisionCache, vision_features
from tests.support.tiny_models import FAMILIES, image_bytes, make_completions, make_samples

Load = Callable[..., Policy]

TEMPERATURE = 0.7
TOLERANCE = 1e-5
LENGTHS = ((3, 9, 1), (5,), (2, 7))
ORACLE_TYPES = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}


def oracle_logprobs(family: str, policy: Policy, prompt: EncodedPrompt, completion: torch.Tensor) -> torch.Tensor:
    """float64 [T]: the Hugging Face model called on one unpadded row, in one pass, without a cache."""
    length = prompt.input_ids.numel()
    row = torch.cat([prompt.input_ids, completion])[None]
    inputs = {k: v for k, v in prompt.model_inputs.items() if k not in ("token_type_ids", "mm_token_type_ids")}
    if family in ORACLE_TYPES:
        name = ORACLE_TYPES[family]
        inputs[name] = torch.cat([prompt.model_inputs[name], torch.zeros_like(completion)])[None]
    output = policy.model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **inputs)
    logits = output.logits[0, length - 1 : -1].double() / TEMPERATURE
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[list(policy.image_token_ids)] = False
    weights = logits.exp() * allowed
    return torch.log(weights.gather(1, completion[:, None])[:, 0] / weights.sum(dim=1))


def with_lora(policy: Policy) -> Policy:
    """LoRA on every linear layer of the language model, with weights that do something."""
    decoder = next(name for name, module in policy.hf_model.named_modules() if module is policy.decoder)
    linear = [name for name, module in policy.decoder.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=4, target_modules=[f"{decoder}.{name}" for name in linear], init_lora_weights=False)
    torch.manual_seed(0)
    policy.model = get_peft_model(policy.hf_model, config).eval()
    return policy


def gradients(policy: Policy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def weighted(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """A loss in which every token of every completion has another weight, of either sign."""
    return sum(((-1) ** i * (v * torch.linspace(0.3, 1.7, v.numel())).sum() for i, v in enumerate(values)))  # type: ignore[return-value]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_lora_gradients_equal_the_models_own(family: str, load: Load) -> None:
    policy = with_lora(load(family))
    prompts = encode_prompts(policy, make_samples())
    completions = make_completions(policy, LENGTHS)
    expected = [
        oracle_logprobs(family, policy, prompt, completion)
        for prompt, group in zip(prompts, completions, strict=True)
        for completion in group
    ]
    expected_gradients = gradients(policy, weighted(expected))
    assert len({prompt.input_ids.numel() for prompt in prompts}) > 1, "no prompt is padded"

    features = vision_features(policy, prompts)
    for name, path, given in (
        ("shared prefix, features", "shared_prefix", features),
        ("shared prefix, pixels", "shared_prefix", None),
        ("packed, features", "packed", features),
        ("packed, pixels", "packed", None),
        ("naive, features", "naive", features),
    ):
        scores = score_completions(policy, prompts, given, completions, TEMPERATURE, path=path)
        got = [row[mask] for row, mask in zip(scores.logprobs, scores.mask, strict=True)]
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=TOLERANCE, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        mine_gradients = gradients(policy, weighted(got))
        for parameter, theirs in expected_gradients.items():
            distance = (mine_gradients[parameter] - theirs).norm() / theirs.norm()
            assert theirs.norm() > 0
            assert distance <= TOLERANCE, f"{name}: gradient of {parameter} is off by {distance:.2e}"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_eager_attention_gives_the_same(family: str, load: Load) -> None:
    policy = load(family, attn_implementation="eager")
    prompts = encode_prompts(policy, make_samples())
    completions = make_completions(policy, LENGTHS)
    scores = score_completions(policy, prompts, vision_features(policy, prompts), completions, TEMPERATURE)
    flat = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    for row, mask, (prompt, completion) in zip(scores.logprobs, scores.mask, flat, strict=True):
        expected = oracle_logprobs(family, policy, prompt, completion)
        torch.testing.assert_close(row[mask].double(), expected, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_a_sample(family: str, load: Load) -> None:
    policy = load(family)
    [sample] = make_samples([(64, 64)])
    pair = type(sample)(
        id="pair", images=(image_bytes(64, 64, seed=7), image_bytes(96, 32, seed=8)), prompt=sample.prompt
    )
    prompts = encode_prompts(policy, [pair, sample])
    completions = make_completions(policy, [(4, 2), (3,)])
    scores = score_completions(policy, prompts, vision_features(policy, prompts), completions, TEMPERATURE)
    expected = oracle_logprobs(family, policy, prompts[0], completions[0][0])
    torch.testing.assert_close(scores.logprobs[0, :4].double(), expected, rtol=TOLERANCE, atol=0)


def test_completions_of_one_token_need_no_second_pass(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples())
    completions = make_completions(policy, [(1, 1), (1,), (1,)])
    scores = score_completions(policy, prompts, vision_features(policy, prompts), completions, TEMPERATURE)
    assert scores.logprobs.shape == (4, 1)
    expected = oracle_logprobs("llava", policy, prompts[0], completions[0][1])
    torch.testing.assert_close(scores.logprobs[1].double(), expected, rtol=TOLERANCE, atol=0)


def test_positions_left_behind_by_generate_do_no_harm(load: Load) -> None:
    """Qwen-VL keeps the last batch's position offsets on the model."""
    policy = load("qwen2_5_vl")
    prompts = encode_prompts(policy, make_samples())
    completions = make_completions(policy, LENGTHS)
    features = vision_features(policy, prompts)
    before = score_completions(policy, prompts, features, completions, TEMPERATURE)
    other = prompts[2]
    inputs = {k: v[None] if k == "mm_token_type_ids" else v for k, v in other.model_inputs.items()}
    policy.model.generate(input_ids=other.input_ids[None], **inputs, max_new_tokens=3, do_sample=False)
    assert policy.core.rope_deltas is not None
    after = score_completions(policy, prompts, features, completions, TEMPERATURE)
    assert torch.equal(before.logprobs, after.logprobs)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_prefix_is_not_changed_by_what_is_decoded_from_it(family: str, load: Load) -> None:
    policy = load(family)
    prompts = encode_prompts(policy, make_samples())
    prefix = encode_prefix(policy, prompts, vision_features(policy, prompts))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.cache.layers]
    chosen = prefix.select(torch.tensor([2, 0, 0]))
    step = policy.core(
        input_ids=torch.tensor([[30], [31], [32]]),
        attention_mask=torch.cat([chosen.attention_mask, torch.ones(3, 1, dtype=torch.int64)], dim=1),
        position_ids=chosen.next_position[:, None],
        past_key_values=chosen.cache,
        use_cache=True,
    )
    assert step.past_key_values.get_seq_length() == prefix.attention_mask.shape[1] + 1
    assert prefix.cache.get_seq_length() == prefix.attention_mask.shape[1]
    for layer, (keys, values) in zip(prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_prefix_logits_predict_the_first_token(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples())
    prefix = encode_prefix(policy, prompts, vision_features(policy, prompts))
    assert prefix.next_position.tolist() == [prompt.input_ids.numel() for prompt in prompts]
    [[completion]] = make_completions(policy, [(1,)])
    expected = oracle_logprobs("llava", policy, prompts[1], completion)
    allowed = [i for i in range(policy.vocab_size) if i not in policy.image_token_ids]
    logprobs = (prefix.logits[1].double() / TEMPERATURE)[allowed].log_softmax(0)
    torch.testing.assert_close(logprobs[allowed.index(int(completion))], expected[0], rtol=TOLERANCE, atol=0)


def test_selected_caches_take_gradients_back_to_the_prefix(load: Load) -> None:
    policy = with_lora(load())
    prompts = encode_prompts(policy, make_samples())
    prefix = encode_prefix(policy, prompts, vision_features(policy, prompts))
    chosen = select_cache(prefix.cache, torch.tensor([0, 0, 1]))
    summed = sum(layer.values.sum() for layer in chosen.layers)
    assert any(g is not None and g.norm() > 0 for g in torch.autograd.grad(
        summed, [p for p in policy.model.parameters() if p.requires_grad], allow_unused=True
    ))  # fmt: skip


def test_scores_do_not_depend_on_the_neighbours(load: Load) -> None:
    policy = load("qwen3_vl")
    prompts = encode_prompts(policy, make_samples())
    completions = make_completions(policy, LENGTHS)
    features = vision_features(policy, prompts, VisionCache(1 << 20))
    together = score_completions(policy, prompts, features, completions, TEMPERATURE)
    alone = score_completions(policy, prompts[2:], features[2:], completions[2:], TEMPERATURE)
    torch.testing.assert_close(together.logprobs[4:, :7], alone.logprobs, rtol=TOLERANCE, atol=0)
    assert together.mask[4].tolist() == [True] * 2 + [False] * 7
    assert not together.logprobs[~together.mask].any()


def test_entropy_is_that_of_the_sampling_distribution(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples()[:1])
    [[completion]] = completions = make_completions(policy, [(4,)])
    features = vision_features(policy, prompts)
    scores = score_completions(policy, prompts, features, completions, TEMPERATURE, entropy=True)
    row = torch.cat([prompts[0].input_ids, completion])[None]
    logits = policy.model(input_ids=row, pixel_values=prompts[0].model_inputs["pixel_values"]).logits[0, -5:-1]
    allowed = [i for i in range(policy.vocab_size) if i not in policy.image_token_ids]
    probabilities = (logits[:, allowed].double() / TEMPERATURE).softmax(-1)
    expected = -(probabilities * probabilities.log()).sum(-1)
    assert scores.entropies is not None
    torch.testing.assert_close(scores.entropies[0].double(), expected, rtol=TOLERANCE, atol=0)


def test_refuses_what_does_not_fit_together(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples()[:2])
    completions = make_completions(policy, [(2,), (2,)])
    features = vision_features(policy, prompts)
    with pytest.raises(ValueError, match="2 prompts, 1 features and 2 groups"):
        score_completions(policy, prompts, features[:1], completions, 1.0)
    with pytest.raises(ValueError, match="no completion"):
        score_completions(policy, prompts, features, [[], []], 1.0)
    with pytest.raises(ValueError, match="path='fast' is none of"):
        score_completions(policy, prompts, features, completions, 1.0, path="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_copied_once_a_completion_give_what_selecting_and_appending_them_gives(
    family: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, gradients too; and no key is selected where all groups are of one size."""
    policy = with_lora(load(family))
    policy.acceleration = Acceleration()  # the CPU's attention wants them apart
    prompts = encode_prompts(policy, make_samples()[:2])
    completions = make_completions(policy, ((3, 9, 1), (4, 2, 9)))
    selected: list[int] = []
    select = prefix.select_cache

    def noted(cache: Cache, indices: torch.Tensor) -> Cache:
        selected.append(len(indices))
        return select(cache, indices)

    monkeypatch.setattr(prefix, "select_cache", noted)

    def scored() -> list[torch.Tensor]:
        policy.model.zero_grad()
        features = vision_features(policy, prompts)
        logprobs = score_completions(policy, prompts, features, completions, TEMPERATURE).logprobs
        logprobs.square().sum().backward()
        return [logprobs.detach(), *(p.grad.clone() for p in policy.model.parameters() if p.grad is not None)]

    once = scored()
    keeps_all = all(type(layer) is DynamicLayer for layer in encode_prefix(policy, prompts, None).cache.layers)
    assert selected == ([] if keeps_all else [6])
    monkeypatch.setattr(prefix, "_repeated", lambda cache, index, prompt_of, apart: select(cache, prompt_of))
    for found, expected in zip(once, scored(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
