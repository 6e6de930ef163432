"""Text while it is being generated: what each token adds, and where a stop string ends it.

Decoding all tokens again at every step costs T² over a completion. Here a step decodes only the last few: those since
the last place where the text was whole. A token can also end in the middle of a UTF-8 character; its text is held back
until the rest comes.

What one token stands for, in bytes: a tokenizer's `decode` of it alone loses parts of characters and spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""SentencePiece's mark of one."""


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


class TokenBytes:
    """Of byte-level BPE, of SentencePiece with its bytes for what it has no token for, and of word-level tokenizers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        kinds = _kinds(decoder)
        self._byte_of = {text: byte for byte, text in bytes_to_unicode().items()} if "ByteLevel" in kinds else {}
        marked = "Metaspace" in kinds or _SPACE in json.dumps(decoder, ensure_ascii=False)
        self._is_sentencepiece = marked or "ByteFallback" in kinds

    def of(self, token: int) -> bytes:
        """Nothing of a special token, as in a completion's text."""
        if token in self._tokenizer.all_special_ids:
            return b""
        if token in self._added:
            return self._tokenizer.decode([token], skip_special_tokens=True).encode()
        text = self._tokenizer.convert_ids_to_tokens(token)
        if self._byte_of and text is not None and all(character in self._byte_of for character in text):
            return bytes(self._byte_of[character] for character in text)
        if self._is_sentencepiece and text is not None:
            byte = _BYTE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()
        return self._tokenizer.decode([token], skip_special_tokens=True).encode("utf-8", "replace")


def _kinds(decoder: Any) -> set[str]:
    """Types of a decoder and of those in it."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*map(_kinds, decoder.get("decoders", ())))
