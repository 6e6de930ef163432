"""Places that callers share: who is next, what one may hold, and what those leave who go."""

from __future__ import annotations

import asyncio
import time

from mmrl_ray.serving.images import Turns


def test_the_caller_with_the_fewest_places_is_next_and_nobody_has_all() -> None:
    order: list[str] = []

    async def work() -> None:
        turns, release = Turns(3), asyncio.Event()

        async def hold(name: str) -> None:
            async with turns.turn(name[0]):
                order.append(name)
                await release.wait()

        many = [asyncio.create_task(hold(f"a{i}")) for i in range(6)]
        await asyncio.sleep(0)
        assert order == ["a0", "a1"], "one place is left for others"
        other = asyncio.create_task(hold("b0"))
        late = asyncio.create_task(hold("b1"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == ["a0", "a1", "b0"]
        many[2].cancel()  # gives up its place in the queue
        many[0].cancel()
        await asyncio.wait([many[0], many[2]])
        await asyncio.sleep(0)
        assert order[3:] == ["a3"], "both have one place, and this one came first"
        release.set()
        await asyncio.wait([*many, other, late])
        async with asyncio.timeout(1), turns.turn("a"), turns.turn("a"), turns.turn("b"):
            pass  # every place came back

    asyncio.run(work())
    assert sorted(order) == ["a0", "a1", "a3", "a4", "a5", "b0", "b1"]


def test_callers_take_turns_where_there_are_more_of_them_than_places() -> None:
    order: list[str] = []

    async def work() -> None:
        turns = Turns(1)

        async def hold(name: str) -> None:
            async with turns.turn(name[0]):
                order.append(name)
                await asyncio.sleep(0)

        many = [asyncio.create_task(hold(name)) for name in ("a0", "a1", "a2", "a3", "b0", "b1", "c0")]
        await asyncio.wait(many)

    asyncio.run(work())
    assert order == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_a_place_handed_to_somebody_who_leaves_goes_on() -> None:
    async def work() -> None:
        turns = Turns(1)
        async with turns.turn("a"):
            leaving = asyncio.create_task(turns.turn("b").__aenter__())
            await asyncio.sleep(0)
        leaving.cancel()  # at the moment that it was handed the place
        await asyncio.wait([leaving])
        async with asyncio.timeout(1), turns.turn("c"):
            pass

    asyncio.run(work())


def test_who_rests_waits_longer_than_it_worked_and_nobody_else_does() -> None:
    held, began = 0.03, dict[str, float]()

    async def work() -> None:
        turns = Turns(2)

        async def hold(name: str) -> None:
            async with turns.turn(name[0], rest=4.0 if name[0] == "a" else 0.0):
                began[name] = time.monotonic()
                await asyncio.sleep(held)

        async with asyncio.timeout(5):
            await asyncio.gather(*map(hold, ("a0", "a1", "a2", "b0", "b1", "b2")))

    asyncio.run(work())
    assert sorted(began, key=began.__getitem__)[-2:] == ["a1", "a2"], "the others have gone on meanwhile"
    assert began["a1"] - began["a0"] >= 5 * held
    assert began["a2"] - began["a1"] >= 5 * held
    asyncio.run(work())  # in another loop: what was begun in the first has no part in it
