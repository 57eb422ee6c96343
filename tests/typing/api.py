"""What type checkers have to understand of opero; never run, read by mypy and by pyright.

Both report an ignored line that has no error any more, so that every wrong use below is known to be found.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, assert_type, overload

from opero import (
    AllFailedError,
    Breaker,
    Cache,
    CallStats,
    OperoError,
    Outcome,
    Results,
    WorkerCrashedError,
    __version__,
    candidates,
    candidates_from,
    clear_cache,
    configure_logging,
    control,
    opero,
    opmap,
)
from opero.concurrency import get_parallel_executor, get_parallel_map_decorator
from opero.core import (
    Control,
    RateLimiter,
    get_cache_context,
    get_cache_decorator,
    get_fallback_decorator,
    get_rate_limit_decorator,
    get_retry_decorator,
)
from opero.core.retry import Answer
from opero.events import CallDone, Event, Subscription, on_event
from opero.http import retry_after
from opero.telemetry import otel, prometheus
from opero.telemetry.lines import log_events
from opero.testing import disabled, instant, recorded

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider
    from prometheus_client import CollectorRegistry

T = TypeVar("T")


class Session: ...


# Functions, bare and called


@opero
def fetch(url: str, size: int = 10, *, session: Session | None = None) -> bytes:
    return url.encode()[:size]


@opero()
def fetch_called(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


@opero(cache=True, retries=5, rate_limit="100/minute")
def fetch_with_options(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


@opero(cache=Cache("15 minutes", ignore=["size"], keep_if=bool, exceptions=LookupError, stale=60, maxsize=5))
def fetch_with_cache(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


assert_type(fetch_with_cache("u"), bytes)


def fetch_plain(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


@opero
def everything(a: int, /, b: str, *args: float, c: bytes = b"", **kwargs: bool) -> tuple[int, str]:
    return a, b


@opero
def nothing() -> None: ...


@opero
def same(value: T) -> T:
    return value


def check_functions() -> None:
    assert_type(fetch("u"), bytes)
    assert_type(fetch("u", 5, session=Session()), bytes)
    assert_type(fetch(url="u", size=5), bytes)
    assert_type(fetch_called("u"), bytes)
    assert_type(fetch_with_options("u", size=5), bytes)
    assert_type(opero(fetch_plain)("u"), bytes)
    assert_type(opero(retries=1)(fetch_plain)("u"), bytes)
    assert_type(everything(1, "b", 2.0, 3.0, c=b"c", d=True), tuple[int, str])
    assert_type(same(5), int)
    assert_type(same("u"), str)
    nothing()

    fetch()  # type: ignore[call-arg]
    fetch(5)  # type: ignore[arg-type]
    fetch("u", "5")  # type: ignore[arg-type]
    fetch("u", 5, Session())  # type: ignore[call-arg]
    fetch("u", sise=5)  # type: ignore[call-arg]
    fetch_called(5)  # type: ignore[arg-type]
    fetch_with_options(5)  # type: ignore[arg-type]
    everything(a=1, b="b")  # type: ignore[call-arg, arg-type]
    nothing(1)  # type: ignore[call-arg]
    text: str = fetch("u")  # type: ignore[assignment]
    del text


def check_what_can_be_done_with_a_function() -> None:
    its = control(fetch_with_options)
    assert_type(its.stats.calls, int)
    assert_type(its.stats.hits, int)
    assert_type(its.stats.attempts, int)
    assert_type(its.stats.retries, int)
    assert_type(its.stats.fallbacks, int)
    assert_type(its.stats.failures, int)
    assert_type(its.stats.cache_errors, int)
    assert_type(its.stats.waited, float)
    assert_type(its.stats.snapshot(), CallStats)
    assert_type(its.cache_info().hits, int)
    assert_type(its.cache_info().misses, int)
    assert_type(its.cache_info().maxsize, int | None)
    assert_type(its.cache_info().currsize, int)
    assert_type(its.cache_delete("u", size=5), bool)
    assert_type(its.cache_refresh("u", size=5), bytes)
    assert_type(its.with_options(retries=0)("u", size=5), bytes)
    its.cache_clear()

    its.cache_delete(5)  # type: ignore[arg-type]
    its.with_options(retries=0)(5)  # type: ignore[arg-type]
    its.cache_clean()  # type: ignore[attr-defined]
    its.stats.call  # type: ignore[attr-defined]  # noqa: B018
    its.stats.calls = 5  # type: ignore[misc]
    control(5)  # type: ignore[call-overload]


def check_that_a_decorated_function_is_no_more_than_a_function() -> None:
    fetch.stats  # type: ignore[attr-defined]  # noqa: B018
    typed: Control[[str], bytes] = control(fetch_short)
    del typed


@opero
def fetch_short(url: str) -> bytes:
    return url.encode()


# Async functions


@opero
async def fetch_async(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


@opero(total_timeout=5, attempt_timeout=1)
async def fetch_async_with_options(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


async def check_async_functions() -> None:
    assert_type(await fetch_async("u"), bytes)
    assert_type(await fetch_async_with_options("u", size=5), bytes)
    assert_type(await asyncio.create_task(fetch_async("u")), bytes)
    assert_type(await asyncio.gather(fetch_async("u"), fetch_async("v")), tuple[bytes, bytes])
    assert_type(control(fetch_async).stats.calls, int)
    assert_type(await control(fetch_async).with_options(retries=0)("u"), bytes)

    await fetch_async(5)  # type: ignore[arg-type]
    await fetch("u")  # type: ignore[misc]
    content: bytes = fetch_async("u")  # type: ignore[assignment]
    del content


# Where a function is wanted


class Fetcher(Protocol):
    def __call__(self, url: str, size: int = 10) -> bytes: ...


def check_uses_as_a_value() -> None:
    as_callable: Callable[[str], bytes] = fetch
    as_callable_with_all: Callable[[str, int], bytes] = fetch_called
    as_async_callable: Callable[[str], Awaitable[bytes]] = fetch_async
    as_coroutine_function: Callable[[str, int], Coroutine[Any, Any, bytes]] = fetch_async
    as_protocol: Fetcher = fetch
    del as_callable, as_callable_with_all, as_async_callable, as_coroutine_function, as_protocol

    assert_type(list(map(fetch, ["u", "v"])), list[bytes])
    assert_type(functools.partial(fetch, "u")(), bytes)
    assert_type(functools.partial(fetch, size=5)("u"), bytes)
    assert_type(functools.partial(fetch, session=Session())("u", 5), bytes)
    assert_type(opero(functools.partial(fetch_plain, size=5))("u"), bytes)
    assert_type(opero(retries=1)(fetch)("u"), bytes)
    assert_type(opero(lambda: fetch("u"))(), bytes)
    with ThreadPoolExecutor() as executor:
        assert_type(executor.submit(fetch, "u", 5).result(), bytes)
        executor.submit(fetch, 5)  # type: ignore[arg-type]

    wrong_argument: Callable[[int], bytes] = fetch  # type: ignore[assignment]
    wrong_result: Callable[[str], str] = fetch  # type: ignore[assignment]
    del wrong_argument, wrong_result


# Methods


class Client:
    @opero
    def get(self, url: str, size: int = 10) -> bytes:
        return url.encode()[:size]

    @opero(cache=True)
    def get_with_options(self, url: str, *, size: int = 10) -> bytes:
        return url.encode()[:size]

    @opero
    async def get_async(self, url: str, size: int = 10) -> bytes:
        return url.encode()[:size]

    @classmethod
    @opero
    def make(cls, size: int) -> Client:
        return cls()

    @classmethod
    @opero(retries=1)
    async def make_async(cls, size: int) -> Client:
        return cls()

    @staticmethod
    @opero
    def helper(size: int) -> float:
        return float(size)

    @staticmethod
    @opero(retries=1)
    async def helper_async(size: int) -> float:
        return float(size)

    @property
    @opero
    def size(self) -> int:
        return 10

    def check_self(self) -> None:
        assert_type(self.get("u"), bytes)


class SpecialClient(Client):
    @opero
    def get(self, url: str, size: int = 10) -> bytes:
        return super().get(url, size)

    def get_with_options(self, url: str, *, size: int = 5) -> bytes:
        return url.encode()[:size]

    @opero
    async def get_async(self, url: int) -> bytes:  # type: ignore[override]
        return bytes(url)


class Chain:
    @opero
    def then(self, url: str) -> Self:
        return self

    @opero(retries=1)
    async def then_async(self, url: str) -> Self:
        return self

    @overload
    def read(self, size: int) -> bytes: ...
    @overload
    def read(self, size: None = None) -> str: ...
    @opero(retries=1)
    def read(self, size: int | None = None) -> bytes | str:
        return "" if size is None else b""


class SpecialChain(Chain): ...


async def check_self_and_overloads(chain: Chain, special: SpecialChain) -> None:
    assert_type(chain.then("u"), Chain)
    assert_type(special.then("u").then("v"), SpecialChain)
    assert_type(await special.then_async("u"), SpecialChain)
    assert_type(chain.read(5), bytes)
    assert_type(chain.read(), str)
    chain.read("5")  # type: ignore[call-overload]


class Getter(Protocol):
    def get(self, url: str, size: int = 10) -> bytes: ...


def check_protocol_members(client: Client) -> None:
    getter: Getter = client
    wrong: Getter = Chain()  # type: ignore[assignment]
    del getter, wrong


# Generators


@opero
def pages(url: str) -> Iterator[bytes]:
    yield url.encode()


@opero(retries=1)
def echo(url: str) -> Generator[int, str, bytes]:
    yield len((yield 5))
    return url.encode()


@opero(attempt_timeout=5)
async def pages_async(url: str) -> AsyncIterator[bytes]:
    yield url.encode()


async def check_generators() -> None:
    assert_type(pages("u"), Iterator[bytes])
    assert_type(echo("u"), Generator[int, str, bytes])
    assert_type(echo("u").send("v"), int)
    assert_type([page async for page in pages_async("u")], list[bytes])
    pages(5)  # type: ignore[arg-type]


def check_methods(client: Client, special: SpecialClient) -> None:
    assert_type(client.get("u"), bytes)
    assert_type(client.get("u", size=5), bytes)
    assert_type(client.get_with_options("u", size=5), bytes)
    assert_type(special.get("u"), bytes)
    assert_type(Client.get(client, "u", 5), bytes)
    assert_type(control(client.get).stats.calls, int)
    assert_type(control(Client.get).stats.calls, int)
    assert_type(control(client.get).cache_delete("u"), bool)
    assert_type(control(client.get).with_options(retries=0)("u"), bytes)
    assert_type(client.make(5), Client)
    assert_type(Client.make(5), Client)
    assert_type(client.helper(5), float)
    assert_type(Client.helper(size=5), float)
    assert_type(client.size, int)
    as_callable: Callable[[str], bytes] = client.get
    del as_callable

    client.get(5)  # type: ignore[arg-type]
    client.get(client, "u")  # type: ignore[arg-type]
    client.get("u", 5, 6)  # type: ignore[call-arg]
    client.get_with_options("u", 5)  # type: ignore[call-arg]
    control(client.get).cache_delete(5)  # type: ignore[arg-type]
    Client.get("u")  # type: ignore[arg-type, call-arg]
    Client.make("5")  # type: ignore[arg-type]
    Client.helper("5")  # type: ignore[arg-type]


async def check_async_methods(client: Client) -> None:
    assert_type(await client.get_async("u", size=5), bytes)
    assert_type(await Client.get_async(client, "u"), bytes)
    assert_type(control(client.get_async).stats.calls, int)
    assert_type(await Client.make_async(5), Client)
    assert_type(await client.helper_async(5), float)

    await client.get_async(5)  # type: ignore[arg-type]


# What a failed call gives


@opero(default=None, retries=1)
def find(url: str) -> bytes:
    return url.encode()


@opero(default="")
async def find_async(url: str) -> bytes:
    return url.encode()


class Finder:
    @opero(default=0)
    def find(self, url: str) -> bytes:
        return url.encode()


async def check_defaults(finder: Finder) -> None:
    assert_type(find("u"), bytes | None)
    assert_type(await find_async("u"), bytes | str)
    assert_type(finder.find("u"), bytes | int)
    find(5)  # type: ignore[arg-type]


# Options


def seconds_to_wait(error: Exception) -> bool | float:
    return isinstance(error, OSError) and 5.0


def check_options(options: Mapping[str, Any]) -> None:
    opero(
        cache=True,
        cache_ttl=0.5,
        cache_backend="memory",
        cache_key=lambda url, size=10: url,
        cache_namespace="pages",
        cache_options=options,
        retries=0,
        backoff_factor=2,
        min_delay=0,
        max_delay=1,
        jitter=False,
        retry_on=seconds_to_wait,
        retry_options={"reraise": True},
        arg_fallback="url",
        fallback_cooldown=60,
        rate_limit=5,
        per="url",
        rate_limit_options={"max_burst": 5},
        attempt_timeout=1,
        total_timeout=5.5,
        breaker=5,
        on_event=print,
    )
    opero(breaker=Breaker(5, window=60, recovery=30))
    opero(breaker="5")  # type: ignore[call-overload]
    opero(
        cache_ttl=None,
        cache_key=None,
        cache_namespace=None,
        cache_options=None,
        retry_options=None,
        arg_fallback=None,
        fallback_cooldown=None,
        rate_limit=None,
        per=None,
        rate_limit_options=None,
        attempt_timeout=None,
        total_timeout=None,
    )
    opero(retry_on=ValueError)
    opero(retry_on=(ValueError, OSError))
    opero(retry_on=lambda error: isinstance(error, OSError))
    opero(retry_on=retry_after)
    assert_type(retry_after(OSError()), bool | float | Answer)
    opero(rate_limit=0.5)
    opero(rate_limit="100/minute")
    opero(rate_limit=["10/s", 0.5])
    opero(rate_limit=RateLimiter(5))

    opero(retires=5)  # type: ignore[call-overload]
    opero(retries="5")  # type: ignore[call-overload]
    opero(retries=None)  # type: ignore[call-overload]
    opero(cache="memory")  # type: ignore[call-overload]
    opero(retry_on=5)  # type: ignore[call-overload]
    opero(retry_on=retry_after(OSError()))  # type: ignore[call-overload]
    opero(retry_on=KeyboardInterrupt)  # type: ignore[arg-type]
    opero(rate_limit={5: "s"})  # type: ignore[dict-item]
    opero(workers=5)  # type: ignore[call-overload]
    opero(fetch_plain, retries=5)  # type: ignore[call-overload]
    opero(5)  # type: ignore[call-overload]


# Candidates


def keys() -> list[str]:
    return ["a", "b"]


def hosts() -> tuple[str, ...]:
    return ("north", "south")


def the_only_key() -> str:
    return "a"


async def keys_async() -> list[str]:
    return keys()


@opero(arg_fallback="key")
def ask(question: str, key: str = candidates("a", "b")) -> str:
    return question + key


@opero(arg_fallback="key")
async def ask_async(question: str, *, key: str = candidates_from(keys)) -> str:
    return question + key


@opmap(arg_fallback="key")
def ask_all(question: str, key: str = candidates_from(hosts)) -> str:
    return question + key


@opero(arg_fallback="port")
def connect(port: int = candidates(80, 8080)) -> None: ...


async def check_candidates() -> None:
    assert_type(candidates("a", "b"), str)
    assert_type(candidates(*keys()), str)
    assert_type(candidates_from(keys), str)
    assert_type(candidates_from(hosts), str)
    assert_type(candidates_from(lambda: [1, 2]), int)
    assert_type(ask("q"), str)
    assert_type(ask("q", candidates("c", "d")), str)
    assert_type(ask("q", key=candidates_from(keys)), str)
    assert_type(await ask_async("q", key=candidates("a", "b")), str)
    assert_type(ask_all(["q"], candidates("a", "b")), Results[str])
    assert_type(ask_all(candidates("a", "b")), Results[str])
    port: int = candidates(1, 2)
    del port

    ask("q", candidates(1, 2))  # type: ignore[arg-type]
    ask("q", candidates("a", 2))  # type: ignore[arg-type]
    ask("q", candidates(["a", "b"]))  # type: ignore[arg-type]
    ask("q", ["a", "b"])  # type: ignore[arg-type]
    ask("q", candidates_from(lambda: [1, 2]))  # type: ignore[arg-type]
    candidates_from(the_only_key)  # type: ignore[arg-type]
    candidates_from(keys_async)  # type: ignore[arg-type]
    candidates_from(["a", "b"])  # type: ignore[arg-type]


# Maps


@opmap
def fetch_all(url: str, size: int = 10, *, session: Session | None = None) -> bytes:
    return url.encode()[:size]


@opmap()
def fetch_all_called(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


@opmap(mode="thread", workers=5, cache=True, progress="pages")
def fetch_all_with_options(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


@opmap(return_exceptions=True)
def fetch_all_with_errors(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


@opmap(mode="thread", return_exceptions=False, ordered=False)
def fetch_all_or_raise(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


def urls() -> Iterator[str]:
    yield "u"


async def urls_async() -> AsyncIterator[str]:
    yield "u"


def check_maps() -> None:
    assert_type(fetch_all(["u", "v"]), Results[bytes])
    assert_type(list(fetch_all(["u", "v"])), list[bytes | Exception])
    assert_type(fetch_all(["u", "v"]).ok, list[bytes])
    assert_type(fetch_all(["u", "v"]).failed, list[Outcome[Any, bytes]])
    assert_type(fetch_all.starmap([("u", 5)]), Results[bytes])
    assert_type(fetch_all.starmap(zip("uv", [1, 2], strict=True)), Results[bytes])
    assert_type(fetch_all.starmap.stream([("u", 5)]), Iterator[Outcome[tuple[Any, ...], bytes]])
    assert_type(fetch_all_or_raise.starmap([("u", 5)]), list[bytes])
    assert_type(fetch_all(urls()), Results[bytes])
    assert_type(fetch_all({"u"}, 5, session=Session()), Results[bytes])
    assert_type(fetch_all("uv", size=5), Results[bytes])
    assert_type(fetch_all_called(["u"]), Results[bytes])
    assert_type(fetch_all_with_options(["u"], size=5), Results[bytes])
    assert_type(fetch_all_with_errors(["u"]), Results[bytes])
    assert_type(fetch_all_or_raise(["u"], 5), list[bytes])
    assert_type(opmap(fetch_plain)(["u"]), Results[bytes])
    assert_type(opmap(retries=1)(fetch_plain)(["u"]), Results[bytes])
    assert_type(opmap(return_exceptions=False)(fetch_plain)(["u"]), list[bytes])
    assert_type(opmap(functools.partial(fetch_plain, size=5))(["u"]), Results[bytes])
    assert_type(opmap(fetch)(["u"]), Results[bytes])

    fetch_all([5])  # type: ignore[list-item]
    fetch_all(5)  # type: ignore[arg-type]
    fetch_all()  # type: ignore[call-arg]
    fetch_all(["u"], size="5")  # type: ignore[arg-type]
    fetch_all(["u"], sise=5)  # type: ignore[call-arg]
    fetch_all(url=["u"])  # type: ignore[call-arg]
    fetch_all(urls_async())  # type: ignore[arg-type]
    contents: list[bytes] = fetch_all(["u"])  # type: ignore[assignment]
    del contents


@opmap(mode="thread", batch_size=16)
def embed(texts: list[str], model: str = "small") -> list[tuple[float, ...]]:
    return [(0.5,) for _ in texts]


@opmap(mode="async", batch_size=16, return_exceptions=False)
async def embed_async(texts: Sequence[str]) -> list[float | Exception]:
    return [0.5 for _ in texts]


@opmap(mode="thread", batch_size=16, default=None)
def embed_or_none(texts: Sequence[str]) -> tuple[float, ...]:
    return tuple(0.5 for _ in texts)


class Embedder:
    @opmap(mode="thread", batch_size=16)
    def embed(self, texts: list[str], model: str = "small") -> list[float]:
        return [0.5 for _ in texts]

    @opmap(mode="async", batch_size=16, return_exceptions=False)
    async def embed_async(self, texts: list[str]) -> list[float]:
        return [0.5 for _ in texts]


async def check_maps_of_lists() -> None:
    assert_type(Embedder().embed(["u", "v"], model="large"), Results[float])
    assert_type(Embedder().embed.one("u"), float)
    assert_type(await Embedder().embed_async(["u"]), list[float])
    Embedder().embed([5])  # type: ignore[list-item]
    assert_type(embed(["u", "v"], model="large"), Results[tuple[float, ...]])
    assert_type(embed.one("u"), tuple[float, ...])
    assert_type(embed.stream(urls()), Iterator[Outcome[str, tuple[float, ...]]])
    assert_type(await embed_async(["u"]), list[float])
    assert_type(await embed_async.one("u"), float)
    assert_type(embed_or_none(["u"]), Results[float, None])
    embed([["u"]])  # type: ignore[list-item]
    opmap(batch_size="16")  # type: ignore[call-overload]


def check_control_of_maps() -> None:
    assert_type(control(fetch_all).run(["u"], size=5), Results[bytes])
    assert_type(control(fetch_all).stream(["u"]), Iterator[Outcome[str, bytes]])
    assert_type(control(fetch_all).one("u"), bytes)
    assert_type(control(fetch_all).starmap([("u", 5)]), Results[bytes])
    assert_type(control(fetch_all).cache_delete("u", size=5), bool)
    assert_type(control(fetch_all_or_raise).run(["u"]), list[bytes])
    assert_type(control(fetch_all_async).stream(["u"]), AsyncIterator[Outcome[str, bytes]])
    assert_type(control(fetch_all_async).run(["u"]), Results[bytes])
    assert_type(control(MappingClient().get_all).run(["u"], size=5), Results[bytes])


def check_maps_with_a_default() -> None:
    mapped = opmap(default=None, retries=0)(fetch_plain)
    assert_type(mapped(["u"]), Results[bytes, None])
    assert_type(list(mapped(["u"])), list[bytes | None])
    assert_type(mapped(["u"]).ok, list[bytes])
    assert_type(mapped(["u"]).failed, list[Outcome[Any, bytes]])


def check_what_a_map_offers() -> None:
    assert_type(fetch_all.run(["u"], size=5), Results[bytes])
    assert_type(fetch_all_or_raise.run(["u"], size=5), list[bytes])
    assert_type(fetch_all.one("u", 5), bytes)
    assert_type(fetch_all_or_raise.one("u", size=5), bytes)
    assert_type(fetch_all.stats.calls, int)
    assert_type(fetch_all.cache_info().hits, int)
    assert_type(fetch_all.cache_delete("u", size=5), bool)
    assert_type(fetch_all.__wrapped__("u", size=5), bytes)
    fetch_all.cache_clear()
    assert_type(fetch_all.stream(["u"], size=5), Iterator[Outcome[str, bytes]])
    for outcome in fetch_all_or_raise.stream(urls()):
        assert_type(outcome, Outcome[str, bytes])
        assert_type(outcome.index, int)
        assert_type(outcome.item, str)
        assert_type(outcome.result, bytes)
        assert_type(outcome.error, Exception | None)
        assert_type(outcome.attempts, int)
        assert_type(outcome.seconds, float)
        assert_type(outcome.cached, bool)
        outcome.index = 5  # type: ignore[misc]

    fetch_all.one(5)  # type: ignore[arg-type]
    fetch_all.one(["u"])  # type: ignore[arg-type]
    fetch_all.run([5])  # type: ignore[list-item]
    fetch_all.stream([5])  # type: ignore[list-item]
    fetch_all.stream(["u"], sise=5)  # type: ignore[call-arg]
    fetch_all.cache_delete(5)  # type: ignore[arg-type]


# Async maps


@opmap
async def fetch_all_async(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


@opmap(mode="async", workers=5)
async def fetch_all_async_with_options(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


@opmap(mode="async_process", return_exceptions=False)
async def fetch_all_async_or_raise(url: str, size: int = 10) -> bytes:
    return url.encode()[:size]


async def check_async_maps() -> None:
    assert_type(await fetch_all_async(["u"]), Results[bytes])
    assert_type(await fetch_all_async(urls()), Results[bytes])
    assert_type(await fetch_all_async(urls_async(), size=5), Results[bytes])
    assert_type(await fetch_all_async_with_options(["u"], 5), Results[bytes])
    assert_type(await fetch_all_async_or_raise(["u"]), list[bytes])
    assert_type(await asyncio.create_task(fetch_all_async(["u"])), Results[bytes])
    assert_type(await opmap(fetch_async)(["u"]), Results[bytes])
    assert_type(await fetch_all_async.one("u", 5), bytes)
    assert_type(await fetch_all_async_or_raise.one("u"), bytes)
    assert_type(fetch_all_async.stats.calls, int)
    assert_type(fetch_all_async.cache_delete("u"), bool)
    assert_type(await fetch_all_async.__wrapped__("u"), bytes)
    assert_type(fetch_all_async.stream(["u"], size=5), AsyncIterator[Outcome[str, bytes]])
    async for outcome in fetch_all_async.stream(urls_async()):
        assert_type(outcome, Outcome[str, bytes])
        assert_type(outcome.result, bytes)

    await fetch_all_async([5])  # type: ignore[list-item]
    await fetch_all_async(5)  # type: ignore[arg-type]
    await fetch_all_async(["u"], size="5")  # type: ignore[arg-type]
    await fetch_all_async.one(5)  # type: ignore[arg-type]
    await fetch_all(["u"])  # type: ignore[misc]
    for wrong in fetch_all_async.stream(["u"]):  # type: ignore[attr-defined]
        del wrong


def check_blocking_forms_of_async_maps() -> None:
    assert_type(fetch_all_async.run(["u"], size=5), Results[bytes])
    assert_type(fetch_all_async.run(urls_async()), Results[bytes])
    assert_type(fetch_all_async_or_raise.run(["u"]), list[bytes])
    assert_type(asyncio.run(fetch_all_async_or_raise(["u"])), list[bytes])

    fetch_all_async.run([5])  # type: ignore[list-item]


# Maps as methods


class MappingClient:
    @opmap
    def get_all(self, url: str, size: int = 10) -> bytes:
        return url.encode()[:size]

    @opmap(mode="thread", return_exceptions=False)
    def get_all_or_raise(self, url: str, *, size: int = 10) -> bytes:
        return url.encode()[:size]

    @opmap(mode="async")
    async def get_all_async(self, url: str, size: int = 10) -> bytes:
        return url.encode()[:size]

    @opmap(mode="async", return_exceptions=False)
    async def get_all_async_or_raise(self, url: str, size: int = 10) -> bytes:
        return url.encode()[:size]

    def check_self(self) -> None:
        assert_type(self.get_all(["u"]), Results[bytes])


def check_maps_as_methods(client: MappingClient) -> None:
    assert_type(client.get_all(["u"], size=5), Results[bytes])
    assert_type(client.get_all_or_raise(urls(), size=5), list[bytes])
    assert_type(client.get_all.one("u", 5), bytes)
    assert_type(client.get_all.run(["u"]), Results[bytes])
    assert_type(client.get_all.stream(["u"]), Iterator[Outcome[str, bytes]])
    assert_type(client.get_all.stats.calls, int)
    assert_type(client.get_all.cache_delete("u"), bool)
    assert_type(MappingClient.get_all.stats.calls, int)
    assert_type(client.get_all_async.run(["u"]), Results[bytes])
    assert_type(client.get_all_async_or_raise.run(["u"]), list[bytes])

    client.get_all([5])  # type: ignore[list-item]
    client.get_all(["u"], size="5")  # type: ignore[arg-type]
    client.get_all_or_raise(["u"], 5)  # type: ignore[call-arg]
    client.get_all.one(5)  # type: ignore[arg-type]


async def check_async_maps_as_methods(client: MappingClient) -> None:
    assert_type(await client.get_all_async(["u"], size=5), Results[bytes])
    assert_type(await client.get_all_async(urls_async()), Results[bytes])
    assert_type(await client.get_all_async_or_raise(["u"]), list[bytes])
    assert_type(await client.get_all_async.one("u"), bytes)
    assert_type(client.get_all_async.stream(["u"]), AsyncIterator[Outcome[str, bytes]])

    await client.get_all_async([5])  # type: ignore[list-item]


# Workers that stay


async def check_kept_workers() -> None:
    with opmap(fetch_plain).pool():
        pass
    with fetch_all_async.pool():
        assert_type(await fetch_all_async(["u"]), Results[bytes])
    async with fetch_all_async.pool():
        pass
    fetch_all_async.pool(5)  # type: ignore[call-arg]


# Options of maps


def check_options_of_maps(*, flag: bool) -> None:
    opmap(
        mode="process",
        workers=5,
        ordered=False,
        progress=False,
        return_exceptions=True,
        pool_options={"start_method": "spawn"},
        cache=True,
        retries=0,
        attempt_timeout=5,
    )
    opmap(workers=None, pool_options=None)
    opmap(progress="pages", return_exceptions=False)
    opmap(mode=ThreadPoolExecutor(2), workers=5)
    opmap(mode=ProcessPoolExecutor)
    assert_type(opmap(mode=lambda: ThreadPoolExecutor(2))(fetch_plain)(["u"]), Results[bytes])
    assert_type(opmap(return_exceptions=flag)(fetch_plain)(["u"]), Results[bytes])

    opmap(worker=5)  # type: ignore[call-overload]
    opmap(workers="5")  # type: ignore[call-overload]
    opmap(mode="thread", progress=functools.partial(print, "done"))
    opmap(mode="thread", progress={"desc": "pages"})
    opmap(mode="threads")  # type: ignore[call-overload]
    opmap(progress=5)  # type: ignore[call-overload]
    opero(cache=True, cache_backend="file")  # type: ignore[call-overload]
    Cache(policy="lru", maxsize=10)
    Cache(policy="newest")  # type: ignore[arg-type]
    RateLimiter(5, when_full="fail")  # type: ignore[arg-type]
    opmap(mode=5)  # type: ignore[call-overload]
    opmap(mode=Session)  # type: ignore[arg-type]
    opmap(mode=lambda: 5)  # type: ignore[arg-type, return-value]
    opmap(return_exceptions="no")  # type: ignore[call-overload]
    opmap(retries="5")  # type: ignore[call-overload]
    opmap(fetch_plain, workers=5)  # type: ignore[call-overload]
    opmap(nothing)  # type: ignore[arg-type]


# The policies one by one


def check_single_policies() -> None:
    assert_type(get_cache_decorator(cache_ttl=5, maxsize=10)(fetch_plain)("u", size=5), bytes)
    assert_type(get_retry_decorator(retries=5, reraise=True)(fetch_plain)("u"), bytes)
    assert_type(get_rate_limit_decorator("5/s", max_burst=5)(fetch_plain)("u"), bytes)
    assert_type(get_fallback_decorator("url", fallback_cooldown=5)(fetch_plain)("u"), bytes)
    assert_type(control(get_cache_decorator()(fetch_plain)).stats.calls, int)
    get_parallel_map_decorator("thread", workers=5)(fetch_plain)(["u"])
    get_parallel_map_decorator(ThreadPoolExecutor)(fetch_plain)(["u"])
    get_parallel_executor("thread", workers=5)(fetch_plain, ["u"], size=5)
    get_parallel_executor(ThreadPoolExecutor(2))(fetch_plain, ["u"], size=5)

    with get_cache_context("name", cache_backend="disk", cache_ttl=5, maxsize=10) as engine:
        engine.set("key", 1)
        assert_type(engine.delete("key"), bool)
        engine.flush()  # type: ignore[attr-defined]
    get_cache_context()  # type: ignore[call-arg]

    get_retry_decorator()(fetch_plain)(5)  # type: ignore[arg-type]
    get_retry_decorator(retries="5")  # type: ignore[arg-type]
    get_rate_limit_decorator(None)  # type: ignore[arg-type]
    get_fallback_decorator()  # type: ignore[call-arg]


async def check_rate_limiter() -> None:
    limiter = RateLimiter("5/s", max_burst=5)
    assert_type(limiter.acquire(), bool)
    assert_type(await limiter.acquire_async(timeout=5), bool)
    with limiter as entered:
        assert_type(entered, RateLimiter)
    async with limiter as entered:
        assert_type(entered, RateLimiter)
    limiter.rate = "10/s"
    limiter.rate = [10, "100/minute"]
    assert_type(RateLimiter([1, "5/minute"], scope="machine", name="n", folder="f").rate, float)
    assert_type(get_rate_limit_decorator(limiter, per="url")(fetch_plain)("u"), bytes)

    RateLimiter(None)  # type: ignore[arg-type]


# Events, and switches for tests


def check_events_and_testing() -> None:
    def listen(event: CallDone) -> None:
        assert_type(event.seconds, float)
        assert_type(event.error, Exception | None)

    assert_type(on_event(listen), Subscription)
    with on_event(print) as subscription:
        assert_type(subscription, Subscription)
    on_event("print")  # type: ignore[arg-type]

    with instant() as time:
        assert_type(time.skipped, float)
    with disabled():
        pass
    with recorded() as events:
        assert_type(events, list[Event])


# Errors and the rest


def check_errors() -> None:
    try:
        fetch("u")
    except AllFailedError as failed:
        assert_type(failed.errors, list[Exception])
        assert_type(failed.exceptions, tuple[Exception | ExceptionGroup[Exception], ...])
        group: ExceptionGroup[Exception] = failed
        base: OperoError = failed
        del group, base
    except WorkerCrashedError as crashed:
        error: OperoError = crashed
        del error


def check_the_rest() -> None:
    assert_type(__version__, str)
    configure_logging("DEBUG")
    configure_logging()
    configure_logging(to=logging.getLogger("app"))
    clear_cache("pages")
    clear_cache()

    configure_logging(None)  # type: ignore[arg-type]


def check_telemetry(registry: CollectorRegistry, tracers: TracerProvider, meters: MeterProvider) -> None:
    assert_type(log_events(), Subscription)
    assert_type(otel.instrument(), Subscription)
    assert_type(prometheus.instrument(), Subscription)
    log_events("DEBUG").close()
    log_events(logging.getLogger("app")).close()
    otel.instrument(tracers, meter_provider=meters).close()
    with prometheus.instrument(registry) as subscription:
        assert_type(subscription, Subscription)

    log_events(10)  # type: ignore[arg-type]
    otel.instrument(meters)  # type: ignore[arg-type]
    prometheus.instrument("registry")  # type: ignore[arg-type]
