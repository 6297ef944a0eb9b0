"""Ten times the load that a replica takes: answers and refusals alone, and it goes on after."""

import asyncio
from collections import Counter
from dataclasses import replace

import httpx

from serving import LIMITS, MODELS, ROWS, listen, make_app

CLIENTS, EACH = 10 * LIMITS.max_requests, 25


def test_every_answer_is_200_or_429_and_says_when_to_come_again() -> None:
    app = make_app(MODELS, replace(LIMITS, request_timeout_s=60))
    refused: list[httpx.Response] = []

    async def load(address: str) -> Counter[int]:
        found = Counter[int]()
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(limits=limits, timeout=60) as http:

            async def ask() -> None:
                for _ in range(EACH):
                    url = f"http://{address}/v1/models/people:predict"
                    response = await http.post(url, json=ROWS)
                    found[response.status_code] += 1
                    if response.status_code != 200:
                        refused.append(response)

            await asyncio.gather(*(ask() for _ in range(CLIENTS)))
        return found

    with listen(app) as address:
        found = asyncio.run(load(address))
        assert set(found) <= {200, 429}
        assert found.total() == CLIENTS * EACH
        assert found[200] >= EACH
        assert {response.headers["retry-after"] for response in refused} <= {"1"}
        after = httpx.post(f"http://{address}/v1/models/people:predict", json=ROWS)
        assert after.status_code == 200
