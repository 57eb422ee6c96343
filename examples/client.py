"""A client class for somebody else's API, as a library would have it: each method says how it copes, once.

All methods share one limit, because the service has one for each key; reading is cached, writing is neither cached nor
repeated. The tests at the end of the file show how such a class is tested, without waiting.

    python examples/client.py                  # runs its tests
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import httpx

from opero import Cache, CircuitOpenError, RateLimiter, control, opero
from opero.http import retry_after
from opero.testing import instant

limit = RateLimiter(["10/s", "1000/hour"])
reading = Cache("5 minutes", stale="1 hour")  # settings: each method has entries of its own


class Shop:
    """Prices and orders."""

    def __init__(self, transport: httpx.BaseTransport | None = None) -> None:
        """Connect; a `transport` takes the place of the network in tests."""
        self._http = httpx.Client(base_url="https://shop.example", transport=transport)

    @opero(cache=reading, retries=4, retry_on=retry_after, rate_limit=limit, breaker=5, total_timeout=60)
    def price(self, item: str) -> float:
        """Say what an item costs."""
        price: float = self._http.get(f"/price/{item}").raise_for_status().json()["price"]
        return price

    @opero(retries=0, rate_limit=limit)  # nobody wants to order twice
    def order(self, item: str, number: int = 1) -> str:
        """Order an item; return the order's name."""
        name: str = self._http.post("/orders", json={"item": item, "number": number}).raise_for_status().json()["name"]
        return name


# The tests. The service below fails as it is told.


class Service(httpx.MockTransport):
    """Counts what it is asked, and answers with the next status of its list, then with 200."""

    def __init__(self, *statuses: int) -> None:
        """Have some answers ready."""
        super().__init__(self._answer)
        self.asked: Counter[str] = Counter()
        self._statuses = list(statuses)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked[request.url.path] += 1
        status = self._statuses.pop(0) if self._statuses else 200
        body: dict[str, Any] = {"price": 9.99, "name": "order 1"}
        return httpx.Response(status, text=json.dumps(body), headers={"Retry-After": "30"} if status == 429 else {})


def a_price_is_asked_again_when_the_service_wants_it_and_then_remembered() -> None:
    """Nothing sleeps: time jumps over the 30 s that the service asks for."""
    service = Service(429, 503)
    shop = Shop(service)
    with instant() as time:
        assert shop.price("tea") == shop.price("tea") == 9.99
    assert service.asked == {"/price/tea": 3}
    assert time.skipped > 29


def an_order_is_never_sent_twice() -> None:
    """Its error is the caller's."""
    service = Service(503)
    try:
        Shop(service).order("tea")
    except httpx.HTTPStatusError:
        assert service.asked == {"/orders": 1}
        return
    raise AssertionError


def a_service_that_is_down_is_left_alone() -> None:
    """After five failures in a row nobody asks for 30 s."""
    service = Service(*[503] * 5)
    shop = Shop(service)
    with instant() as time:
        for _ in range(2):
            try:
                shop.price("milk")
            except (httpx.HTTPStatusError, CircuitOpenError):
                continue
        assert service.asked == {"/price/milk": 5}
        time.advance(30)
        assert shop.price("milk") == 9.99
    assert control(shop.price).circuit.state == "closed"


if __name__ == "__main__":
    for test in (
        a_price_is_asked_again_when_the_service_wants_it_and_then_remembered,
        an_order_is_never_sent_twice,
        a_service_that_is_down_is_left_alone,
    ):
        test()
        print(f"ok: {test.__name__.replace('_', ' ')}")
    sys.exit()
