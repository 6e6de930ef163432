"""Text while it is being generated: what each token adds, and where a stop string ends it.

Decoding all tokens again at every step costs T² over a completion. Here a step decodes only the last few: those since
the last place where the text was whole. A token can also end in the middle of a UTF-8 character; its text is held back
until the rest comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def cut_at_stop(text: str, stop: Sequence[str], start: int = 0) -> str | None:
    """`text` before the first of the stop strings that begins at `start` or later; None if there is none."""
    found = [at for at in (text.find(s, start) for s in stop) if at >= 0]
    return text[: min(found)] if found else None


class TextStream:
    """The text of one row. `text` is all that was reported so far; it never holds any part of a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max((len(s) for s in self._stop), default=0)
        self._ids: list[int] = []
        self._whole = 0
        """Tokens before this one are in `_seen`."""
        self._context = 0
        """Decoding starts here, a little before `_whole`: some tokenizers drop the space before their first token."""
        self._context_text = ""
        self._seen = ""
        """All text, the part that may yet turn out to be a stop string included."""

    def push(self, token: int) -> tuple[str, bool]:
        """What `token` adds to the text, and whether it completed a stop string."""
        self._ids.append(token)
        tail = self._decode(self._ids[self._context :])
        if tail.endswith(_INCOMPLETE) or len(tail) <= len(self._context_text):
            return "", False
        return self._take(tail)

    def finish(self) -> str:
        """What was held back, at the end of the row."""
        held = self._seen[len(self.text) :]
        rest = self._decode(self._ids[self._context :])[len(self._context_text) :]
        self.text = self._seen + rest
        return held + rest

    def _take(self, tail: str) -> tuple[str, bool]:
        before = len(self._seen)
        self._seen += tail[len(self._context_text) :]
        self._context, self._whole = self._whole, len(self._ids)
        self._context_text = self._decode(self._ids[self._context : self._whole])
        reported = len(self.text)
        cut = cut_at_stop(self._seen, self._stop, max(0, before - self._longest + 1))
        if cut is not None:
            self.text = cut
            return cut[reported:], True
        self.text = self._seen[: len(self._seen) - self._held()]
        return self.text[reported:], False

    def _held(self) -> int:
        """Characters at the end that are the beginning of some stop string."""
        longest = min(self._longest - 1, len(self._seen))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._seen[-n:]) for s in self._stop)), 0)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
