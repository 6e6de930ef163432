"""Processors for still pictures: those of Qwen-VL, InternVL and SmolVLM also hold a video processor, which transformers
builds on torchvision alone. Captioning needs none, so where torchvision is missing they are loaded without it."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


def load_processor(path: str, config: Any, *, revision: str | None = None) -> Any:
    """`AutoProcessor.from_pretrained`, without a video processor where torchvision is not installed.

    Raises:
        ImportError: the processor needs a library that is not installed.
        OSError: a file is missing.
        ValueError: a file does not fit.
    """
    if not is_torchvision_available() and type(config) in PROCESSOR_MAPPING:
        known: Any = PROCESSOR_MAPPING[type(config)]
        if "video_processor" in known.get_attributes():
            return stills_only(known).from_pretrained(path, revision=revision or "main")
    return AutoProcessor.from_pretrained(path, revision=revision or "main", trust_remote_code=False)


class NoVideo:
    """Stands where a processor keeps its video processor; it has no settings and processes nothing."""

    _auto_class = None
    num_frames = None
    fps = None
    model_input_names: tuple[str, ...] = ()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> list[str]:
        """Writes nothing."""
        return []


@cache
def stills_only(processor_class: Any) -> Any:
    """A subclass of a processor class whose video processor is `NoVideo`; it loads and saves like its parent."""

    def from_folder(cls: Any, path: str, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        loaders: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
        return [
            NoVideo()
            if name == "video_processor"
            else loaders[name].from_pretrained(path, trust_remote_code=False, **kwargs)
            for name in cls.get_attributes()
        ]

    def check(self: Any, name: str, argument: Any) -> Any:
        return (
            NoVideo
            if name == "video_processor"
            else processor_class.check_argument_for_proper_class(self, name, argument)
        )

    def to_dict(self: Any) -> dict[str, Any]:
        return {name: value for name, value in processor_class.to_dict(self).items() if name != "video_processor"}

    members = {
        "__module__": __name__,
        "_get_arguments_from_pretrained": classmethod(from_folder),
        "check_argument_for_proper_class": check,
        "to_dict": to_dict,
    }
    return type(processor_class.__name__, (processor_class,), members)
