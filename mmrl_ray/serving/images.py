"""Pictures that came over HTTP, as data URIs or uploads: their headers checked before anything else sees them."""

from __future__ import annotations

import binascii
from dataclasses import dataclass

from mmrl_ray.data.images import MAX_BYTES, MAX_PIXELS, MAX_SIDE, ImageFormat, image_format, inspect_image
from mmrl_ray.errors import ImageError

_FORMATS: dict[str, ImageFormat] = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",  # not registered, but what many clients write
    "image/webp": "WEBP",
    "image/gif": "GIF",
}
_LONGEST_HEADER = 64
"""Characters before a data URI's comma; the longest one that is accepted has 22."""


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
        ImageError: not such a URI, not strict base64, a type that is not accepted or not the content's, or whatever
            `inspect_image` refuses.
    """
    header, comma, payload = uri.partition(",")
    if not is_data_uri(uri) or not comma or len(header) > _LONGEST_HEADER:
        raise ImageError("not a data URI of an image: write data:image/png;base64,<the file in base64>")
    mime, *parameters = header[len("data:") :].lower().split(";")
    if parameters != ["base64"]:
        raise ImageError(f"data URI {header!r}: only ;base64 may stand between its type and its comma, and must")
    if mime not in _FORMATS:
        raise ImageError(f"data URI of type {mime!r}: {', '.join(_FORMATS)} are accepted")
    data = _decode_base64(payload, limits.max_bytes)
    if (found := image_format(data)) != _FORMATS[mime]:
        raise ImageError(f"data URI of type {mime!r} holds a {found} image: declare what it is")
    return check_image(data, limits)


def check_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """`data` itself, after a look at its header; for uploads, whose declared type is only a file name's.

    Raises:
        ImageError: whatever `inspect_image` refuses.
    """
    inspect_image(data, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, max_side=limits.max_side)
    return data


def _decode_base64(text: str, max_bytes: int) -> bytes:
    # Four characters hold three bytes; measured before any memory is spent on them.
    if len(text) // 4 * 3 > max_bytes + 2:
        raise ImageError(
            f"image of about {len(text) // 4 * 3:,} bytes: at most {max_bytes:,} are accepted; make it smaller"
        )
    try:
        # strict_mode: no characters outside the alphabet, no line breaks, nothing after the padding.
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ImageError("data URI whose content is not strict base64 (RFC 4648, padded, no line breaks)") from None
