"""What vLLM's workers do beside their own: adapters that came in memory, and their products on CPUs, names that
transformers 5.23 writes, and the rules of a checkpoint's `generation_config.json`.

vLLM imports this file by name in each of its workers (`worker_extension_cls`), where there is nothing of this project:
it needs torch, transformers and vLLM alone. Its folder is on the path there, hence a name that nothing else has.

vLLM loads an adapter that it needs and does not have from the path in the request, and a path that is not there ends
the engine. Here no adapter has a path: one that was evicted is made again of the tensors that are held, under the same
id, for as long as any request may name it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

RULES = f"{Path(__file__).stem}:Rules"
"""For vLLM's argument `logits_processors`; and the key of `extra_args` under which requests bring their rules."""
PILLOW = "MMRL_VLLM_PILLOW"
"""Environment variable: pictures are resized by Pillow, as the owner's processor does, and not by torchvision."""
_SHARED = Path("/dev/shm")
_RANKS: dict[int, int] = {}
"""By the id of an adapter that is held: what it has, of the rank that vLLM keeps room for."""
_TOWER = r"^(?:model\.)?vision_tower\.(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm)\.)"


class Adapters:
    """Mixed into vLLM's worker; called by name, by `collective_rpc`."""

    model_runner: Any
    distributed_init_method: str

    def leave_nothing(self) -> None:
        """Takes away what would stay when all processes are killed at once, where they have met by a file, as on CPUs:
        the file, and the names of memory that they share and all have by now.
        """
        method = self.distributed_init_method
        if method.startswith("file://"):
            file = Path(method.removeprefix("file://"))
            for left in (file, *_SHARED.glob(f"{file.name}-*")):
                left.unlink(missing_ok=True)

    def hold_adapter(self, lora_id: int, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str:
        """Keeps these for requests with `lora_id`.

        Returns:
            Why it cannot; empty where it can. Never an error: of several workers vLLM would hear the first alone, and
            take the answers of the others for those to its next question.
        """
        try:
            self._hold(lora_id, tensors, config)
        except Exception as error:  # noqa: BLE001 - of vLLM's, whatever they are
            return " ".join(str(error).split()) or type(error).__name__
        return ""

    def _hold(self, lora_id: int, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
        manager = self.model_runner.lora_manager
        if not hasattr(manager, "held_adapters"):
            manager.held_adapters = {}
            manager._load_adapter = partial(_make, manager)
        made = _adapter(manager, lora_id, tensors, config)
        places = manager._adapter_manager
        packed = places.packed_modules
        known = {part for name in places.modules for part in (name, *packed.get(name, ()))}
        if unknown := sorted(made.loras.keys() - known):  # vLLM would leave them out without a word
            raise ValueError(
                f"vLLM has no place for {len(unknown)} of the adapter's {len(made.loras)} layers, such as {unknown[0]}"
            )
        manager.held_adapters[lora_id] = (tensors, config)
        _RANKS[lora_id] = max(layer.rank for layer in made.loras.values())

    def release_adapter(self, lora_id: int) -> None:
        """Lets go of them: no request names them any more."""
        manager = self.model_runner.lora_manager
        manager.remove_adapter(lora_id)
        getattr(manager, "held_adapters", {}).pop(lora_id, None)
        _RANKS.pop(lora_id, None)


def unlink_afterwards() -> None:
    """Has the process that unlinks shared memory after its users start in a group of its own, so that it outlives them.

    The parts of a model talk through hundreds of megabytes of it, which would stay if all of them were killed at once.
    """
    group = os.getpgrp()
    os.setpgid(0, 0)
    resource_tracker.ensure_running()
    os.setpgid(0, group)


def _make(manager: Any, request: Any) -> Any:
    """In the place of `_load_adapter`, which reads files."""
    return _adapter(manager, request.lora_int_id, *manager.held_adapters[request.lora_int_id])


def _adapter(manager: Any, lora_id: int, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_dict(dict(config))
    helper.validate_legal(manager.lora_config)
    model = manager._adapter_manager.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    made = LoRAModel.from_lora_tensors(
        lora_id,
        dict(tensors),
        helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    made.is_3d_lora_weight = False
    return made


def _read_later_names() -> None:
    """Towers of CLIP and SigLIP as transformers 5.23 saves them: without the `vision_model.` of vLLM's layers."""
    import regex
    from vllm.model_executor.models import gemma3_mm, llava, llava_next, llava_onevision, paligemma
    from vllm.model_executor.models.utils import WeightsMapper

    later = WeightsMapper(orig_to_new_regex={regex.compile(_TOWER): "vision_tower.vision_model."})
    for model in (
        gemma3_mm.Gemma3ForConditionalGeneration,
        llava.LlavaForConditionalGeneration,
        llava_next.LlavaNextForConditionalGeneration,
        llava_onevision.LlavaOnevisionForConditionalGeneration,
        paligemma.PaliGemmaForConditionalGeneration,
    ):
        model.hf_to_vllm_mapper = later | model.hf_to_vllm_mapper


def _do_without_video(processors: Any) -> None:
    """Folders whose processor was saved for still pictures: a video processor's own defaults take the file's place."""
    found = processors.get_video_processor_dict.__func__

    def read(cls: type, path: Any, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return found(cls, path, **settings)
        except OSError:
            return {}, settings

    processors.get_video_processor_dict = classmethod(read)


def _do_without_numerals() -> None:
    """SmolVLM's processor is not made without a package that spells the times of a video's frames."""
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = getattr(processing_smolvlm, "num2words", None) or str


def _resize_by_pillow(processors: Any) -> None:
    made = processors.from_pretrained.__func__

    def load(cls: type, *args: Any, **settings: Any) -> Any:
        settings.setdefault("backend", "pil")
        return made(cls, *args, **settings)

    processors.from_pretrained = classmethod(load)


def _prepare() -> None:
    from transformers import AutoImageProcessor
    from transformers.video_processing_utils import BaseVideoProcessor
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: f"{__name__}.AdaptersOnCPU")

    _read_later_names()
    _do_without_video(BaseVideoProcessor)
    _do_without_numerals()
    if os.environ.get(PILLOW):
        _resize_by_pillow(AutoImageProcessor)


@dataclass(frozen=True)
class _Rows:
    """Those of a batch that have one adapter."""

    place: int
    """In vLLM's stacks of matrices [places, 1, …]."""
    rank: int | None
    """None: as much as there is room for."""
    at: torch.Tensor | slice


def _rows_of(ids: Sequence[int], places: Mapping[int, int], *, cut: bool) -> list[_Rows]:
    """By the id of each row's adapter, 0 where it has none."""
    found = []
    of = torch.tensor(ids)
    for id in dict.fromkeys(ids):
        if id > 0:
            at = (of == id).nonzero()[:, 0]
            alone = len(at) == len(ids)
            found.append(_Rows(places[id], _RANKS.get(id) if cut else None, slice(None) if alone else at))
    return found


def _shrink(found: Sequence[_Rows], y: torch.Tensor, x: torch.Tensor, stacked: torch.Tensor, scale: float) -> None:
    """`y = x Aᵀ · scale`, with x [N, in], A [places, 1, rank, in] and y [N, rank] in float32, which is 0 before."""
    for rows in found:
        a = stacked[rows.place].flatten(0, -2)[: rows.rank].to(y.dtype)
        y[rows.at, : len(a)] = torch.mm(x[rows.at].to(y.dtype), a.T).mul_(scale)


def _expand(found: Sequence[_Rows], y: torch.Tensor, x: torch.Tensor, stacked: torch.Tensor, *, is_added: bool) -> None:
    """`y += x Bᵀ`, or `y = x Bᵀ`, with x [N, rank], B [places, 1, out, rank] and y [N, out or more]."""
    for rows in found:
        b = stacked[rows.place].flatten(0, -2)[:, : rows.rank].to(x.dtype)
        made = torch.mm(x[rows.at, : b.shape[1]], b.T).to(y.dtype)
        wide = min(y.shape[1], made.shape[1])  # one of them may be padded
        if is_added:
            y[rows.at, :wide] += made[:, :wide]
        else:
            y[rows.at, :wide] = made[:, :wide]


@cache
def _generation_rules() -> Any:
    """The project's own `rules.py`, which needs nothing else of it."""
    place = Path(__file__).parents[1] / "rules.py"
    spec = importlib.util.spec_from_file_location("mmrl_generation_rules", place)
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def _ruled(asked: Mapping[str, Any]) -> Callable[[list[int], list[int], torch.Tensor], torch.Tensor]:
    """For one request: its prompt, what it has said and the logits [V] of its next token to those under the rules."""
    rules = _generation_rules().GenerationRules(asked["asked"], tuple(asked["eos"]))
    least: int | None = asked["min_new_tokens"]
    made: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = []

    def apply(prompt: list[int], said: list[int], logits: torch.Tensor) -> torch.Tensor:
        device = logits.device
        if not made:
            ids = torch.tensor(prompt, device=device)
            made.append(rules.processors(ids, min_new_tokens=least, max_new_tokens=asked["max_new_tokens"]))
        changed = made[0](torch.tensor([prompt + said], device=device), logits[None].clone())[0]
        if len(said) < (least or 0):
            changed[list(rules.eos)] = -torch.inf
        return changed

    return apply


if "vllm" in sys.modules:  # which imports this
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Rules(AdapterLogitsProcessor):
        """Rows under the rules that their requests bring."""

        def is_argmax_invariant(self) -> bool:
            """They may choose another likeliest token."""
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            """What is called for a request at each of its tokens; None where it brings no rules."""
            asked = (params.extra_args or {}).get(RULES)
            return None if asked is None else _ruled(asked)

    class AdaptersOnCPU(PunicaWrapperCPU):
        """The products of adapters, one for all rows of an adapter, with the rank that it has.

        vLLM's own copies the matrices of a row's adapter for each row, with as much of them as there is room for: at a
        rank of 256 that took ten seconds a caption. And it takes the last place's adapter for rows that have none.
        """

        def __init__(self, *args: Any, lora_config: Any, **settings: Any) -> None:
            super().__init__(*args, lora_config=lora_config, **settings)
            self._cut = not lora_config.fully_sharded_loras
            """Whether ranks stand together; parts of a model that each have a part of a rank fill up each of them."""
            self._tokens: list[_Rows] = []
            self._prompts: list[_Rows] = []

        def update_metadata(
            self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **settings: Any
        ) -> None:
            """Which rows of the next step are whose."""
            super().update_metadata(mapping, lora_index_to_id, *args, **settings)
            places = {id: place for place, id in enumerate(lora_index_to_id) if id is not None}
            self._tokens = _rows_of(mapping.index_mapping, places, cut=self._cut)
            self._prompts = _rows_of(mapping.prompt_mapping, places, cut=self._cut)

        def _apply_shrink(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
            _shrink(self._tokens, y.view(-1, y.shape[-1]), x, w_t_all, scale)

        def _apply_expand(
            self,
            y: torch.Tensor,
            x: torch.Tensor,
            w_t_all: torch.Tensor,
            y_offset: int,
            y_slice_size: int,
            add_inputs: bool = True,
        ) -> None:
            _expand(self._tokens, y[:, y_offset : y_offset + y_slice_size], x, w_t_all, is_added=add_inputs)

        def add_lora_embedding(
            self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **_: Any
        ) -> None:
            """What an embedding's adapter adds to `y`; `x` is its first half."""
            _expand(self._tokens, y, x, lora_b_stacked, is_added=add_inputs)

        def add_lora_logits(
            self,
            y: torch.Tensor,
            x: torch.Tensor,
            lora_a_stacked: torch.Tensor,
            lora_b_stacked: torch.Tensor,
            scale: float,
            **_: Any,
        ) -> None:
            """What the head's adapter adds to the logits, of which there is a row a completion."""
            x = x.view(-1, x.shape[-1])
            between = torch.zeros((len(x), lora_b_stacked.shape[-1]), dtype=torch.float32)
            _shrink(self._prompts, between, x, lora_a_stacked, scale)
            _expand(self._prompts, y.view(-1, y.shape[-1]), between, lora_b_stacked, is_added=True)

    _prepare()
