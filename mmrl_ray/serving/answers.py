"""What the decode loop made, as what a client is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmrl_ray.experience.carriers import Completion, FinishReason
from mmrl_ray.policy.decode import Event
from mmrl_ray.policy.token_bytes import TokenBytes
from mmrl_ray.serving.protocols import Choice, Delta, ServedFinishReason, TokenInfo


class Answers:
    """Makes choices and deltas. For one thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._bytes = TokenBytes(tokenizer)
        self._texts: dict[int, tuple[str, bytes]] = {}

    def choice(self, index: int, made: Completion) -> Choice:
        """A finished completion."""
        tokens = zip(made.token_ids.tolist(), made.logprobs.tolist(), strict=True)
        return Choice(index, made.text, _reason(made.finish_reason), tuple(self._token(*token) for token in tokens))

    def deltas(self, events: Sequence[Event]) -> list[Delta]:
        """What `events` add, one delta a choice."""
        by_row: dict[int, list[Event]] = {}
        for event in events:
            by_row.setdefault(event.row, []).append(event)
        return [
            Delta(
                index=row,
                text="".join(event.text for event in mine),
                tokens=tuple(self._token(event.token_id, event.logprob) for event in mine),
                finish_reason=None if mine[-1].finish_reason is None else _reason(mine[-1].finish_reason),
            )
            for row, mine in by_row.items()
        ]

    def _token(self, token: int, logprob: float) -> TokenInfo:
        known = self._texts.get(token)
        if known is None:
            data = self._bytes.of(token)
            # As OpenAI writes the bytes of a token that is part of a character.
            known = self._texts[token] = (data.decode("utf-8", "backslashreplace"), data)
        return TokenInfo(known[0], token, logprob, known[1])


def _reason(reason: FinishReason) -> ServedFinishReason:
    return "stop" if reason == "stop" else "length"
