"""Quantised bases on the CPU: against weights dequantised by hand, plain PEFT, and what is really held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import linear
from transformers import AutoModelForImageTextToText

from mmrl_ray.config.policy import LoraSection, QuantizationSection
from mmrl_ray.errors import ConfigError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.learner.checkpoints import save_adapter
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.load import load_policy, load_skeleton
from mmrl_ray.policy.lora.adapter import adapter_parameters, adapter_state, add_adapter, reference_policy
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.memory import model_shape
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import compare
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.quantized import held_bytes, is_quantized, quantized_layers
from mmrl_ray.policy.scoring.prefix import score_completions
from tests.support.tiny_models import build_family, make_samples, section_of

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "bitsandbytes-4bit"},
    "fp4": {"kind": "bitsandbytes-4bit", "quant_type": "fp4", "double_quant": False},
    "int8": {"kind": "bitsandbytes-8bit"},
    "torchao": {"kind": "torchao-int8"},
}
NF4 = [  # Dettmers et al. 2023, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def section(name: str) -> QuantizationSection:
    found = QuantizationSection(**KINDS[name])
    if find_spec(found.library) is None:
        pytest.skip(f"{found.library} is not installed: pip install 'mmrl_ray[{found.library}]'")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build_family("smolvlm", tmp_path_factory.mktemp("base"))
    torch.set_num_threads(threads)


def felt(policy: Policy, lora: LoraSection | None = None) -> Policy:
    add_adapter(policy, lora or LoraSection(r=4), seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def numbers(layer: Any) -> torch.Tensor:
    """A layer's weight, by the definition of its kind alone."""
    weight = layer.weight
    if hasattr(weight, "qdata"):
        return weight.qdata.float() * weight.scale
    if weight.dtype == torch.int8:
        scale = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return weight.data.float() * scale[:, None] / 127
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = state.state2.code[absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(absmax)]
        absmax = absmax + state.offset
    table = torch.tensor(NF4) if state.quant_type == "nf4" else state.code
    flat = weight.data.flatten()
    values = table[torch.stack([flat >> 4, flat & 15], 1).flatten().long()]
    return (values * absmax.repeat_interleave(64)[: len(values)]).view(state.shape)


@pytest.mark.parametrize("name", KINDS)
def test_a_product_is_that_of_the_kept_numbers_in_every_pass(name: str, folder: Path) -> None:
    policy = load_policy(section_of("smolvlm", folder, quantization=section(name)), device="cpu")
    layers = {n: m for n, m in policy.hf_model.named_modules() if is_quantized(m)}
    skeleton = load_skeleton(section_of("smolvlm", folder))
    assert list(layers) == quantized_layers(skeleton.hf_model, section(name))
    assert all("text_model" in n for n in layers)  # neither tower nor connector nor head
    assert {n.rsplit(".", 1)[-1] for n in layers} >= {"q_proj", "o_proj", "up_proj", "down_proj"}
    original = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for n, layer in layers.items():
        weight = numbers(layer)
        assert (weight - original.get_submodule(n).weight).abs().max() < 0.2 * weight.abs().max()
        x = torch.randn(3, 5, weight.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
        x.data[0, 0, 0] = 40.0  # an outlier, which changes no other row
        expected = linear(x.detach(), weight, layer.bias)
        given = layer(x)
        grad = torch.ones_like(given)
        given.backward(grad)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), given, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(layer.eval()(x[1:2, :1]), given[1:2, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_estimate_is_what_is_held(name: str, folder: Path) -> None:
    kept = section(name)
    cfg = section_of("smolvlm", folder, dtype="bfloat16", quantization=kept)
    skeleton, policy = load_skeleton(cfg), load_policy(cfg, device="cpu")
    planned = model_shape(skeleton.hf_model, LoraSection(), torch.bfloat16, kept)
    held = held_bytes(policy.hf_model)
    assert planned.weight_bytes == pytest.approx(held, rel=0.01)
    loaded = model_shape(policy.hf_model, LoraSection(), torch.bfloat16)
    assert (loaded.parameters, loaded.adapted_parameters, loaded.dequantized_bytes) == (
        *(planned.parameters, planned.adapted_parameters, planned.dequantized_bytes),
    )
    plain = model_shape(skeleton.hf_model, LoraSection(), torch.bfloat16)
    assert held < plain.weight_bytes


@pytest.mark.parametrize("name", KINDS)
def test_sampler_learner_and_plain_peft_are_one_policy(name: str, folder: Path, tmp_path: Path) -> None:
    policy = felt(load_policy(section_of("smolvlm", folder, quantization=section(name)), device="cpu"))
    prompts = encode_prompts(policy, make_samples())
    comparison = compare(policy, prompts, others=("packed",))
    assert comparison.troubles == ()
    assert comparison.largest_gap < 2e-5
    versions = VersionedPolicy(policy)
    versions.load(0, None)
    sampling = SamplingParams(max_new_tokens=6, seed=3)
    with versions.merged():
        outputs = decode_groups(Decoder(policy), [DecodeRequest(prompt, 2, sampling) for prompt in prompts])
    tokens = [[c.token_ids for c in output.completions] for output in outputs]
    recorded = torch.cat([c.logprobs for output in outputs for c in output.completions])
    with torch.no_grad():
        scores = score_completions(policy, prompts, None, tokens, 1.0, path="shared_prefix")
        assert (torch.exp(scores.logprobs[scores.mask] - recorded) - 1).abs().max() < 1e-5
        # PEFT by itself, on a model whose weights are the kept numbers.
        save_adapter(policy.model, tmp_path)
        plain = load_policy(section_of("smolvlm", folder), device="cpu")
        for n, layer in policy.hf_model.named_modules():
            if is_quantized(getattr(layer, "base_layer", layer)) and n.endswith("_proj"):
                plain.hf_model.get_submodule(n).weight.copy_(numbers(layer.base_layer))
        bare = score_completions(plain, prompts, None, tokens, 1.0, path="naive")
        with reference_policy(policy.model):
            off = score_completions(policy, prompts, None, tokens, 1.0, path="naive")
        torch.testing.assert_close(off.logprobs, bare.logprobs, rtol=0, atol=2e-5)
        plain.model = PeftModel.from_pretrained(plain.hf_model, str(tmp_path)).eval()
        oracle = score_completions(plain, prompts, None, tokens, 1.0, path="naive")
    torch.testing.assert_close(scores.logprobs, oracle.logprobs, rtol=0, atol=2e-5)
    assert (oracle.logprobs - bare.logprobs).abs().max() > 0.1  # the adapter is felt
    state = adapter_state(policy.model)
    versions.load(1, {n: 0 * t for n, t in state.items()})
    with torch.no_grad():
        blank = score_completions(policy, prompts, None, tokens, 1.0, path="naive")
    torch.testing.assert_close(blank.logprobs, bare.logprobs, rtol=0, atol=2e-5)


def test_what_is_left_alone_is_said_by_name(folder: Path) -> None:
    model = load_skeleton(section_of("smolvlm", folder)).hf_model

    def chosen(*unquantized: str) -> set[str]:
        kept = QuantizationSection(kind="torchao-int8", unquantized=list(unquantized))
        return {name.rsplit(".", 1)[-1] for name in quantized_layers(model, kept)}

    language = chosen("tower", "connector", "head")
    assert chosen("tower", "connector", "head", "down_proj") == language - {"down_proj"}
    assert chosen("connector", "head") >= {"fc1", "fc2"}
    assert chosen("tower", "head") == language | {"proj"}
    with pytest.raises(ConfigError, match=r"'towers' is neither tower, connector, head nor the end of a linear layer"):
        chosen("towers")
    with pytest.raises(ConfigError, match="leaves nothing to quantise"):
        chosen("tower", "connector", "head", *language)


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrl_ray.policy import quantized

    kept = QuantizationSection(kind="bitsandbytes-4bit")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*not installed: pip install 'mmrl_ray\[bitsandbytes\]'"):
        load_policy(section_of("smolvlm", folder, quantization=kept), device="cpu")
    monkeypatch.setattr(quantized, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="was to be quantised on xpu, and that works on CPUs and CUDA GPUs"):
        quantized.require(kept, "m", torch.device("xpu"))
    config = load_skeleton(section_of("smolvlm", folder)).hf_model.config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ConfigError, match=r"is quantised already \(bitsandbytes\)"):
        quantized.refuse_quantized_twice(kept, config, "m")
