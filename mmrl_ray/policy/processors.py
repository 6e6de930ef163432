"""Processors for still pictures.

Those of Qwen-VL, InternVL and SmolVLM also hold a video processor, which transformers builds on torchvision alone.
Captioning needs none: they are loaded without it, with or without torchvision, so that a folder saved by one machine
loads on the other. Pictures go through torchvision where it is installed, else through Pillow.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

# Not from the top: transformers 5.17 hides it there where torchvision is missing, though its Pillow half works.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING


def load_processor(path: str, config: Any, *, revision: str | None = None) -> Any:
    """What `AutoProcessor.from_pretrained` gives, without a video processor.

    Raises:
        ImportError: the processor needs a library that is not installed.
        OSError: a file is missing.
        ValueError: a file does not fit.
    """
    if type(config) in PROCESSOR_MAPPING:
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
