"""The boundary to what a checkpoint brings along: its config, processor, tokenizer, chat template and model.

That is code of others, run on files of others: it raises whatever comes up deep inside it. Every call that is made
while a policy is loaded goes through `model_call`, which makes one error of the project's out of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError

from mmrl_ray.errors import MMRLError, ModelError

_BRIEF = 300
_PLAIN = (OSError, ValueError, RuntimeError, TemplateError)


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
    text = " ".join(str(error).split()) or "no message"
    if not isinstance(error, _PLAIN):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 1]}…"
