"""A checkpoint as files of others: the boundary to what they bring along, their weights, and the key that names them.

Config, processor, tokenizer, chat template and model are code of others, run on files of others: it raises whatever
comes up deep inside it. Every call that is made while a policy is loaded goes through `model_call`, which makes one
error of the project's out of that.

The key is of every byte that weights and processor are read from. A large file costs about a second for each 2.5 GB on
two cores (a model of 3 B parameters in bfloat16: 3 s), once a machine: its digest is kept in the user's cache, under
everything by which the file system would show that it changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jinja2 import TemplateError
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, core_model_loading
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data import atomic
from mmrl_ray.errors import ConfigError, MMRLError, ModelError, one_line

logger = logging.getLogger(__name__)

WEIGHTS_REMEDY = (
    "fetch the checkpoint again, as safetensors; where it does not support an attention, set model.attn_implementation"
)
_BRIEF = 300
_PLAIN = (OSError, ValueError, RuntimeError, TemplateError)
_SHOWN = 3
_SUFFIXES = (".json", ".safetensors", ".jinja")
_READ_WHOLE = 64 << 20
"""Larger files are hashed in blocks of this size, several at a time."""
_READ = 1 << 20
_THREADS = 8
_SETTLED_S = 2.0
"""A file that changed less long ago may change again within the clock's resolution: its digest is not kept."""
_OLD_BLOCKS = 16


@contextmanager
def model_call(model: str, failed: str, remedy: str = "") -> Iterator[None]:
    """Within it every error becomes a ModelError; those of the project pass as they are.

    Args:
        model: what the user calls the checkpoint.
        failed: what was called, as words that can stand before a colon: "its weights cannot be loaded".
        remedy: what to do about it.

    Raises:
        ModelError: naming the model, what was called, what it said and the remedy.
    """
    try:
        yield
    except MMRLError:
        raise
    except Exception as error:
        if isinstance(error, ImportError):
            remedy = "install the library that it asks for (torchvision, most often)"
        raise ModelError(f"model {model!r}: {failed}: {brief(error)}{f'; {remedy}' if remedy else ''}") from error


def brief(error: BaseException) -> str:
    """What another library says, in one line; with the kind of error where the text alone says little."""
    text = one_line(error) or "no message"
    if not isinstance(error, _PLAIN):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 1]}…"


def examples(names: Sequence[str]) -> str:
    """The first few of `names` in brackets, for a message; nothing for none."""
    if not names:
        return ""
    return f" ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"


def skeleton_of_files(folder: Path, cfg: ModelSection, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, loaded as ever (names are converted, experts stacked), but from headers alone.

    Raises:
        ModelError: a file is missing or broken, or its tensors are not the model's.
    """
    with model_call(cfg.path, "its weights cannot be loaded", WEIGHTS_REMEDY):
        shapes: dict[str, torch.Tensor] = {}
        for file in weight_files(folder, cfg.path):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    shapes[name] = torch.empty(opened.get_slice(name).get_shape(), dtype=dtype, device="meta")
        model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=shapes,
            device_map="meta",
            dtype=dtype,
            attn_implementation="sdpa" if cfg.attn_implementation == "flash_attention_2" else cfg.attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_unfit(info, cfg)
    return cast(PreTrainedModel, model)


def split_while_read(model_class: Any, split: Callable[[nn.Module], None], cfg: ModelSection) -> Any:
    """A `model_class` whose `from_pretrained` splits the decoder's layers, and reads of them what `split` leaves here.

    A layer is split on the meta device, and of its tensors the slices of this process alone are read: all others it
    never sees. Where a checkpoint's tensors are not a layer's own (experts one by one, to be stacked; fused or turned
    ones), a slice of them is no slice of what they become: such a layer is read whole, converted, and then split, one
    at a time. Names, ties, dtypes and buffers are transformers' affair as ever.

    Args:
        model_class: of transformers.
        split: makes the frozen parameters of a layer, on the meta device or not, `DTensor`s in place (`fully_shard`).
        cfg: for messages.

    Returns:
        a class for loading alone; a model of it says so: give it `model_class` back. Its `from_pretrained` raises
        ModelError where a tensor of a layer is missing or has another shape.
    """
    read: Callable[..., Any] = model_class._load_pretrained_model

    def read_in_parts(model: Any, _: Any, files: Sequence[str], how: Any, expected: Any = None) -> Any:
        layers, prefix = _decoder_layers(model)
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            sources = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
            places = _places(model, sources, how.weight_mapping or [], prefix)
            whole = {place.layer for place in places.values() if place.is_converted}
            later = {name: place.layer for name, place in places.items() if place.layer in whole}
            # A slice of a tensor of another shape may look like the right one.
            unfit = {
                (place.target, tuple(shape), tuple(place.shape))
                for name, place in places.items()
                if name not in later and (shape := sources[name].get_shape()) != [*place.shape]
            }
            if whole:  # by way of host memory: on a GPU room is made for all of such layers before they are split
                how = replace(how, device_map=None)
            for index, layer in enumerate(layers):
                if index not in whole:
                    split(layer.requires_grad_(False))
            found, offloaded = read(model, {n: s for n, s in sources.items() if n not in later}, None, how, expected)
            for index in sorted(whole):
                also, _ = read(model, {n: sources[n] for n, its in later.items() if its == index}, None, how, expected)
                split(layers[index].requires_grad_(False))
                for parameter in layers[index].parameters():
                    cast(Any, parameter)._is_hf_initialized = True  # or transformers would draw it anew
                found.missing_keys &= also.missing_keys
                found.unexpected_keys |= also.unexpected_keys
                unfit |= also.mismatched_keys
                found.conversion_errors.update(also.conversion_errors)
        # Not left to transformers: it would draw what is missing, and drawing a part waits for all other processes.
        missing = found.missing_keys & {prefix + name for name, _ in layers.named_parameters()}
        refuse_unfit({"missing_keys": missing, "mismatched_keys": unfit}, cfg)
        return found, offloaded

    own = {"_load_pretrained_model": staticmethod(read_in_parts), "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), own)


def _decoder_layers(model: Any) -> tuple[nn.ModuleList, str]:
    """The layers of a model's decoder, and what the names of their parameters begin with."""
    layers = decoder_layers(model.get_decoder(), model.name_or_path)
    return layers, next(f"{name}." for name, module in model.named_modules() if module is layers)


def decoder_layers(decoder: nn.Module, path: str) -> nn.ModuleList:
    """The layers that a decoder's weights are split by.

    Raises:
        ConfigError: it has no list of them.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"{path}: {type(decoder).__name__} has no list of layers to split; set learner.sharding: none"
        )
    return layers


class _Place(NamedTuple):
    """Where a tensor of a file goes in a decoder's layer."""

    layer: int
    target: str
    shape: torch.Size
    is_converted: bool


def _places(model: Any, names: Iterable[str], mapping: list[Any], prefix: str) -> dict[str, _Place]:
    """Of each tensor that goes into a layer; found out as transformers does."""
    mapping = deepcopy(mapping)  # they note what they were used for
    renamings = [step for step in mapping if isinstance(step, core_model_loading.WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, core_model_loading.WeightConverter)]
    there, begins = model.state_dict(), model.base_model_prefix
    found: dict[str, _Place] = {}
    for name in sorted(names, key=core_model_loading.dot_natural_key):
        target, pattern = core_model_loading.rename_source_key(name, renamings, converters, begins, there)
        if target not in there and name in there:
            target, pattern = core_model_loading.rename_source_key(name, [], [], begins, there)
        if target in there and target.startswith(prefix):
            index = int(target.removeprefix(prefix).split(".")[0])
            found[name] = _Place(index, target, there[target].shape, pattern is not None)
    return found


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files that transformers would load the weights of model `name` from.

    Raises:
        ModelError: one of them is not in `folder`.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = [SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_NAME).is_file() and index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"model {name!r}: its weights cannot be loaded: its folder lacks {missing[0]}{more}; "
            "fetch the checkpoint again, as safetensors"
        )
    return [folder / file for file in files]


def refuse_unfit(info: Mapping[str, Any], cfg: ModelSection) -> None:
    """Where transformers would go on with random weights and a warning.

    Raises:
        ModelError: of the loading report `info`, tensors are missing, unknown or of another shape.
    """
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"model {cfg.path!r}: its weight files lack {len(missing)} tensors, the first {missing[0]!r}; "
            "fetch the checkpoint again"
        )
    # Those that transformers knows as harmless for this model are not among them.
    extra = sorted(info.get("unexpected_keys") or ())
    if extra:
        raise ModelError(
            f"model {cfg.path!r}: its weight files hold {len(extra)} tensors that the model by its config.json has no "
            f"place for{examples(extra)}; without them it is another model: fetch the checkpoint again, with the "
            "config.json that belongs to it"
        )
    unfit = sorted(info.get("mismatched_keys") or ())
    if unfit:
        name, have, want = unfit[0]
        raise ModelError(
            f"model {cfg.path!r}: {len(unfit)} tensors of its weight files have other shapes than its config says, the "
            f"first {name!r}: {list(have)}, not {list(want)}; config.json and weights are of different checkpoints"
        )


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of a hub's model in the cache from which transformers loads it; None where none is known.

    Configs of transformers 5 do not say it.

    Raises:
        ModelError: it can be neither found nor fetched.
    """
    with model_call(name, "it is no folder, and as a hub id its config.json cannot be read"):
        return extract_commit_hash(cached_file(name, CONFIG_NAME, revision=revision), None)


def revision_key_of(path: str, cfg: ModelSection, commit: str | None) -> str:
    """16 hex digits: of the hub's commit, or of the folder's configs and weights."""
    return _key(path, cfg.processor, commit or cfg.revision, _add_large_file)


def is_revision(key: str, found: str, path: str, processor: Mapping[str, Any], revision: str | None = None) -> bool:
    """Whether `key`, kept by somebody, names the model at `path` and `revision`, whose key is `found`.

    Keys that earlier versions kept saw only samples of files above 64 MiB, and of a hub's model no commit; they still
    name what they named.
    """
    return key == found or key == _key(path, processor, revision, _add_samples)


def _key(path: str, processor: Mapping[str, Any], revision: str | None, add_large: Callable[[Path, Any], None]) -> str:
    digest = hashlib.sha256(repr(sorted(processor.items())).encode())
    if not os.path.isdir(path):
        digest.update(f"{path}@{revision}".encode())
        return digest.hexdigest()[:16]
    for file in sorted(Path(path).iterdir()):
        if file.suffix in _SUFFIXES:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            if size <= _READ_WHOLE:
                digest.update(file.read_bytes())
            else:
                add_large(file, digest)
    return digest.hexdigest()[:16]


def _add_large_file(file: Path, digest: Any) -> None:
    digest.update(bytes.fromhex(_digest_of(file)))


def _add_samples(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        for block in range(_OLD_BLOCKS):
            stream.seek(block * (size - _READ) // (_OLD_BLOCKS - 1))
            digest.update(stream.read(_READ))


def _digest_of(file: Path) -> str:
    """Hex digest of a large file's content, from the cache where it is known."""
    before = _identity(file)
    kept = _cache_folder() / hashlib.sha256(before.encode()).hexdigest()
    try:
        known = kept.read_text(encoding="ascii")
        if len(known) == hashlib.sha256().digest_size * 2:
            return known
    except (OSError, UnicodeDecodeError):  # not there, or not to be read: it is only a cache
        pass
    found = _content_digest(file)
    changed = file.stat().st_ctime
    if _identity(file) == before and time.time() - changed > _SETTLED_S:
        try:
            atomic.write_file(kept, found.encode())
        except OSError as error:  # no home, a full disk: the next process reads the file again
            logger.debug("the digest of %s is not kept: %s", file, error)
    return found


def _content_digest(file: Path) -> str:
    starts = range(0, file.stat().st_size, _READ_WHOLE)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, len(starts))) as pool:
        blocks = pool.map(lambda start: _block_digest(file, start), starts)
        return hashlib.sha256(b"".join(blocks)).hexdigest()


def _block_digest(file: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        for _ in range(_READ_WHOLE // _READ):
            digest.update(stream.read(_READ))
    return digest.digest()


def _identity(file: Path) -> str:
    """Changes whenever the file does: a copy with the old time stamp has another inode or status change."""
    stat = file.stat()
    place = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return f"{file.resolve()}:{':'.join(map(str, place))}"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmrl_ray" / "digests"
