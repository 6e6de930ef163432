"""LoRA adapters by PEFT: which layers they sit on, their weights as versions, their files, and the policy without them.

An adapter's weights are float32 whatever the base's dtype (PEFT computes its branch in float32 and casts the sum back),
and its branch drops nothing but where `variants.dropout_on` says so: with dropout the same policy would give two
answers, and the policy ratio would be noise. A run's adapter (`add_run_adapter`) begins with the same weights in each
of its processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from mmrl_ray.config import Config
from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import AdapterError
from mmrl_ray.experience.carriers import derive_seed
from mmrl_ray.policy.checkpoint import brief
from mmrl_ray.policy.lora.targets import check_tensor_names, resolve_targets, saved_modules
from mmrl_ray.policy.lora.variants import back_to_the_base_dtype, draw_orthogonal, keep_in_float32
from mmrl_ray.policy.model import Policy
from mmrl_ray.run_records.run_dir import CONFIG_FILE, STARTING_ADAPTER, WEIGHTS_FILE, RunDir

M = TypeVar("M", bound=nn.Module)


def add_adapter(policy: Policy | PreTrainedModel, lora: LoraSection, seed: int) -> PeftModel:
    """Puts a fresh adapter on the model: the only weights that train, float32, without effect until they do (BA = 0).

    The same `seed` gives the same weights bit for bit on any device, whatever the global random state, which is left
    as it was. A `Policy` gets the wrapped model as its `model`; a bare model is wrapped in place and returned.

    Raises:
        AdapterError: of `resolve_targets` and `saved_modules`, or the model has an adapter already.
    """
    base = policy.hf_model if isinstance(policy, Policy) else policy
    if isinstance(policy.model if isinstance(policy, Policy) else policy, PeftModel):
        raise AdapterError("the model has an adapter already; merge it first (merge_adapter)")
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT annotates int and computes with the number as it is
        target_modules=resolve_targets(base, lora),
        lora_dropout=lora.dropout,
        bias="none",
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        modules_to_save=saved_modules(base, lora) or None,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    model = _wrap(base, config, seed)
    if lora.init == "orthogonal":
        draw_orthogonal(model, seed)
    if isinstance(policy, Policy):
        policy.model = model
        policy.acceleration.adapt(model)
    return model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters in the model's order: the adapter's and nothing of the base.

    Raises:
        AdapterError: the model has no adapter.
    """
    _require_adapter(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights as PEFT saves them: CPU float32 copies, contiguous, under names without the adapter's own.

    They lie one behind the other in one buffer, which comes from the device by one copy: an adapter of a large model
    has hundreds of small matrices, and a copy of each waits for the device.

    Raises:
        AdapterError: the model has no adapter.
    """
    live = _live_state(model)
    if not live:
        return {}
    there = torch.cat([tensor.detach().reshape(-1) for tensor in live.values()])
    here = _on_host(there.numel(), there.dtype, there.device).copy_(there).float()
    return {name: flat.view(live[name].shape) for name, flat in _parts(here, live).items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copies `state` into the adapter, in place: optimisers keep their parameters. All of it or, on an error, nothing.

    Raises:
        AdapterError: a name is missing or unknown, a shape differs, or a value is not finite.
    """
    live = _live_state(model)
    check_tensor_names(live.keys(), state.keys())
    for name, tensor in state.items():
        if tensor.shape != live[name].shape:
            raise AdapterError(
                f"adapter weight {name} has shape {list(tensor.shape)}, the model's {list(live[name].shape)}; "
                "it was made with another rank or for another model"
            )
    if not live:
        return
    device, dtype = next((tensor.device, tensor.dtype) for tensor in live.values())
    here = _on_host(sum(tensor.numel() for tensor in live.values()), dtype, device)
    parts = _parts(here, live)
    for name, flat in parts.items():
        flat.copy_(state[name].reshape(-1))
    if not bool(torch.isfinite(here).all()):
        name = next(name for name, flat in parts.items() if not bool(torch.isfinite(flat).all()))
        raise AdapterError(f"adapter weight {name} holds NaN or infinity; take an earlier version")
    there = _parts(here.to(device), live)
    with torch.no_grad():
        torch._foreach_copy_(list(live.values()), [there[name].view_as(tensor) for name, tensor in live.items()])


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, for `PeftModel.from_pretrained(base, folder)`.

    Not atomic: write into a folder of one's own and rename that.

    Raises:
        AdapterError: the model has no adapter.
        OSError: of the file system.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(_require_adapter(model)), str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(adapter_config(model), encoding="utf-8")


def adapter_config(model: nn.Module) -> str:
    """What `adapter_config.json` holds.

    Raises:
        AdapterError: the model has no adapter.
    """
    peft = _require_adapter(model)
    config = peft.peft_config[peft.active_adapter].to_dict()
    # PEFT shortens long lists of targets into suffixes and writes them in the order of a set: full names, sorted, say
    # what was adapted and make the file a function of the adapter.
    config["target_modules"] = sorted(_adapted_names(peft))
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def load_adapter(policy: Policy | PreTrainedModel, folder: Path | str) -> PeftModel:
    """Puts the LoRA adapter saved in `folder` on the model, trainable; safetensors only.

    Raises:
        AdapterError: the folder is not a LoRA adapter of this model, its weights are not safetensors or do not fit, or
            the model has an adapter already.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS_FILE
    for file in (folder / CONFIG_FILE, weights):
        if not file.is_file():
            raise AdapterError(f"{folder} is not an adapter: it has no {file.name}")
    config = read_adapter_config(folder)
    try:
        state = load_file(str(weights))
    except SafetensorError as error:
        raise AdapterError(f"{weights} is broken: {error}; take another checkpoint") from error
    base = policy.hf_model if isinstance(policy, Policy) else policy
    if isinstance(policy.model if isinstance(policy, Policy) else policy, PeftModel):
        raise AdapterError(f"the model has an adapter already; {folder} cannot be put on top of it")
    try:
        model = _wrap(base, config, seed=0)
    except Exception as error:  # PEFT computes with what the config says, whatever it is
        raise AdapterError(f"the adapter in {folder} does not fit {base.name_or_path!r}: {brief(error)}") from error
    try:
        load_adapter_state(model, state)
    except AdapterError as error:
        forget_adapters(model.unload())  # the base is as it was
        raise AdapterError(f"{weights}: {error}") from error
    if isinstance(policy, Policy):
        policy.model = model
        policy.acceleration.adapt(model)
    return model


def read_adapter_config(folder: Path) -> LoraConfig:
    """The config of the LoRA adapter saved in `folder`, without dropout.

    Raises:
        AdapterError: it cannot be read, or is of a kind that is not supported.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        given = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except Exception as error:  # PEFT makes whatever it is given into configs of its own
        raise AdapterError(f"{folder / CONFIG_FILE} cannot be read: {brief(error)}") from error
    if config.peft_type != PeftType.LORA:
        raise AdapterError(f"{folder} is a {config.peft_type} adapter; only LoRA is supported")
    # These rewrite the base's weights when they are put on, or add trained parts that other code here does not know.
    unsupported = {
        "init_lora_weights": config.init_lora_weights not in (True, False, "gaussian", "orthogonal"),
        "bias": config.bias != "none",
    }
    found = [f"{name}={getattr(config, name)!r}" for name, is_set in unsupported.items() if is_set]
    # PEFT leaves out, with a warning, what only a later version of it knows: a switch of a variant, or its settings.
    later = sorted(given.keys() - vars(config).keys())
    found += [f"{n}={given[n]!r}" for n in later if given[n] is True or (given[n] and isinstance(given[n], dict))]
    if found:
        raise AdapterError(f"{folder} is a LoRA variant that is not supported ({', '.join(found)})")
    config.inference_mode = False
    config.lora_dropout = 0.0
    config.init_lora_weights = True  # whatever it began with, its weights are in the file
    return config


def merge_adapter(policy: Policy | PeftModel) -> PreTrainedModel:
    """Adds the adapter to the base weights and takes it off: an ordinary model again, rounded to the base's dtype.

    Raises:
        AdapterError: there is no adapter, or a merged weight is not finite.
    """
    peft = _require_adapter(policy.model if isinstance(policy, Policy) else policy)
    back_to_the_base_dtype(peft)
    try:
        model = peft.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterError(f"the adapter cannot be merged: {error}") from error
    forget_adapters(model)
    if isinstance(policy, Policy):
        policy.model = model
    return model


@contextmanager
def reference_policy(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the adapter is off: the model is, bit for bit, the policy that reinforcement learning started from.

    Raises:
        AdapterError: the model has no adapter, so there is nothing that could be the reference.
    """
    peft = _require_adapter(model)
    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    with branches_off([layer for layer in peft.modules() if isinstance(layer, kinds)]):
        yield model


@contextmanager
def branches_off(layers: Sequence[Any]) -> Iterator[None]:
    """Within it those layers of PEFT's compute as the base does.

    What `disable_adapter` does, without its table of every layer's state, which takes longer than a decode step.
    """
    layers = [layer for layer in layers if not layer.disable_adapters]
    # PEFT marks adapters as trainable when it switches them on again, whatever they were before.
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _wrap(base: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    config.base_model_name_or_path = base.name_or_path or None
    training = base.training
    devices = sorted({p.device.index for p in base.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        # PEFT draws A on the CPU and moves it, so the seed means the same on every device.
        torch.manual_seed(seed)
        model = get_peft_model(base, config, autocast_adapter_dtype=True)
    model.train(training)
    keep_in_float32(model)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._cast_input_dtype = partial(_cast_input, layer._cast_input_dtype)
    return model


def _cast_input(
    own: Callable[[torch.Tensor, torch.dtype], torch.Tensor], x: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """PEFT's cast of a branch's input to the adapter's float32, where its product is computed in float32.

    Under autocast it is not: the product casts its input back, to the same numbers, and keeps that copy for the
    backward pass, one for each of the layers that have one input.
    """
    return x if torch.is_autocast_enabled(x.device.type) else own(x, dtype)


def forget_adapters(base: M) -> M:
    """Removes what PEFT leaves on a model without adapter: it would take a later one for a second."""
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def _require_adapter(model: nn.Module) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise AdapterError(f"{type(model).__name__} has no adapter; add one first (add_adapter)")
    return model


def _live_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's own tensors, not copies, under the names PEFT saves them by."""
    peft = _require_adapter(model)
    return get_peft_model_state_dict(peft, adapter_name=peft.active_adapter, save_embedding_layers=False)


def _on_host(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[count], for a copy to or from `device`: in memory that it reads by itself where it is a CUDA GPU."""
    return torch.empty(count, dtype=dtype, pin_memory=device.type == "cuda")


def _parts(flat: torch.Tensor, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`flat`, cut into as many numbers as each tensor has; no copies."""
    return dict(zip(live, flat.split([tensor.numel() for tensor in live.values()]), strict=True))


def _adapted_names(peft: PeftModel) -> list[str]:
    return [name for name, module in peft.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]


def add_run_adapter(policy: Policy, cfg: Config) -> None:
    """A fresh adapter, or with `data.rollouts.policy: adapter` that of the run whose rollouts are learnt from.

    Raises:
        AdapterError: the model does not take it.
        RunError: its file cannot be read.
    """
    add_adapter(policy, cfg.model.lora, derive_seed(cfg.run.seed, "adapter"))
    stored = cfg.data.rollouts
    if stored is not None and stored.policy == "adapter":
        load_adapter_state(policy.model, load_tensors(RunDir.at(stored.run).read_bytes(STARTING_ADAPTER)))
