"""L2 regularisers on real PEFT models, against NumPy that does build B·A."""

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from mmrl_ray.errors import AdapterError
from mmrl_ray.losses.regularizers import adapter_l2, l2_to_pretrained, pretrained_snapshot


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 5)
        self.down = nn.Linear(5, 6)
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(self.embed(ids)))))


def adapted(dtype: torch.dtype = torch.float64, seed: int = 0, **lora: object) -> nn.Module:
    """A tiny model with an adapter that has been trained: every trainable weight is random."""
    torch.manual_seed(seed)
    settings: dict = {"r": 2, "lora_alpha": 6, "target_modules": ["up", "down"], **lora}
    model = get_peft_model(Tiny(), LoraConfig(**settings)).to(dtype)
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def delta(weights: dict[str, np.ndarray], layer: str, scaling: float, adapter: str = "default") -> np.ndarray:
    prefix = f"base_model.model.{layer}.lora_"
    return scaling * weights[f"{prefix}B.{adapter}.weight"] @ weights[f"{prefix}A.{adapter}.weight"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 2), (True, 6 / np.sqrt(2))])
def test_distance_equals_explicit_product(seed: int, rslora: bool, scaling: float) -> None:
    model = adapted(seed=seed, use_rslora=rslora)
    expected = sum(np.sum(delta(arrays(model), layer, scaling) ** 2) for layer in ("up", "down"))
    np.testing.assert_allclose(l2_to_pretrained(model).item(), expected, rtol=1e-9)


def test_distance_literal() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, lora_alpha=3, target_modules=["0"]))
    assert l2_to_pretrained(model).item() == 0.0  # B starts at 0: nothing has moved yet
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.tensor([[1.0, 2.0]]))
            elif "lora_B" in name:
                parameter.copy_(torch.tensor([[3.0], [0.0]]))
    # s·B·A = 3·[[3, 6], [0, 0]]
    assert l2_to_pretrained(model).item() == 81 + 324
    assert adapter_l2(model).item() == 1 + 4 + 9


def test_distance_is_that_of_the_merged_weights() -> None:
    torch.manual_seed(1)
    base = Tiny().double()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    settings = {"r": 2, "target_modules": ["up", "embed", "conv"], "modules_to_save": ["head"], "lora_bias": False}
    model = get_peft_model(base, LoraConfig(**settings)).double()
    shake(model)
    distance = l2_to_pretrained(model).item()
    after = model.merge_and_unload().state_dict()
    np.testing.assert_allclose(distance, sum(((after[k] - before[k]) ** 2).sum().item() for k in before), rtol=1e-9)
    assert distance > 1


def test_gradients_equal_those_of_the_explicit_product() -> None:
    model = adapted()
    layers = [model.base_model.model.up, model.base_model.model.down]
    factors = [p for x in layers for p in (x.lora_A["default"].weight, x.lora_B["default"].weight)]
    explicit = sum((3.0 * x.lora_B["default"].weight @ x.lora_A["default"].weight).square().sum() for x in layers)
    for got, expected in zip(
        torch.autograd.grad(l2_to_pretrained(model), factors), torch.autograd.grad(explicit, factors), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_gradcheck() -> None:
    model = adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for function in (l2_to_pretrained, adapter_l2):
        # gradcheck shakes the very tensors that the model holds
        assert torch.autograd.gradcheck(lambda *_, f=function: f(model), parameters)


def test_the_product_is_never_built() -> None:
    wide = nn.Sequential(nn.Linear(40_000, 40_000, bias=False, device="meta"))
    model = get_peft_model(wide, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight = nn.Parameter(torch.ones(2, 40_000, dtype=torch.float64))
    layer.lora_B["default"].weight = nn.Parameter(torch.full((40_000, 2), 1e-3, dtype=torch.float64))
    # B·A has 1.6e9 entries of 2e-3 (12.8 GB in float64)
    assert l2_to_pretrained(model).item() == pytest.approx(1.6e9 * 4e-6, rel=1e-5)


def test_bfloat16_and_autocast_lose_nothing() -> None:
    model = adapted(torch.bfloat16)
    expected = sum(np.sum(delta(arrays(model), layer, 3.0) ** 2) for layer in ("up", "down"))
    squares = sum(np.sum(v**2) for k, v in arrays(model).items() if "lora_" in k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance, size = l2_to_pretrained(model), adapter_l2(model)
    assert distance.dtype == size.dtype == torch.float32
    assert distance.item() == pytest.approx(expected, rel=1e-6)
    assert size.item() == pytest.approx(squares, rel=1e-6)


def test_modules_to_save_count_in_the_distance_only() -> None:
    model = adapted(modules_to_save=["head"])
    weights = arrays(model)
    head = "base_model.model.head."
    moved = sum(
        np.sum((weights[f"{head}modules_to_save.default.{k}"] - weights[f"{head}original_module.{k}"]) ** 2)
        for k in ("weight", "bias")
    )
    expected = moved + sum(np.sum(delta(weights, layer, 3.0) ** 2) for layer in ("up", "down"))
    np.testing.assert_allclose(l2_to_pretrained(model).item(), expected, rtol=1e-9)
    np.testing.assert_allclose(
        adapter_l2(model).item(), sum(np.sum(v**2) for k, v in weights.items() if "lora_" in k), rtol=1e-9
    )


def test_trained_biases_need_a_snapshot() -> None:
    torch.manual_seed(2)
    model = get_peft_model(
        Tiny().double(), LoraConfig(r=2, lora_alpha=6, target_modules=["up", "down"], bias="all")
    ).double()
    start = pretrained_snapshot(model)
    assert len(start) == 4
    assert all(name.endswith("bias") for name in start)
    before = arrays(model)
    before = {k: before[k].copy() for k in start}
    shake(model)
    weights = arrays(model)
    expected = sum(np.sum((weights[k] - before[k]) ** 2) for k in start)
    expected += sum(np.sum(delta(weights, layer, 3.0) ** 2) for layer in ("up", "down"))
    np.testing.assert_allclose(l2_to_pretrained(model, start).item(), expected, rtol=1e-9)
    with pytest.raises(AdapterError, match=r"bias.*pretrained_snapshot"):
        l2_to_pretrained(model)
    assert adapter_l2(model).item() == pytest.approx(sum(np.sum(v**2) for k, v in weights.items() if "lora_" in k))


def test_bias_inside_lora_counts() -> None:
    model = adapted(lora_bias=True)
    weights = arrays(model)
    expected = sum(
        np.sum(delta(weights, layer, 3.0) ** 2)
        + np.sum((3.0 * weights[f"base_model.model.{layer}.lora_B.default.bias"]) ** 2)
        for layer in ("up", "down")
    )
    np.testing.assert_allclose(l2_to_pretrained(model).item(), expected, rtol=1e-9)


class TestSeveralAdapters:
    @pytest.fixture
    def model(self) -> nn.Module:
        model = adapted()
        model.add_adapter("second", LoraConfig(r=3, lora_alpha=3, target_modules=["up"]))
        model.double()
        model.set_adapter("second")
        shake(model)
        return model

    def test_only_the_active_one_counts(self, model: nn.Module) -> None:
        expected = np.sum(delta(arrays(model), "up", 1.0, "second") ** 2)
        np.testing.assert_allclose(l2_to_pretrained(model).item(), expected, rtol=1e-9)
        squares = sum(np.sum(v**2) for k, v in arrays(model).items() if ".second." in k)
        np.testing.assert_allclose(adapter_l2(model).item(), squares, rtol=1e-9)

    def test_two_trained_ones_count_as_their_sum(self, model: nn.Module) -> None:
        model.base_model.set_adapter(["default", "second"])
        w = arrays(model)
        both = delta(w, "up", 3.0) + delta(w, "up", 1.0, "second")
        expected = np.sum(both**2) + np.sum(delta(w, "down", 3.0) ** 2)
        np.testing.assert_allclose(l2_to_pretrained(model).item(), expected, rtol=1e-9)

    def test_a_frozen_one_belongs_to_the_start(self, model: nn.Module) -> None:
        model.base_model.set_adapter(["default", "second"])
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.requires_grad_(False)
        w = arrays(model)
        # `down` has only the frozen adapter: it is where it started.
        np.testing.assert_allclose(
            l2_to_pretrained(model).item(), np.sum(delta(w, "up", 1.0, "second") ** 2), rtol=1e-9
        )


def test_works_on_injected_adapters() -> None:
    torch.manual_seed(0)
    model = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["up"]), Tiny()).double()
    shake(model)
    up = model.up
    product = 3.0 * up.lora_B["default"].weight @ up.lora_A["default"].weight
    torch.testing.assert_close(l2_to_pretrained(model), product.square().sum())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_2"}, "pissa_niter_2"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_refused_where_the_product_is_not_the_distance(settings: dict, named: str) -> None:
    model = adapted(torch.float32, **settings)
    with pytest.raises(AdapterError, match=named):
        l2_to_pretrained(model)
    assert adapter_l2(model).item() > 0  # the adapter's own size means the same for all of them


def test_refuses_other_tuners_and_models_without_adapter() -> None:
    other = get_peft_model(Tiny(), IA3Config(target_modules=["up"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="LoRA only"):
        l2_to_pretrained(other)
    assert adapter_l2(other).item() == pytest.approx(5.0)
    with pytest.raises(AdapterError, match="adapter_l2"):
        adapter_l2(Tiny())


def test_full_fine_tuning_with_a_snapshot() -> None:
    model = Tiny().double()
    start = pretrained_snapshot(model)
    assert l2_to_pretrained(model, start).item() == 0.0
    with torch.no_grad():
        model.up.weight[0, 0] += 3.0
        model.head.bias[1] -= 4.0
    assert l2_to_pretrained(model, start).item() == pytest.approx(25.0)
