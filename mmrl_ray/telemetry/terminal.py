"""Names and captions on a terminal, as they are: no markup, no emoji codes, no control sequences, nothing backwards.

Every table and every line that Rich prints goes through here.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """One line: line ends, control characters and marks that turn the direction of writing as their escapes."""
    return "".join(char.encode("unicode_escape").decode() if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return char in _BIDIRECTIONAL or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def plain(text: str, style: str = "") -> Text:
    """For a cell or a line."""
    return Text(visible(text), style=style)


def say(console: Console, text: str, style: str = "") -> None:
    """Prints one line, as long as it is."""
    console.print(plain(text, style), soft_wrap=True, highlight=False)


class PlainTable(Table):
    """A table whose title, headers and cells are shown as they are written."""

    def __init__(self, *, title: str | None = None, caption: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.title = None if title is None else plain(title, "table.title")
        self.caption = None if caption is None else plain(caption, "table.caption")

    def add_column(self, header: RenderableType = "", *args: Any, **settings: Any) -> None:
        """See `Table.add_column`."""
        super().add_column(_cell(header), *args, **settings)

    def add_row(self, *cells: RenderableType | None, **settings: Any) -> None:
        """See `Table.add_row`."""
        super().add_row(*map(_cell, cells), **settings)


def _cell(value: Any) -> Any:
    return plain(value) if isinstance(value, str) else value
