"""Decoding in a process of its own: the decoder's pictures, and an end to what takes more than its budget."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from mmrl_ray.child import Shared, receive_shared, send
from mmrl_ray.data import decoder_pool
from mmrl_ray.data.decoder_pool import DecoderPool, Decoding
from mmrl_ray.data.images import ImageLimits, decode_image
from mmrl_ray.errors import ImageError, ProcessError
from tests.corpus.pictures import HEAVY, ODD, many_scans
from tests.unit.data.pictures import picture


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    pool = DecoderPool(workers=1)
    yield pool
    pool.close()


def workers() -> set[int]:
    """Processes of this one's children that do the work: those without children."""
    return {child.pid for child in psutil.Process().children(recursive=True) if not child.children()}


def test_gives_what_the_decoder_gives(pool: DecoderPool) -> None:
    for name in ("rgba-png", "exif-rotated-jpeg", "animated-gif"):
        data = ODD[name]()
        found = pool.decode(data)
        assert (found.mode, found.info) == ("RGB", {})
        assert np.array_equal(np.asarray(found), np.asarray(decode_image(data)))
    with pytest.raises(ImageError, match="broken PNG image"):
        pool.decode(picture(1, "PNG", (64, 64))[:70])
    with pytest.raises(ImageError, match="at most 63 are accepted"):
        pool.check(picture(), ImageLimits(max_pixels=63))


@pytest.mark.parametrize("name", HEAVY)
def test_files_that_cost_more_than_they_weigh(name: str, pool: DecoderPool) -> None:
    """Within the budgets a picture comes out, and the process is there for the next one; else it is an `ImageError`."""
    make, is_picture = HEAVY[name]
    pool.check(picture())
    before = workers()
    if is_picture:
        pool.check(make())
    else:
        with pytest.raises(ImageError, match=r"refused|save it again|memory"):
            pool.check(make())
    assert workers() == before
    # A process of 60 MB, and the budget of the largest of them.
    most = 60 * 2**20 + decoder_pool.MEMORY_BYTES + 3 * decoder_pool.MEMORY_FACTOR * 16_000_000
    assert max(psutil.Process(pid).memory_info().rss for pid in before) < most


def test_a_picture_that_takes_too_long_ends_with_its_process(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_pool, "CPU_S", 0.1)
    monkeypatch.setattr(decoder_pool, "CPU_S_A_MEGAPIXEL", 0.0)
    pool.check(picture())
    before = workers()
    with pytest.raises(ImageError, match=r"more than 0\.1 s of CPU time"):
        pool.decode(many_scans(30, 4000))
    assert len(before - workers()) == 1  # the others, if any, are of other tests
    monkeypatch.undo()
    assert pool.decode(picture()).size == (8, 8)


def test_a_picture_that_takes_too_much_memory_is_refused(pool: DecoderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_pool, "MEMORY_FACTOR", 1)
    monkeypatch.setattr(decoder_pool, "MEMORY_BYTES", 2**20)
    with pytest.raises(ImageError, match="memory"):
        pool.decode(HEAVY["grey-16-bit"][0]())
    monkeypatch.undo()
    assert pool.decode(picture()).size == (8, 8)


def test_what_was_given_up_does_not_begin(pool: DecoderPool) -> None:
    decoding = Decoding()
    decoding.give_up()
    with pytest.raises(ProcessError, match="given up"):
        pool.check(picture(), decoding=decoding)
    pool.check(picture())


@pytest.mark.parametrize("name", ["grey-16-bit", "grey-16-bit-with-a-key", "rgba-16-bit", "palette"])
def test_conversions_take_little_more_than_the_picture(
    name: str, pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored as Pillow does, before and after, a picture takes 2.7 times its three bytes a pixel."""
    monkeypatch.setattr(decoder_pool, "MEMORY_FACTOR", 4)
    pool.check(HEAVY[name][0]())


def test_shared_memory_is_what_was_sent_and_stays_so() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        sent = Shared.of([b"ab", memoryview(np.arange(3, dtype=np.uint16))])
        send(mine, sent)
        found = receive_shared(theirs)
        assert found is not None
        mapped = found.map()
        del sent, found
        assert mapped[:] == b"ab\0\0\1\0\2\0"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no seals")
def test_memory_that_could_be_cut_off_is_refused() -> None:
    """A process that a hostile picture took over could end its owner by that (SIGBUS)."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        open_ended = Shared(os.memfd_create("x", os.MFD_ALLOW_SEALING), 0)
        os.write(open_ended.descriptor, b"ab")
        open_ended.count = 2
        short = Shared.of([b"ab"])
        short.count = 3
        for wrong in (open_ended, short):
            send(mine, wrong)
            with pytest.raises(OSError, match="shorter"):
                receive_shared(theirs)
