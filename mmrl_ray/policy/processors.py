"""Processors for still pictures.

Those of Qwen-VL, InternVL, SmolVLM, Gemma 4 and others also hold a video processor, which transformers builds on
torchvision alone. Captioning needs none: they are loaded without it, with or without torchvision, so that a folder
saved by one machine loads on the other. Pictures go through torchvision where it is installed, else through Pillow.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

_VIDEO = "video_processor"


def load_processor(path: str, config: Any, *, revision: str | None = None) -> Any:
    """What `AutoProcessor.from_pretrained` gives, without a video processor.

    Raises:
        ImportError: the processor needs a library that is not installed.
        OSError: a file is missing.
        ValueError: a file does not fit.
    """
    if type(config) in PROCESSOR_MAPPING:
        known: Any = PROCESSOR_MAPPING[type(config)]
        if _VIDEO in known.get_attributes():
            return stills_only(known).from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    return AutoProcessor.from_pretrained(path, revision=revision or "main", trust_remote_code=False)


class NoVideo:
    """Stands where a processor keeps its video processor; it processes nothing, and every setting of it is None."""

    _auto_class = None
    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> None:
        """Processors read settings of their video processor when they are made, each its own."""
        if name.startswith("_") or name == "to_dict":
            raise AttributeError(name)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> list[str]:
        """Writes nothing."""
        return []


@cache
def stills_only(processor_class: Any) -> Any:
    """A subclass of a processor class whose video processor is `NoVideo`; it loads and saves like its parent."""
    names = processor_class.get_attributes()
    # Whatever else a processor holds (of audio, a second tokenizer) is loaded by its parent's own way.
    others = [name for name in names if name != _VIDEO]
    without = type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(lambda cls: others)})

    def from_folder(cls: Any, path: str, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        loader: Any = without
        found = dict(zip(others, loader._get_arguments_from_pretrained(path, processor_dict, **kwargs), strict=True))
        return [found[name] if name in found else NoVideo() for name in names]

    def check(self: Any, name: str, argument: Any) -> Any:
        return NoVideo if name == _VIDEO else processor_class.check_argument_for_proper_class(self, name, argument)

    def to_dict(self: Any) -> dict[str, Any]:
        return {name: value for name, value in processor_class.to_dict(self).items() if name != _VIDEO}

    members = {
        "__module__": __name__,
        "_get_arguments_from_pretrained": classmethod(from_folder),
        "check_argument_for_proper_class": check,
        "to_dict": to_dict,
    }
    return type(processor_class.__name__, (processor_class,), members)
