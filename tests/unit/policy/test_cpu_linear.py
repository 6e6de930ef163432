"""Linear layers by oneDNN, against float64 in NumPy, forward and backward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy import cpu
from mmrl_ray.policy.cpu import OneDnnLinear, by_column, is_available, pack_weights, use_fused_adapters, use_onednn
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from tests.support.tiny_models import FAMILIES, make_samples
from tests.unit.policy.generation.test_decode_families import TOKENS, generated, ids

Load = Callable[..., Policy]

SHAPES = [(7, 24), (1, 24), (2, 5, 24), (3, 1, 24), (0, 24), (2, 0, 24)]

pytestmark = pytest.mark.skipif(not is_available(), reason="this build of PyTorch has no oneDNN")


def made(*, bias: bool = True, dtype: torch.dtype = torch.float32, trains: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=bias, dtype=dtype))
    model.requires_grad_(trains)
    use_onednn(model)
    layer = model[0]
    assert isinstance(layer, OneDnnLinear)
    return layer


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_gives_the_products_and_gradients_of_float64(shape: tuple[int, ...], trains: bool, bias: bool) -> None:
    layer = made(bias=bias, trains=trains)
    x = torch.randn(shape, requires_grad=True)
    outside = torch.randn(*shape[:-1], 16)
    (layer(x) * outside).sum().backward()

    w, given, grad = (t.detach().double().numpy() for t in (layer.weight, x, outside))
    b = layer.bias.detach().double().numpy() if bias else 0.0
    close(layer(x), given @ w.T + b)
    assert x.grad is not None
    close(x.grad, grad @ w)
    if not trains:
        assert layer.weight.grad is None
        return
    assert layer.weight.grad is not None
    close(layer.weight.grad, grad.reshape(-1, 16).T @ given.reshape(-1, 24))
    if bias:
        close(layer.bias.grad, grad.reshape(-1, 16).sum(0))


def test_rows_and_weights_need_not_lie_in_order() -> None:
    layer = made()
    x = torch.randn(24, 9).t()
    expected = x.double().numpy() @ layer.weight.double().numpy().T + layer.bias.double().numpy()
    close(layer(x), expected)
    layer.weight.data = layer.weight.data.t().contiguous().t()
    close(layer(x), expected)


def test_new_weights_count_at_once() -> None:
    layer, x = made(), torch.randn(3, 24)
    before = layer(x)
    layer.weight.data = torch.zeros_like(layer.weight)
    assert torch.equal(layer(x), layer.bias.expand(3, -1))
    assert not torch.equal(before, layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_take_the_ordinary_way(dtype: torch.dtype) -> None:
    layer, x = made(dtype=dtype), torch.randn(3, 24, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_autocast_goes_on() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made()(torch.randn(3, 24)).dtype == torch.bfloat16


def test_it_copies_pickles_and_saves_as_any_linear_layer() -> None:
    layer, x = made(), torch.randn(3, 24)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_layers_of_a_class_of_their_own_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(2, 2), nn.Linear(2, 2))
    use_onednn(model)
    assert [type(layer) for layer in model] == [Own, OneDnnLinear]


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_give_the_same_products(rows: int, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(520, 260, bias=bias)).requires_grad_(False)  # large enough for every number of rows
    use_onednn(model)
    x = torch.randn(rows, 520)
    before = model(x)
    pack_weights(model)
    product = torch.ops.mkldnn._linear_pointwise.default
    given: list[torch.layout] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is product:
                given.append(args[1].layout)
            return func(*args, **(kwargs or {}))

    with Spy():
        after = model(x)
    assert given == [torch._mkldnn]  # type: ignore[attr-defined]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == (["0.weight", "0.bias"] if bias else ["0.weight"])


def test_a_layer_that_is_given_another_weight_forgets_the_packed_one() -> None:
    model = nn.Sequential(nn.Linear(520, 260, bias=False)).requires_grad_(False)
    use_onednn(model)
    pack_weights(model)
    other = torch.randn(260, 520)
    model[0].weight.data = other
    x = torch.randn(2, 520)
    torch.testing.assert_close(model(x), x @ other.T, rtol=1e-4, atol=1e-4)


def test_packed_layers_still_give_the_gradient_of_their_input() -> None:
    model = nn.Sequential(nn.Linear(520, 260)).requires_grad_(False)
    use_onednn(model)
    pack_weights(model)
    x = torch.randn(2, 520, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, model[0].weight.sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_of_packed_layers_are_plain_ones() -> None:
    model = nn.Sequential(nn.Linear(520, 260)).requires_grad_(False)
    use_onednn(model)
    pack_weights(model)
    x = torch.randn(2, 520)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0]._packed is None
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_model_too_large_to_lie_in_memory_twice_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_MOST_PACKED_BYTES", 1000)
    model = nn.Sequential(nn.Linear(520, 260)).requires_grad_(False)
    use_onednn(model)
    pack_weights(model)
    assert model[0]._packed is None


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_change_no_greedy_row(family: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(family)
    prompts = encode_prompts(policy, make_samples())
    expected = [generated(policy, prompt) for prompt in prompts]
    monkeypatch.setattr(cpu, "_LARGE_WEIGHT", 1)  # so that layers of these small models are oneDNN's, too
    pack_weights(policy.model)
    greedy = SamplingParams(max_new_tokens=TOKENS, greedy=True)
    together = decode_groups(Decoder(policy), [DecodeRequest(p, 1, greedy) for p in prompts])
    assert [ids(out.completions[0]) for out in together] == expected


def adapted(*, bias: bool = True, dropout: float = 0.0, trains: bool = False) -> PeftModel:
    """Of one layer, 24 to 16, with an adapter of rank 3 that is felt; scaled by 2 / 3."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=bias))
    use_onednn(model)
    config = LoraConfig(r=3, lora_alpha=2, target_modules=["0"], init_lora_weights=False, lora_dropout=dropout)
    peft = get_peft_model(model, config)
    peft.base_model.model[0].base_layer.weight.requires_grad_(trains)
    return peft


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that oneDNN has layers of these sizes, too."""
    monkeypatch.setattr(cpu, "_LARGE_WEIGHT", 1)


@pytest.mark.usefixtures("small_products")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learns_input", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
def test_fused_adapters_give_the_products_and_gradients_of_float64(
    shape: tuple[int, ...], learns_input: bool, bias: bool
) -> None:
    model = adapted(bias=bias)
    use_fused_adapters(model)
    layer = model.base_model.model[0]
    x, outside = torch.randn(shape, requires_grad=learns_input), torch.randn(*shape[:-1], 16)
    made = model(x)
    assert type(made.grad_fn).__name__ == "_AdaptedBackward"
    (made * outside).sum().backward()

    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    w, a, b, given, grad = (t.detach().double().numpy() for t in (layer.base_layer.weight, down, up, x, outside))
    added = layer.base_layer.bias.detach().double().numpy() if bias else 0.0
    close(made, given @ (w + 2 / 3 * b @ a).T + added)
    rows, grads = given.reshape(-1, 24), grad.reshape(-1, 16)
    assert down.grad is not None
    assert up.grad is not None
    close(down.grad, 2 / 3 * (grads @ b).T @ rows)
    close(up.grad, 2 / 3 * grads.T @ (rows @ a.T))
    if learns_input:
        assert x.grad is not None
        close(x.grad, grad @ (w + 2 / 3 * b @ a))
    else:
        assert x.grad is None


@pytest.mark.usefixtures("small_products")
@pytest.mark.parametrize("case", ["dropout", "base learns", "off", "merged", "two", "no gradient", "bfloat16"])
def test_other_adapters_stay_with_peft(case: str) -> None:
    model = adapted(dropout=0.5 if case == "dropout" else 0.0, trains=case == "base learns")
    x = torch.randn(7, 24, dtype=torch.bfloat16 if case == "bfloat16" else torch.float32)
    if case == "bfloat16":
        model.to(torch.bfloat16)
    if case == "two":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    if case == "off":
        model.base_model.disable_adapter_layers()
    if case == "merged":
        model.merge_adapter()
    plain = copy.deepcopy(model)
    use_fused_adapters(model)
    made = []
    with torch.set_grad_enabled(case != "no gradient"):
        for each in (model, plain):
            torch.manual_seed(3)  # of the dropout
            made.append(each(x))
    assert "_Adapted" not in type(made[0].grad_fn).__name__
    assert torch.equal(*made)


@pytest.mark.usefixtures("small_products")
def test_a_copy_of_a_fused_adapter_computes_with_its_own_weights() -> None:
    model = adapted()
    use_fused_adapters(model)
    other, x = copy.deepcopy(model), torch.randn(3, 24)
    with torch.no_grad():
        other.base_model.model[0].lora_B["default"].weight.zero_()
    assert torch.allclose(other(x), other.base_model.model[0].base_layer(x))
    assert not torch.allclose(other(x), model(x))


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_weights_by_column_give_the_same_products(rows: int) -> None:
    model = nn.Sequential(nn.Linear(520, 260)).requires_grad_(False)
    use_onednn(model)
    x, weight = torch.randn(rows, 520), model[0].weight
    before, turned = model(x), by_column(weight)
    assert turned.stride() == (1, 260)
    model[0].weight.data = turned
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert by_column(torch.randn(16, 24)).is_contiguous(), "MKL's, which reads rows faster"
