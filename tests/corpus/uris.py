"""Data URIs and URLs in place of a picture."""

from __future__ import annotations

import base64
from collections.abc import Callable

from tests.unit.data.pictures import picture

GOOD_PICTURE = picture(42)


def data_uri(data: bytes, mime: str = "image/png") -> str:
    """As a client writes it."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


GOOD = data_uri(GOOD_PICTURE)
_HEAD, _TEXT = GOOD.split(",")

BAD: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "no-comma": lambda: GOOD.replace(",", ""),
    "no-data": lambda: "data:image/png;base64,",
    "not-base64": lambda: f"{_HEAD},this is no base64!",
    "cut-base64": lambda: GOOD[:-3],
    "broken-lines": lambda: f"{_HEAD},{_TEXT[:20]}\n{_TEXT[20:]}",
    "url-alphabet": lambda: f"{_HEAD},--__",
    "percent": lambda: f"{_HEAD},{_TEXT.replace('=', '%3D')}%3D",
    "not-encoded": lambda: "data:image/png,hello",
    "no-type": lambda: f"data:;base64,{_TEXT}",
    "wrong-type": lambda: data_uri(GOOD_PICTURE, "image/jpeg"),
    "text-type": lambda: data_uri(GOOD_PICTURE, "text/html"),
    "svg-type": lambda: data_uri(b"<svg/>", "image/svg+xml"),
    "charset": lambda: f"data:image/png;charset=utf-8;base64,{_TEXT}",
    "long-header": lambda: f"data:image/png{';a=b' * 100_000};base64,{_TEXT}",
    "not-ascii": lambda: f"{_HEAD},{_TEXT[:8]}é{_TEXT[9:]}",
}
"""Each is an `ImageError`."""

URLS = (
    "http://169.254.169.254/latest/meta-data/",
    "https://169.254.169.254/latest/meta-data/",
    "https://[::ffff:127.0.0.1]/",
    "https://2130706433/",
    "https://0x7f.1/",
    "https://0177.0.0.1/",
    "https://127.1/",
    "https://localhost/",
    "https://[::1]/",
    "https://allowed.example.com@127.0.0.1/",
    "https://user:password@allowed.example.com/",
    "https://127.0.0.1\\@allowed.example.com/",
    "https:\\\\127.0.0.1\\",
    "https://allowed.example.com\\.evil.com/",
    "https://allowed.example.com.evil.com/",
    "https://allowed.example.com:22/",
    "https://allowed.example.com/\r\nHost: 127.0.0.1",
    "https://ａllowed.example.com/",
    "file:///etc/passwd",
    "ftp://allowed.example.com/a.png",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "//allowed.example.com/a.png",
    "/etc/passwd",
    "photo.jpg",
    f"https://allowed.example.com/{'a' * 100_000}",
)
"""Refused whether pictures by URL are allowed (from allowed.example.com) or not, before any name is looked up."""
