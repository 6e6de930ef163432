"""Adapters: their weights as versions, their files, and the policy without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import AdapterError
from mmrl_ray.policy.lora.adapter import (
    adapter_parameters,
    adapter_state,
    add_adapter,
    load_adapter,
    load_adapter_state,
    merge_adapter,
    reference_policy,
    save_adapter,
)
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from tests.support.tiny_models import make_samples

Load = Callable[..., Policy]
LORA = LoraSection(r=4, alpha=12)


def logits(policy: Policy) -> torch.Tensor:
    """[P, V], by the model itself on one prompt and its picture."""
    prompt = encode_prompts(policy, make_samples()[:1])[0]
    inputs = {name: value for name, value in prompt.model_inputs.items() if name != "mm_token_type_ids"}
    inputs["pixel_values"] = inputs["pixel_values"].to(policy.dtype)
    with torch.no_grad():
        return policy.model(input_ids=prompt.input_ids[None], **inputs).logits[0]


def train_a_little(policy: Policy, seed: int = 1) -> None:
    """Gives every adapter weight a value that is felt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_a_fresh_adapter_changes_nothing_and_alone_trains(load: Load) -> None:
    policy = load()
    before = logits(policy)
    model = add_adapter(policy, LORA, seed=0)
    assert policy.model is model
    assert not model.training
    torch.testing.assert_close(logits(policy), before, rtol=0, atol=0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    # Seven linear layers in each of two blocks, two matrices for each.
    assert len(adapter_parameters(model)) == 2 * 7 * 2
    assert all(isinstance(m, nn.Identity) for n, m in model.named_modules() if n.endswith("lora_dropout.default"))
    scaling = {v for m in model.modules() if isinstance(getattr(m, "scaling", None), dict) for v in m.scaling.values()}
    assert scaling == {12 / 4}


def test_the_seed_alone_decides_the_weights(load: Load) -> None:
    states = []
    for seed, disturbed in ((3, False), (3, True), (4, False)):
        policy = load()
        if disturbed:
            torch.manual_seed(999)
        before = torch.random.get_rng_state()
        add_adapter(policy, LORA, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(adapter_state(policy.model))
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(bool(tensor.any()) == (".lora_A." in name) for name, tensor in first.items())


def test_adapter_weights_are_float32_on_a_bfloat16_base(load: Load) -> None:
    policy = load(dtype="bfloat16")
    add_adapter(policy, LORA, seed=0)
    assert {p.dtype for p in adapter_parameters(policy.model)} == {torch.float32}
    assert logits(policy).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(logits(policy).isfinite().all())


def test_under_autocast_a_branch_keeps_no_copies_of_its_input(load: Load) -> None:
    """What PEFT casts to float32 is cast back: the same numbers, and one tensor kept for all layers that have it."""
    policy = load(dtype="bfloat16")
    add_adapter(policy, LORA, seed=0)
    train_a_little(policy)
    layers = [layer for layer in policy.model.modules() if isinstance(layer, LoraLayer)]
    found = []
    for cast in (BaseTunerLayer._cast_input_dtype, None):
        if cast is not None:
            ours = [layer._cast_input_dtype for layer in layers]
            for layer in layers:
                layer._cast_input_dtype = partial(cast, layer)  # type: ignore[method-assign]
        else:
            for layer, own in zip(layers, ours, strict=True):
                layer._cast_input_dtype = own  # type: ignore[method-assign]
        kept: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        prompt = encode_prompts(policy, make_samples()[:1])[0]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            out = policy.model(
                input_ids=prompt.input_ids[None],
                pixel_values=prompt.model_inputs["pixel_values"].to(policy.dtype),
            ).logits
        gradients = torch.autograd.grad(out.float().square().mean(), adapter_parameters(policy.model))
        found.append((out.detach(), gradients, sum(t.untyped_storage().nbytes() for t in kept.values())))
    (peft, peft_gradients, before), (mine, my_gradients, after) = found
    assert torch.equal(mine, peft)
    for got, wanted in zip(my_gradients, peft_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=1e-3 * float(wanted.abs().max()))
    # Of seven layers in a block, three share an input and two another: three copies fewer, of as many hidden states.
    hidden = 2 * prompt.input_ids.numel() * policy.hidden_size
    blocks = policy.hf_model.config.get_text_config().num_hidden_layers
    assert before - after >= 3 * blocks * hidden


def test_the_state_is_a_copy_under_the_names_that_peft_saves(load: Load, tmp_path: Path) -> None:
    policy = load(dtype="bfloat16")
    add_adapter(policy, LORA, seed=0)
    train_a_little(policy)
    state = adapter_state(policy.model)
    policy.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert state.keys() == saved.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert torch.equal(tensor, saved[name])
    train_a_little(policy)
    assert all(torch.equal(state[name], saved[name]) for name in state)


def test_a_state_is_loaded_in_place(load: Load) -> None:
    source, target = load(), load()
    add_adapter(source, LORA, seed=0)
    add_adapter(target, LORA, seed=1)
    train_a_little(source)
    parameters = adapter_parameters(target.model)
    load_adapter_state(target.model, adapter_state(source.model))
    assert all(a is b for a, b in zip(parameters, adapter_parameters(target.model), strict=True))
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=0)


class Copies(TorchDispatchMode):
    """Counts copies from or into the storages in `live`, one by one."""

    def __init__(self, live: set[int]) -> None:
        super().__init__()
        self.live, self.found = live, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            ends = [t.untyped_storage().data_ptr() for t in (args[0], *args[1:2], out) if isinstance(t, torch.Tensor)]
            self.found += any(end in self.live for end in ends)
        return out


def test_the_state_travels_as_one_buffer(load: Load) -> None:
    """However many matrices there are, none is copied by itself from or to the device that the model is on."""
    policy = load()
    add_adapter(policy, LORA, seed=0)
    live = {p.untyped_storage().data_ptr() for p in adapter_parameters(policy.model)}
    with Copies(live) as copies:
        state = adapter_state(policy.model)
        load_adapter_state(policy.model, state)
    assert copies.found == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state, name: state.pop(name), r"1 missing \(base_model.*0 unknown"),
        (lambda state, name: state.update({"stray": state[name]}), r"0 missing, 1 unknown \(stray\)"),
        (lambda state, name: state.update({name: state[name][:, :-1]}), r"shape \[4, 31\], the model's \[4, 32\]"),
        (lambda state, name: state[name].view(-1)[3:4].fill_(float("nan")), "NaN or infinity"),
        (lambda state, name: state[name].view(-1)[3:4].fill_(float("inf")), "NaN or infinity"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(
    load: Load, damage: Callable[[dict[str, torch.Tensor], str], object], message: str
) -> None:
    policy = load()
    add_adapter(policy, LORA, seed=0)
    before = adapter_state(policy.model)
    state = {name: tensor + 1 for name, tensor in before.items()}
    damage(state, next(name for name in state if "q_proj.lora_A" in name))
    with pytest.raises(AdapterError, match=message):
        load_adapter_state(policy.model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(policy.model).items())


@pytest.mark.parametrize("targets", [None, ["q_proj", "layers.0.mlp.up_proj"], r".*language_model.*(v|o)_proj"])
def test_saved_adapters_load_in_peft_and_here(load: Load, tmp_path: Path, targets: list[str] | str | None) -> None:
    policy = load()
    section = LoraSection(r=2, alpha=5, targets=targets, adapt_vision=True)
    add_adapter(policy, section, seed=0)
    train_a_little(policy)
    expected = logits(policy)
    save_adapter(policy.model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == policy.path
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"] is True

    elsewhere = load()
    elsewhere.model = PeftModel.from_pretrained(elsewhere.model, tmp_path)
    torch.testing.assert_close(logits(elsewhere), expected, rtol=0, atol=0)

    here = load()
    assert load_adapter(here, tmp_path) is here.model
    torch.testing.assert_close(logits(here), expected, rtol=0, atol=0)
    assert len(adapter_parameters(here.model)) == len(adapter_parameters(policy.model))


def test_what_peft_saved_loads_here(load: Load, tmp_path: Path) -> None:
    policy = load()
    config = LoraConfig(r=3, target_modules=["o_proj"], init_lora_weights=False, lora_dropout=0.5, use_rslora=True)
    policy.model = get_peft_model(policy.model, config).eval()
    policy.model.save_pretrained(tmp_path)
    here = load()
    load_adapter(here, tmp_path)
    torch.testing.assert_close(logits(here), logits(policy), rtol=0, atol=0)
    here.model.train()
    torch.testing.assert_close(logits(here), logits(policy), rtol=0, atol=0)


def test_two_saves_of_one_adapter_are_equal_bytes(load: Load, tmp_path: Path) -> None:
    policy = load()
    add_adapter(policy, LORA, seed=0)
    for name in ("a", "b"):
        save_adapter(policy.model, tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def rewrite(folder: Path, **values: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"not it"), "is broken"),
        (lambda f: rewrite(f, use_dora=True), "14 missing"),
        (lambda f: rewrite(f, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lambda f: rewrite(f, modules_to_save=["lm_head"]), "1 missing"),
        (lambda f: rewrite(f, use_a_later_variant=True), "use_a_later_variant=True"),
        (lambda f: rewrite(f, later_variant_config={"scale": 2.0}), "later_variant_config"),
        (lambda f: rewrite(f, lora_alpha="8"), "does not fit .*TypeError"),
        (lambda f: rewrite(f, target_modules=[1]), "does not fit .*AttributeError"),
        (lambda f: rewrite(f, monteclora_config={"no_such": 1}), "cannot be read"),
        (lambda f: rewrite(f, peft_type="IA3"), "only LoRA"),
        (lambda f: rewrite(f, target_modules=["nowhere"]), "does not fit"),
        (lambda f: rewrite(f, r=8), "shape"),
        (lambda f: save_file({"a": torch.zeros(1)}, f / "adapter_model.safetensors"), "28 missing"),
    ],
)
def test_a_broken_or_foreign_adapter_is_refused(
    load: Load, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    policy = load()
    add_adapter(policy, LORA, seed=0)
    save_adapter(policy.model, tmp_path)
    damage(tmp_path)
    here = load()
    before = [name for name, _ in here.model.named_modules()]
    with pytest.raises(AdapterError, match=message):
        load_adapter(here, tmp_path)
    assert [name for name, _ in here.model.named_modules()] == before
    add_adapter(here, LORA, seed=0)


def test_merging_gives_a_plain_model_that_can_be_adapted_again(load: Load) -> None:
    policy = load()
    names = {name for name, _ in policy.model.named_parameters()}
    add_adapter(policy, LORA, seed=0)
    train_a_little(policy)
    expected = logits(policy)
    merged = merge_adapter(policy)
    assert policy.model is merged
    assert not isinstance(merged, PeftModel)
    assert {name for name, _ in merged.named_parameters()} == names
    assert not any(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(logits(policy), expected, rtol=1e-4, atol=1e-5)
    assert (logits(policy) - logits(load())).abs().max() > 1e-3
    again = logits(policy)
    add_adapter(policy, LORA, seed=1)
    train_a_little(policy)
    with reference_policy(policy.model):
        torch.testing.assert_close(logits(policy), again, rtol=0, atol=0)


def test_an_adapter_with_nan_is_not_merged(load: Load) -> None:
    policy = load()
    add_adapter(policy, LORA, seed=0)
    adapter_parameters(policy.model)[1].data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="cannot be merged"):
        merge_adapter(policy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_policy_is_the_base_bit_for_bit(load: Load, dtype: str) -> None:
    policy = load(dtype=dtype)
    base = logits(policy)
    add_adapter(policy, LORA, seed=0)
    train_a_little(policy)
    adapted = logits(policy)
    assert not torch.equal(adapted, base)
    with reference_policy(policy.model):
        assert torch.equal(logits(policy), base)
    assert torch.equal(logits(policy), adapted)


@pytest.mark.parametrize("trainable", [True, False])
def test_the_reference_policy_leaves_what_trains_as_it_was(load: Load, trainable: bool) -> None:
    policy = load()
    add_adapter(policy, LORA, seed=0)
    parameters = adapter_parameters(policy.model)
    for parameter in parameters:
        parameter.requires_grad_(trainable)

    class Stop(Exception):
        pass

    with pytest.raises(Stop), reference_policy(policy.model):
        raise Stop
    assert {p.requires_grad for p in parameters} == {trainable}
    before = logits(policy)
    parameters[1].data.fill_(0.5)
    assert not torch.equal(logits(policy), before)  # the adapter is on again


def test_without_an_adapter_there_is_nothing_to_save_or_switch_off(load: Load, tmp_path: Path) -> None:
    model = load().model
    with pytest.raises(AdapterError, match="has no adapter"), reference_policy(model):
        pass
    calls: list[Callable[[], object]] = [
        lambda: adapter_state(model),
        lambda: adapter_parameters(model),
        lambda: load_adapter_state(model, {}),
        lambda: save_adapter(model, tmp_path),
        lambda: merge_adapter(model),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(AdapterError, match="has no adapter"):
            call()


def test_a_second_adapter_is_refused(load: Load, tmp_path: Path) -> None:
    policy = load()
    add_adapter(policy, LORA, seed=0)
    save_adapter(policy.model, tmp_path)
    with pytest.raises(AdapterError, match="already"):
        add_adapter(policy, LORA, seed=0)
    with pytest.raises(AdapterError, match="already"):
        load_adapter(policy, tmp_path)


def test_a_bare_model_can_be_adapted(load: Load) -> None:
    policy = load()
    model = add_adapter(policy.hf_model, LORA, seed=0)
    assert isinstance(model, PeftModel)
    assert isinstance(merge_adapter(model), type(policy.hf_model))


def test_a_path_that_is_not_there_names_what_is_missing(load: Load, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not an adapter"):
        load_adapter(load(), tmp_path / "nowhere")


def test_a_nameless_base_is_saved_without_a_name(load: Load, tmp_path: Path) -> None:
    policy = load()
    policy.hf_model.config._name_or_path = ""
    policy.hf_model.name_or_path = ""
    add_adapter(policy, LORA, seed=0)
    save_adapter(policy.model, tmp_path)
    config = SimpleNamespace(**json.loads((tmp_path / "adapter_config.json").read_text()))
    assert config.base_model_name_or_path is None
