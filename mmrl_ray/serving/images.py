"""Pictures that came over HTTP, as data URIs or uploads: their headers checked before anything else sees them."""

from __future__ import annotations

import binascii
from dataclasses import dataclass

from mmrl_ray.data.images import MAX_BYTES, MAX_PIXELS, MAX_SIDE, inspect_image
from mmrl_ray.errors import ImageError

_UNTYPED = ("", "application/octet-stream", "binary/octet-stream")
"""What clients declare that know no type; the content tells, as it does where they declare a wrong one."""
_LONGEST_HEADER = 256
"""Characters before a data URI's comma; a type with a few parameters has 64."""
_BLANKS = b" \t\r\n\f"
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
"""From base64's alphabet for URLs (RFC 4648, section 5)."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one picture may be; see `decode_image`."""

    max_bytes: int = MAX_BYTES
    """Of the encoded picture, not of its base64."""
    max_pixels: int = MAX_PIXELS
    max_side: int = MAX_SIDE


DEFAULT_LIMITS = ImageLimits()


def is_data_uri(url: str) -> bool:
    """Whether a URL carries its picture itself."""
    return url[:5].lower() == "data:"


def decode_data_uri(uri: str, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The encoded picture in `data:image/png;base64,…`, whose header is right; its pixels nobody has seen yet.

    A large one takes some 30 ms: call it off the event loop.

    Raises:
        ImageError: not such a URI, not base64, declared as something else than a picture, or whatever `inspect_image`
            refuses. Which kind of picture is declared does not matter: the content decides.
    """
    header, comma, payload = uri.partition(",")
    if not is_data_uri(uri) or not comma or len(header) > _LONGEST_HEADER:
        raise ImageError("not a data URI of an image: write data:image/png;base64,<the file in base64>")
    mime, *parameters = (part.strip() for part in header[len("data:") :].lower().split(";"))
    if parameters[-1:] != ["base64"]:
        raise ImageError(f"data URI {header[:64]!r}: ;base64 must stand before its comma, and base64 behind it")
    if mime not in _UNTYPED and not mime.startswith("image/"):
        raise ImageError(f"data URI of type {mime[:64]!r}, which is no image: write data:image/png;base64,<the file>")
    return check_image(_decode_base64(payload, limits.max_bytes), limits)


def check_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """`data` itself, after a look at its header; for uploads, whose declared type is only a file name's.

    Raises:
        ImageError: whatever `inspect_image` refuses.
    """
    inspect_image(data, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, max_side=limits.max_side)
    return data


def _decode_base64(text: str, max_bytes: int) -> bytes:
    """Of base64 as clients write it: either alphabet, with line breaks or blanks, its padding there or left out."""
    # strict_mode: no characters outside the alphabet, no wrong padding, nothing after it.
    wrong = "data URI whose content is no base64 (RFC 4648)"
    try:
        raw = text.encode("ascii").translate(_TO_STANDARD, _BLANKS)
    except UnicodeEncodeError:
        raise ImageError(wrong) from None
    # Four characters hold three bytes; measured before they are decoded.
    if len(raw) // 4 * 3 > max_bytes + 2:
        raise ImageError(
            f"image of about {len(raw) // 4 * 3:,} bytes: at most {max_bytes:,} are accepted; make it smaller"
        )
    if not raw.endswith(b"="):
        raw += b"=" * (-len(raw) % 4)
    try:
        return binascii.a2b_base64(raw, strict_mode=True)
    except binascii.Error:
        raise ImageError(wrong) from None
