"""The clients of `bench serve`, in a process of their own: a line of JSON in, the number of new tokens out.

{"url": "http://127.0.0.1:8000", "at_once": 32, "bodies": [...]}
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any


def main() -> None:
    """Read lines until the end of input."""
    for line in sys.stdin:
        asked = json.loads(line)
        print(asyncio.run(ask(asked["url"], asked["bodies"], asked["at_once"])), flush=True)


async def ask(url: str, bodies: list[dict[str, Any]], at_once: int, transport: Any = None) -> int:
    """Stream the answers to all requests, and return the sum of their new tokens. transport: httpx2's, for tests."""
    import httpx2

    places = asyncio.Semaphore(at_once)
    limits = httpx2.Limits(max_connections=at_once)

    async with httpx2.AsyncClient(timeout=600, limits=limits, transport=transport) as client:

        async def one(body: dict[str, Any]) -> int:
            async with places, client.stream("POST", f"{url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
                usage = 0
                async for line in response.aiter_lines():
                    if '"completion_tokens"' in line:
                        usage = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
                return usage

        return sum(await asyncio.gather(*map(one, bodies)))


if __name__ == "__main__":
    main()
