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
    "url-alphabet": lambda: f"{_HEAD},--__",
    "percent": lambda: f"{_HEAD},{_TEXT.replace('=', '%3D')}%3D",
    "not-encoded": lambda: "data:image/png,hello",
    "bare-base64": lambda: _TEXT,
    "text": lambda: data_uri(b"hello"),
    "text-type": lambda: data_uri(GOOD_PICTURE, "text/html"),
    "svg-type": lambda: data_uri(b"<svg/>", "image/svg+xml"),
    "one-character-too-few": lambda: f"{_HEAD},{_TEXT.rstrip('=')[: -(len(_TEXT.rstrip('=')) % 4) or None]}A",
    "long-header": lambda: f"data:image/png{';a=b' * 100_000};base64,{_TEXT}",
    "not-ascii": lambda: f"{_HEAD},{_TEXT[:8]}é{_TEXT[9:]}",
}
"""Each is an `ImageError`."""

_LINES = "\n".join(_TEXT[i : i + 76] for i in range(0, len(_TEXT), 76))
_JPEG = picture(42, "JPEG", (40, 40))

ODD: dict[str, tuple[str, bytes]] = {
    "png-declared-jpeg": (data_uri(GOOD_PICTURE, "image/jpeg"), GOOD_PICTURE),
    "jpeg-declared-png": (data_uri(_JPEG), _JPEG),
    "unregistered-type": (data_uri(_JPEG, "image/jpg"), _JPEG),
    "no-type": (f"data:;base64,{_TEXT}", GOOD_PICTURE),
    "any-bytes": (data_uri(GOOD_PICTURE, "application/octet-stream"), GOOD_PICTURE),
    "upper-case": (f"DATA:IMAGE/PNG;BASE64,{_TEXT}", GOOD_PICTURE),
    "charset": (f"data:image/png;charset=utf-8;base64,{_TEXT}", GOOD_PICTURE),
    "file-name": (f"data:image/png; name=a.png; base64,{_TEXT}", GOOD_PICTURE),
    "lines": (f"{_HEAD},{_LINES}\n", GOOD_PICTURE),
    "lines-of-windows": (f"{_HEAD},{_LINES}".replace("\n", "\r\n"), GOOD_PICTURE),
    "blank": (f"{_HEAD}, {_TEXT}", GOOD_PICTURE),
    "no-padding": (
        f"data:image/jpeg;base64,{data_uri(_JPEG + b'1' * ((1 - len(_JPEG)) % 3)).split(',')[1].rstrip('=')}",
        _JPEG + b"1" * ((1 - len(_JPEG)) % 3),
    ),
    "url-alphabet": (f"data:image/jpeg;base64,{base64.urlsafe_b64encode(_JPEG).decode()}", _JPEG),
}
"""Each is a picture nevertheless, as clients write them, with its file."""

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
