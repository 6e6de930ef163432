"""What one token stands for, in bytes: a tokenizer's `decode` of it alone loses parts of characters and spaces."""

from __future__ import annotations

import json
import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""SentencePiece's mark of one."""


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
