"""The strict base of every section of a config, and how one refuses what does not fit together."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Strict and frozen: an unknown key or another type is an error, and nobody changes a config after it was read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def refuse(problems: Mapping[str, bool]) -> None:
    """Raise one ValueError with a line for each message that holds, so that a user reads them all at once."""
    found = [message for message, holds in problems.items() if holds]
    if found:
        raise ValueError("\n".join(found))
