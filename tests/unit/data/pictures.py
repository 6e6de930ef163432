"""Pictures made in code: no binary fixtures."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

from mmrl_ray.data.samples import Sample


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    """A plain picture whose content differs with `number` (below 65,536)."""
    return encode(Image.new("RGB", size, (number % 256, number // 256, 99)), kind)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, bits: int, colour_type: int, scanlines: bytes, *extra: bytes) -> bytes:
    """A PNG written by hand, so that what is in it does not depend on Pillow's writer."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(scanlines))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + png_chunk(b"IEND", b"")


def sample(number: int, **changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "id": f"s{number}",
        "images": (picture(number),),
        "prompt": "",
        "references": (f"reference {number}", "another"),
        "metadata": {"number": number},
    }
    return Sample(**{**fields, **changes})
