"""HTTP requests that must each get the answer named here, soon, and leave the server as it was."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.corpus import pictures, uris
from tests.corpus.uris import GOOD, data_uri

MODEL = "tiny"
"""What the server that gets these calls its model."""
CHAT, CAPTIONS, REWARDS, SCORE = "/v1/chat/completions", "/v1/captions", "/v1/rewards", "/v1/score"
JSON = "application/json"


@dataclass(frozen=True)
class Case:
    """One request and its answer's status."""

    name: str
    path: str
    body: Callable[[], bytes]
    """Made when it is sent: some are large."""
    status: int = 400
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


def image_part(url: str) -> dict[str, Any]:
    """A picture in a message."""
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    """A text in a message."""
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": list(parts)}]


def chat(**changes: Any) -> dict[str, Any]:
    """A conversation that is answered, but for `changes`."""
    messages = user(text_part("describe"), image_part(GOOD))
    return {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0, **changes}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _case(name: str, path: str, value: Any, status: int = 400) -> Case:
    """`value` is JSON, or makes it."""
    return Case(name, path, lambda: _json(value() if callable(value) else value), status)


def _raw(name: str, body: bytes | Callable[[], bytes], status: int = 400, path: str = CHAT, **more: Any) -> Case:
    return Case(name, path, body if callable(body) else lambda: body, status, **more)


def form(*parts: tuple[str, bytes], boundary: bytes = b"xyz", file_name: bytes = b"a.png") -> bytes:
    """A multipart body; a part called `image` is a file."""
    body = b""
    for name, content in parts:
        named = b'; filename="%s"' % file_name if name == "image" else b""
        head = b'Content-Disposition: form-data; name="%s"%s' % (name.encode(), named)
        body += b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, head, content)
    return body + b"--%s--\r\n" % boundary


FORM = "multipart/form-data; boundary=xyz"


def _picture_cases() -> Iterator[Case]:
    for name, make in pictures.BAD.items():
        yield Case(f"upload-{name}", CAPTIONS, lambda make=make: form(("image", make())), content_type=FORM)  # type: ignore[misc]
        kind = "gif" if "gif" in name else "webp" if "webp" in name else "jpeg" if "jpeg" in name else "png"
        yield _case(
            f"chat-{name}",
            CHAT,
            lambda make=make, kind=kind: chat(messages=user(image_part(data_uri(make(), f"image/{kind}")))),
        )
    for name, make_uri in uris.BAD.items():
        yield _case(f"caption-uri-{name}", CAPTIONS, lambda make=make_uri: {"image": make()})
        yield _case(f"chat-uri-{name}", CHAT, lambda make=make_uri: chat(messages=user(image_part(make()))))
        yield _case(f"reward-uri-{name}", REWARDS, lambda make=make_uri: {"image": make(), "captions": ["a"]})
    for number, url in enumerate(uris.URLS):
        yield _case(f"url-{number}-{url[:40]}", CHAT, chat(messages=user(image_part(url))))
        yield _case(f"caption-url-{number}", CAPTIONS, {"image": url})


NUMBERS: dict[str, list[str]] = {
    "n": ["1000000000", "0", "-1", "1.5", '"4"', "true", "1e3", "9" * 4000, "NaN", "[]"],
    "temperature": ["NaN", "Infinity", "-Infinity", "1e999", "-0.1", "3", '"hot"', "[]", "{}"],
    "top_p": ["NaN", "1.1", "-1"],
    "max_tokens": ["0", "-1", "1000000000", "1.5", "NaN", "9" * 400, '"all"'],
    "max_completion_tokens": ["0", "1000000000"],
    "seed": ["1.5", "9" * 40, '"x"', "NaN"],
    "top_logprobs": ["5", "-1"],
    "frequency_penalty": ["1", "NaN"],
    "stop": ['""', "[" + ",".join(['"a"'] * 1000) + "]", "1", "{}", "[null]"],
    "stream": ['"yes"', "1"],
    "logit_bias": ['{"1": 100}'],
    "tools": ['[{"type": "function"}]'],
    "response_format": ['{"type": "json_object"}'],
    "temprature": ["1"],
    "model": ["null", "1", '"\\ud800"'],
}
"""Raw JSON by parameter of a chat completion."""


def _number_cases() -> Iterator[Case]:
    for key, values in NUMBERS.items():
        for value in values:
            fields = {name: json.dumps(each) for name, each in chat().items() if name != key}
            text = ",".join(f'"{name}":{each}' for name, each in {**fields, key: value}.items())
            yield _raw(f"{key}={value[:20]}", f"{{{text}}}".encode())
    yield _case("two-limits", CHAT, chat(max_completion_tokens=5))


def _message_cases() -> Iterator[Case]:
    for name, messages in {
        "none": [],
        "null": None,
        "text": "hello",
        "numbers": [1, 2],
        "no-content": [{"role": "user"}],
        "null-content": [{"role": "user", "content": None}],
        "no-role": [{"content": "a"}],
        "tool-role": [{"role": "tool", "content": "a"}],
        "unknown-part": user({"type": "video_url", "video_url": {"url": GOOD}}),
        "part-of-two-types": user({"type": "text", "text": "a", "image_url": {"url": GOOD}}),
        "image-without-url": user({"type": "image_url"}),
        "image-as-text": user({"type": "image_url", "image_url": "photo.jpg"}),
        "image-that-is-null": user({"type": "image_url", "image_url": {"url": None}}),
        "path": user({"type": "image_url", "image_url": {"url": GOOD, "path": "/etc/passwd"}}),
    }.items():
        yield _case(f"messages-{name}", CHAT, chat(messages=messages))
    yield _case("10000-images", CHAT, lambda: chat(messages=user(*[image_part(GOOD)] * 10_000)))
    yield _case("100000-messages", CHAT, lambda: chat(messages=[{"role": "user", "content": "a"}] * 100_000))
    yield _case("long-text", CHAT, lambda: chat(messages=user(text_part("word " * 200_000), image_part(GOOD))))
    yield _case("past-the-context", CHAT, lambda: chat(messages=user(text_part("red " * 3000), image_part(GOOD))))
    for role in ("system", "user", "assistant"):
        turn = {"role": role, "content": "look at <image> here"}
        yield _case(f"image-mark-of-{role}", CHAT, chat(messages=[turn, *user(image_part(GOOD))]))
    yield _case("image-mark-in-a-prompt", CAPTIONS, {"image": GOOD, "prompt": "<image>"})
    for name, text in {"lone-surrogate": r"\ud800", "reversed-pair": r"\udc00\ud800", "cut-escape": r"\u12"}.items():
        body = _json(chat(messages=user(text_part("TEXT"), image_part(GOOD)))).replace(b"TEXT", text.encode())
        yield _raw(name, body)
        prompt = _json({"image": GOOD, "prompt": "TEXT"}).replace(b"TEXT", text.encode())
        yield _raw(f"{name}-in-a-prompt", prompt, path=CAPTIONS)
        caption = _json({"captions": ["TEXT"]}).replace(b"TEXT", text.encode())
        yield _raw(f"{name}-in-a-caption", caption, path=REWARDS)
    for name, model in {
        "unknown": "nobody",
        "empty": "",
        "up": "../../etc/passwd",
        "version": f"{MODEL}@7",
        "path": f"/{MODEL}",
        "zero": "tiny\0",
        "long": "a" * 100_000,
        "hub": "gpt-4o",
    }.items():
        yield _case(f"model-{name}", CHAT, chat(model=model), 404)
        if model:  # without one, or with an empty one, the server's default answers
            yield _case(f"caption-model-{name}", CAPTIONS, {"image": GOOD, "model": model}, 404)


def _body_cases() -> Iterator[Case]:
    for path in (CHAT, CAPTIONS, REWARDS, SCORE):
        for name, body in {
            "empty": b"",
            "list": b"[]",
            "text": b'"hello"',
            "number": b"1",
            "null": b"null",
            "nan": b"NaN",
            "object": b"{}",
            "cut": b'{"model": "tiny"',
            "two": b"{}{}",
            "python": b"{'model': 'tiny'}",
            "utf-16": '{"model": "tiny"}'.encode("utf-16"),
            "latin-1": b'{"model": "\xe9"}',
            "half-a-character": b'{"model": "\xed\xa0\x80"}',
            "deep": b'{"messages":' + b"[" * 100_000,
            "deep-and-closed": b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}",
            "zeros": b"\0" * 1000,
            "gzip": gzip.compress(b" " * 10_000_000),
        }.items():
            yield _raw(f"{path}-{name}", body, path=path)
        yield _raw(f"{path}-50-MB", lambda: b'{"model": "' + b"a" * 50_000_000 + b'"}', 413, path)
        yield _raw(f"{path}-as-text", b"{}", 415, path, content_type="text/plain")
    yield _raw("form-for-chat", form(("model", b"tiny")), 415, content_type=FORM)
    gzipped = gzip.compress(_json(chat()))
    yield _raw("gzip-encoding", gzipped, headers=(("content-encoding", "gzip"),))


def _form_cases() -> Iterator[Case]:
    good = uris.GOOD_PICTURE
    for name, body in {
        "empty": b"",
        "no-end": form(("image", good))[:-20],
        "no-image": form(("prompt", b"a")),
        "two-images": form(("image", good), ("image", good)),
        "unknown-field": form(("image", good), ("colour", b"red")),
        "n": form(("image", good), ("n", b"1000000000")),
        "n-text": form(("image", good), ("n", b"many")),
        "nan": form(("image", good), ("temperature", b"nan")),
        "infinity": form(("image", good), ("temperature", b"1e999")),
        "tokens": form(("image", good), ("max_tokens", b"0")),
        "not-utf-8": form(("image", good), ("model", b"\xff\xfe")),
        "mark": form(("image", good), ("prompt", b"<image>")),
        "many-fields": form(("image", good), *[(f"f{n}", b"1") for n in range(10_000)]),
        "many-images": form(*[("image", good)] * 2000),
        "other-boundary": form(("image", good), boundary=b"abc"),
        "header-without-end": b"--xyz\r\n" + b"A" * 1_000_000,
        "zeros": b"\0" * 100_000,
    }.items():
        status = 404 if name == "not-utf-8" else 400
        yield _raw(f"form-{name}", body, status, CAPTIONS, content_type=FORM)
    yield _raw("form-without-boundary", form(("image", good)), 400, CAPTIONS, content_type="multipart/form-data")
    urlencoded = "application/x-www-form-urlencoded"
    yield _raw("urlencoded", b"image=a", 415, CAPTIONS, content_type=urlencoded)


def _reward_cases() -> Iterator[Case]:
    for name, value in {
        "no-captions": {"image": GOOD},
        "empty-captions": {"captions": []},
        "caption-number": {"captions": [1]},
        "caption-text": {"captions": "a cat"},
        "both": {"captions": ["a"], "inputs": [{"captions": ["a"]}]},
        "no-inputs": {"inputs": []},
        "inputs-object": {"inputs": {}},
        "unknown-key": {"captions": ["a"], "referencs": []},
        "hash-and-image": {"captions": ["a"], "image": GOOD, "image_hash": "0" * 64},
        "hash-path": {"captions": ["a"], "image_hash": "../../etc/passwd"},
        "nested-references": {"captions": ["a"], "references": [["a"]]},
        "long-caption": {"captions": ["a" * 1_000_000]},
        "many-captions": {"captions": ["a"] * 100_000},
        "many-references": {"captions": ["a"], "references": ["a"] * 100_000},
        "many-inputs": {"inputs": [{"captions": ["a"]}] * 100_000},
    }.items():
        yield _case(f"reward-{name}", REWARDS, value)
    yield _case("reward-unknown-hash", REWARDS, {"captions": ["a"], "image_hash": "0" * 64}, 404)
    picture = {"content": [image_part(GOOD)]}
    for name, value in {
        "one-side": {"queries": "a"},
        "wrong-count": {"queries": ["a", "b"], "documents": ["a", "b", "c"]},
        "no-documents": {"queries": "a", "documents": []},
        "picture-as-document": {"queries": "a", "documents": picture},
        "bad-picture": {"queries": {"content": [image_part("data:,")]}, "documents": "a"},
        "mixed-names": {"text_1": "a", "documents": "a"},
        "numbers": {"queries": 1, "documents": 2},
        "tokens": {"queries": [1, 2, 3], "documents": "a"},
        "many-pictures": {"queries": {"content": [image_part(GOOD)] * 1000}, "documents": "a"},
    }.items():
        yield _case(f"score-{name}", SCORE, value)


_REPLIED: dict[str, dict[str, Any]] = {
    "null-content": {"content": None},
    "no-content": {},
    "answer": {"content": "a cat", "refusal": None, "tool_calls": None, "function_call": None, "audio": None},
    "later-answer": {"content": "a cat", "refusal": None, "annotations": [], "tool_calls": [], "reasoning": None},
}
"""What stands beside the role in a turn of the assistant's."""
NEUTRAL: dict[str, Any] = {
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": True,
    "ignore_eos": False,
    "stream_options": {"include_usage": True},
    "max_tokens": 4.0,
    "n": 1.0,
    "frequency_penalty": 0.0,
    "stop_token_ids": [],
    "unheard_of": None,
}
"""Parameters that change nothing, with their values."""


def accepted() -> dict[str, dict[str, Any]]:
    """Conversations that clients really send, by what is odd about them; each is answered."""
    picture = image_part(GOOD)
    found = {name: chat(messages=user(image_part(uri))) for name, (uri, _) in uris.ODD.items()}
    for name, said in _REPLIED.items():
        turns = [*user(picture), {"role": "assistant", **said}, {"role": "user", "content": "and?"}]
        found[f"history-{name}"] = chat(messages=turns)
    found |= {f"{key}={value}": chat(**{key: value}) for key, value in NEUTRAL.items()}
    found["url-alone"] = chat(messages=user({"type": "image_url", "image_url": GOOD}))
    found["cached-parts"] = chat(
        messages=user({**text_part("describe"), "cache_control": {"type": "ephemeral"}}, {**picture, "uuid": "a-1"})
    )
    found["full-size"] = chat(messages=user({"type": "image_url", "image_url": {"url": GOOD, "detail": "original"}}))
    return found


CASES: tuple[Case, ...] = (
    *_picture_cases(),
    *_number_cases(),
    *_message_cases(),
    *_body_cases(),
    *_form_cases(),
    *_reward_cases(),
)
