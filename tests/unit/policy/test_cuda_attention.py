"""Attention of grouped heads as a CUDA GPU is given it, on a CPU: against a softmax written out, and transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy import cuda
from mmrl_ray.policy.cuda import attend_grouped, use_fused_norms, use_grouped_attention
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.load import accelerate
from mmrl_ray.policy.model import Acceleration, Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.packed import checkpoint_layers
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import vision_features
from tests.support.tiny_models import FAMILIES, make_completions, make_samples
from tests.unit.policy.generation.test_decode_families import generated, ids
from tests.unit.policy.scoring.test_prefix import (
    LENGTHS,
    TEMPERATURE,
    gradients,
    oracle_logprobs,
    weighted,
    with_lora,
)

Load = Callable[..., Policy]


@pytest.fixture
def load(load: Load) -> Load:
    """Completions attend to their prompts' keys as they do on a GPU, joined to their own."""

    def joined(*args: Any, **section: Any) -> Policy:
        policy = load(*args, **section)
        policy.acceleration = replace(policy.acceleration, completions=Acceleration().completions)
        return policy

    return joined


ROWS, QUERIES, KEYS, WIDTH = 3, 5, 11, 4


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Queries and keys of what was handed on to transformers' own function."""
    calls: list[tuple[int, ...]] = []
    own = cuda.sdpa_attention_forward

    def noted(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query.shape[2], key.shape[2]))
        return own(module, query, key, *args, **kwargs)

    monkeypatch.setattr(cuda, "sdpa_attention_forward", noted)
    return calls


def numbers(heads: int, groups: int, queries: int = QUERIES) -> list[torch.Tensor]:
    """Queries, keys and values in float64, laid out as projections leave them."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(ROWS, queries, heads, WIDTH), *[(ROWS, KEYS, groups, WIDTH)] * 2]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2) for shape in shapes]
    return [each.requires_grad_() for each in made]


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (6, 1), (4, 4)])
@pytest.mark.parametrize("kind", ["bool", "added", "one for all rows"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_each_head_is_a_softmax_over_what_it_sees_of_its_groups_keys(
    heads: int, groups: int, kind: str, scaling: float | None, handed_on: list[tuple[int, ...]]
) -> None:
    query, key, value = numbers(heads, groups)
    rows = 1 if kind == "one for all rows" else ROWS
    seen = torch.rand(rows, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(6)) < 0.6
    seen[..., 0] = True
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf) if kind == "added" else seen
    mixed, weights = attend_grouped(nn.Identity(), query, key, value, mask, scaling=scaling, dropout=0.0)
    expected = torch.zeros(ROWS, QUERIES, heads, WIDTH, dtype=torch.float64)
    for row in range(ROWS):
        for head in range(heads):
            k, v = (t[row, head * groups // heads] for t in (key, value))
            scores = query[row, head] @ k.T * (WIDTH**-0.5 if scaling is None else scaling)
            exps = scores.exp() * seen[row if rows > 1 else 0, 0]
            expected[row, :, head] = exps / exps.sum(dim=1, keepdim=True) @ v
    assert weights is None
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-13)
    direction = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    mine = torch.autograd.grad((mixed * direction).sum(), [query, key, value])
    theirs = torch.autograd.grad((expected * direction).sum(), [query, key, value])
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    assert handed_on == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_sees_nothing_makes_no_nan(dtype: torch.dtype) -> None:
    query, key, value = (t.detach().to(dtype).requires_grad_() for t in numbers(8, 2))
    seen = torch.ones(ROWS, 1, QUERIES, KEYS, dtype=torch.bool)
    seen[1, :, :2] = False
    mixed, _ = attend_grouped(nn.Identity(), query, key, value, seen)
    mixed[:, 2:].float().sum().backward()
    assert all(bool(t.isfinite().all()) for t in (mixed, query.grad, key.grad, value.grad) if t is not None)


@pytest.mark.parametrize("why", ["no mask", "a mask a head", "a bias"])
def test_everything_else_is_handed_on(why: str, handed_on: list[tuple[int, ...]]) -> None:
    query, key, value = numbers(4, 4)
    mask = {"a mask a head": torch.rand(ROWS, 4, QUERIES, KEYS) < 0.7}.get(why)
    more = {"position_bias": torch.randn(ROWS, 4, QUERIES, KEYS, dtype=torch.float64)} if why == "a bias" else {}
    module = nn.Identity()
    attend_grouped(module, query, key, value, mask, is_causal=False, **more)
    assert handed_on == [(QUERIES, KEYS)]


def in_float64(policy: Policy) -> Policy:
    policy.model.double()
    policy.dtype = torch.float64
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_gives_what_eager_attention_gives(family: str, load: Load, handed_on: list[tuple[int, ...]]) -> None:
    """The model itself on one row at a time, in float64 but for its softmax, which eager attention makes in float32."""
    eager = in_float64(with_lora(load(family, attn_implementation="eager")))
    policy = in_float64(with_lora(load(family)))
    use_grouped_attention(policy.hf_model)
    prompts = encode_prompts(policy, make_samples())
    completions = make_completions(policy, LENGTHS)
    rows = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    expected = torch.cat([oracle_logprobs(family, eager, prompt, completion) for prompt, completion in rows])
    expected_gradients = gradients(eager, weighted([expected]))
    features = vision_features(policy, prompts)
    handed_on.clear()
    for path in ("shared_prefix", "packed", "checkpointed"):
        if path == "checkpointed":
            checkpoint_layers(policy)
        way: Any = "packed" if path == "checkpointed" else path
        scores = score_completions(policy, prompts, features, completions, TEMPERATURE, path=way)
        got = scores.logprobs[scores.mask].double()
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        for name, gradient in gradients(policy, weighted([got])).items():
            assert (gradient - expected_gradients[name]).norm() <= 3e-6 * expected_gradients[name].norm(), (path, name)
    assert handed_on == [], "a masked pass of the language model was not folded"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rows_stay_what_generate_gives(family: str, load: Load, handed_on: list[tuple[int, ...]]) -> None:
    """Packed and not; `generate` itself goes on, with the function in the model's config."""
    policy = load(family)
    prompts = encode_prompts(policy, make_samples())
    expected = [generated(policy, prompt) for prompt in prompts]
    use_grouped_attention(policy.hf_model)
    assert [generated(policy, prompt) for prompt in prompts] == expected
    handed_on.clear()
    greedy = SamplingParams(max_new_tokens=9, greedy=True)
    for packed in (None, False):
        outs = decode_groups(Decoder(policy, packed=packed), [DecodeRequest(p, 2, greedy) for p in prompts])
        assert [[ids(c) for c in out.completions] for out in outs] == [[row] * 2 for row in expected]
    assert all(queries > 1 for queries, _ in handed_on), "a decode step was not folded"


def saved_bytes(policy: Policy, path: Any) -> int:
    """What a learner's forward keeps for its backward, without the weights."""
    prompts = encode_prompts(policy, make_samples())
    features = vision_features(policy, prompts)
    completions = make_completions(policy, [(9,) * 8] * len(prompts))
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = score_completions(policy, prompts, features, completions, TEMPERATURE, path=path)
    scores.logprobs.sum().backward()
    return sum(storages.values())


def test_no_repeated_keys_wait_for_the_backward_pass(load: Load) -> None:
    policy = with_lora(load("qwen2_5_vl"))
    before = saved_bytes(policy, "shared_prefix")
    use_grouped_attention(policy.hf_model)
    after = saved_bytes(policy, "shared_prefix")
    config = policy.hf_model.config.get_text_config()
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    prompts = encode_prompts(policy, make_samples())
    width = config.hidden_size // heads
    keys = 8 * len(prompts) * (max(p.input_ids.numel() for p in prompts) + 8)
    repeated = 4 * 2 * config.num_hidden_layers * keys * (heads - groups) * width
    assert before - after > 0.6 * repeated, f"{before} bytes, then {after}; the repeated keys alone are {repeated}"


def test_all_layers_of_a_pass_read_one_mask(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load("qwen2_5_vl")
    use_grouped_attention(policy.hf_model)
    masks: list[torch.Tensor] = []
    own = cuda.scaled_dot_product_attention

    def noted(*args: Any, attn_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return own(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(cuda, "scaled_dot_product_attention", noted)
    prompts = encode_prompts(policy, make_samples())
    completions = make_completions(policy, LENGTHS)
    score_completions(policy, prompts, vision_features(policy, prompts), completions, TEMPERATURE)
    layers = policy.hf_model.config.get_text_config().num_hidden_layers
    assert len(masks) == 2 * layers
    assert len({mask.data_ptr() for mask in masks}) == 2
    assert all(stride % 16 == 0 for mask in masks for stride in mask.stride()[:-1]), "the kernel would copy it"


@pytest.fixture
def cudnn() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_model_on_a_gpu_gets_it_without_cudnns_plans_and_on_a_cpu_does_not(load: Load, cudnn: None) -> None:
    policy = load("qwen2_5_vl")
    config = policy.hf_model.config
    assert config.get_text_config()._attn_implementation == "sdpa"
    assert torch.backends.cuda.cudnn_sdp_enabled()
    accelerate(policy.hf_model, torch.device("cuda"))
    assert config.get_text_config()._attn_implementation == cuda._GROUPED
    assert config.vision_config._attn_implementation == cuda._WITHIN
    assert policy.attention == "sdpa"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_other_attention_stays(load: Load) -> None:
    policy = load(attn_implementation="eager")
    use_grouped_attention(policy.hf_model)
    assert policy.hf_model.config.get_text_config()._attn_implementation == policy.attention == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_one_kernel_is_the_same_norm(dtype: torch.dtype, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in bfloat16 as near to the norm in float64 as transformers' own; autocast does not make it float32."""
    policy = load("qwen2_5_vl", dtype=str(dtype).removeprefix("torch."))
    [norm] = [m for name, m in policy.hf_model.named_modules() if name.endswith("language_model.norm")]
    generator = torch.Generator().manual_seed(2)
    norm.weight.data += 0.3 * torch.randn(norm.weight.shape, generator=generator).to(dtype)
    x = (5 * torch.randn(64, norm.weight.numel(), generator=generator)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = norm.weight.double() * wide / (wide.pow(2).mean(dim=-1, keepdim=True) + norm.variance_epsilon).sqrt()
    before = (norm(x).double() - exact).norm()
    use_fused_norms(policy.hf_model)
    own, autocast = cuda.rms_norm, []

    def noted(*args: Any) -> torch.Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return own(*args)

    monkeypatch.setattr(cuda, "rms_norm", noted)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(x)
    assert autocast == [False]
    assert got.dtype == dtype
    assert (got.double() - exact).norm() <= 1.05 * before + 1e-6 * exact.norm()
    got.float().pow(2).sum().backward()
    exact.pow(2).sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert (x.grad.double() - wide.grad).norm() <= (0.02 if dtype is torch.bfloat16 else 1e-5) * wide.grad.norm()


def test_norms_that_are_written_otherwise_stay(load: Load) -> None:
    policy = load("gemma3")
    use_fused_norms(policy.hf_model)
    assert not any("forward" in vars(module) for module in policy.hf_model.modules())
