"""What the gateway has of one generation, as it comes."""

import asyncio
from contextlib import asynccontextmanager


@asynccontextmanager
async def deltas_of(gateway, generation):
    """Run `generation` and yield an iterator over its deltas; leaving early cancels it. Raises as
    Gateway.open and Gateway.keep."""
    has_news = asyncio.Event()
    opened = gateway.open(generation, has_news.set)
    keeping = asyncio.create_task(gateway.keep(opened))
    keeping.add_done_callback(lambda _: has_news.set())

    async def deltas():
        while True:
            delta = opened.take()
            if delta is not None:
                yield delta
                if delta.finish_reason is not None:
                    return
            elif keeping.done():
                keeping.result()
                return
            else:
                await has_news.wait()
                has_news.clear()

    try:
        yield deltas()
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
