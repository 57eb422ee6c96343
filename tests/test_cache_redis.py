"""Where a redis cache is: by URL, by a client of the program's own, by host and port; and hits in an event loop."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis
import redis.asyncio
from redis_server import RedisServer, free_port, make_cluster

from opero import Cache, opero, opmap

SECRET = "p4ssw0rd-and-more"


def address(backend):
    return {"host": backend.server.host, "port": backend.server.port}


WAYS = {
    "host and port": lambda backend: backend.cache_options,
    "url": lambda backend: {"url": "redis://{host}:{port}/0".format(**address(backend))},
    "client": lambda backend: {"client": redis.Redis(**address(backend))},
    "client of asyncio": lambda backend: {"client": redis.asyncio.Redis(**address(backend))},
}


@pytest.fixture
def close():
    made = []
    yield made.append
    for client in made:
        if isinstance(client, redis.Redis):
            client.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_server_can_be_told_in_many_ways_and_they_share_their_entries(world, redis_backend, close, way):
    settings = WAYS[way](redis_backend)
    close(settings.get("client"))
    namespace = redis_backend.namespace()

    async def close_in_loop():
        if way == "client of asyncio":
            await settings["client"].aclose()

    first = opero(cache=Cache(backend="redis", namespace=namespace, **settings), retries=0)(
        world.define(lambda x: [x, "first"])
    )
    if world.is_async:

        async def use():
            got = [await first(1), await first(1)]
            await close_in_loop()
            return got

        assert asyncio.run(use()) == [[1, "first"]] * 2
    else:
        assert [first(1), first(1)] == [[1, "first"]] * 2
    assert first.stats.hits == 1
    again = opero(cache=Cache(backend="redis", namespace=namespace, **redis_backend.cache_options), retries=0)(
        lambda x: [x, "again"]
    )
    assert again(1) == [1, "first"]


OTHER_CLIENTS = {
    "cluster": ("redis_cluster", redis.RedisCluster),
    "sentinel": ("redis_sentinel", lambda *place: redis.Sentinel([place]).master_for("main")),
}


@pytest.fixture
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=OTHER_CLIENTS)
def other_client(request):
    """A client that knows where to find what by itself."""
    server, make = OTHER_CLIENTS[request.param]
    found = request.getfixturevalue(server)
    client = make(found.host, found.port)
    yield client
    sentinel = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    for used in [client, *getattr(sentinel, "sentinels", [])]:
        used.close()


@pytest.fixture
def call(world, loop):
    def run(f, *args):
        return loop.run(f(*args)) if world.is_async else f(*args)

    return run


class TestAClientOfAClusterOrOfASentinel:
    def test_finds_entries_deletes_and_clears_them(self, world, call, other_client, redis_backend):
        runs = []
        cache = Cache(backend="redis", client=other_client, namespace=redis_backend.namespace())
        f = opero(cache=cache, retries=0)(world.define(lambda x: runs.append(x) or [x]))

        assert [call(f, n) for n in range(20)] == [call(f, n) for n in range(20)]
        assert [len(runs), f.stats.hits, f.stats.cache_errors, f.cache_info().currsize] == [20, 20, 0, 20]
        assert [f.cache_delete(3), f.cache_delete(3)] == [True, False]
        f.cache_clear()
        assert f.cache_info().currsize == 0

    def test_is_asked_for_many_items_of_a_map(self, world, call, other_client, redis_backend):
        cache = Cache(backend="redis", client=other_client, namespace=redis_backend.namespace())
        mode = "async" if world.is_async else "thread"
        f = opmap(mode=mode, progress=False, cache=cache, retries=0)(world.define(lambda x: [x]))

        assert [call(f, range(40)), call(f, range(40))] == [[[n] for n in range(40)]] * 2
        assert [f.stats.attempts, f.stats.hits, f.stats.cache_errors] == [40, 40, 0]

    def test_keeps_no_entry_that_was_deleted_during_its_computation(self, other_client, redis_backend):
        cache = Cache(backend="redis", client=other_client, namespace=redis_backend.namespace())

        @opero(cache=cache, retries=0)
        def f(x):
            # From another process, as far as the store knows.
            f.__opero__.plan.cache.store.delete(f.__opero__.plan.cache.keys.key_of(x))
            return x

        assert [f(1), f(1)] == [1, 1]
        assert [f.stats.hits, f.cache_info().currsize] == [0, 0]


@pytest.mark.parametrize(
    "make",
    [lambda: redis.asyncio.RedisCluster("host"), lambda: redis.asyncio.Sentinel([("host", 1)]).master_for("main")],
    ids=["cluster", "sentinel"],
)
def test_a_client_of_asyncio_that_finds_servers_by_itself_is_refused(make):
    with pytest.raises(TypeError, match=r"of redis\.asyncio.*give one for threads"):
        Cache(backend="redis", client=make())


def test_a_cluster_that_is_away_costs_the_cache_and_not_the_call(world, call, tmp_path):
    with RedisServer(tmp_path / "away", cluster_enabled="yes", cluster_port=free_port()) as node:
        make_cluster(node)
        client = redis.RedisCluster(node.host, node.port)
    f = opero(cache=Cache(backend="redis", client=client, namespace="away"), retries=0)(world.define(lambda x: x))

    assert [call(f, 1), call(f, 1), f.stats.attempts] == [1, 1, 2]
    client.close()


def test_a_frozen_server_does_not_hold_up_a_call_although_the_programs_own_client_would_wait(tmp_path):
    with (
        RedisServer(tmp_path / "frozen") as server,
        redis.Redis(host=server.host, port=server.port, socket_timeout=60) as client,
    ):
        f = opero(cache=Cache(backend="redis", client=client, namespace="frozen"), retries=0)(lambda x: x)
        f(1)
        server.freeze()
        began = time.monotonic()
        assert [f(2), f(3)] == [2, 3]
        assert time.monotonic() - began < 10
        assert f.stats.cache_errors == 2
        server.thaw()


class CountedConnection(redis.Connection):
    made = 0

    def __init__(self, *args, **kwargs):
        CountedConnection.made += 1
        super().__init__(*args, **kwargs)


def test_a_client_with_connections_of_a_class_of_its_own_is_used_itself(redis_backend):
    with redis.ConnectionPool(connection_class=CountedConnection, **address(redis_backend)) as pool:
        cache = Cache(backend="redis", client=redis.Redis(connection_pool=pool), namespace=redis_backend.namespace())
        f = opero(cache=cache, retries=0)(lambda x: x)

        assert [f(1), f(1), f.stats.hits, CountedConnection.made] == [1, 1, 1, 1]


@pytest.mark.parametrize("module", [redis, redis.asyncio], ids=["threads", "asyncio"])
def test_a_client_that_gives_its_program_text_is_taken(redis_backend, module):
    client = module.Redis(**address(redis_backend), decode_responses=True)
    f = opero(cache=Cache(backend="redis", client=client, namespace=redis_backend.namespace()), retries=0)(lambda x: x)
    assert [f(b"\xff"), f(b"\xff"), f.stats.hits] == [b"\xff", b"\xff", 1]


def test_a_client_of_the_programs_own_is_not_closed(redis_backend):
    with redis.Redis(**address(redis_backend)) as client:
        f = opero(cache=Cache(backend="redis", namespace=redis_backend.namespace(), client=client), retries=0)(
            lambda x: x
        )
        f(1)
        del f
        assert client.ping()


def test_more_threads_than_redis_py_has_connections_for_find_their_entries(redis_backend):
    f = opero(**redis_backend.options, cache_namespace=redis_backend.namespace(), retries=0)(lambda x: x)
    f(1)
    pool = f.__opero__.plan.cache.store.server.client.connection_pool
    busy = [pool.get_connection() for _ in range(150)]
    assert [f(1), f.stats.hits, f.stats.cache_errors] == [1, 1, 0]
    for connection in busy:
        pool.release(connection)
    assert [f(1), f.stats.hits] == [1, 2]


@pytest.fixture
def doubled(redis_backend):
    async def double(x):
        return 2 * x

    return opero(**redis_backend.options, cache_namespace=redis_backend.namespace(), retries=0)(double)


def test_a_hit_in_an_event_loop_needs_no_thread(doubled, monkeypatch):
    from opero.core import steps

    async def main():
        await doubled(1)
        monkeypatch.setattr(steps, "consult_async", None)
        return [await doubled(1) for _ in range(5)], await asyncio.gather(*[doubled(1) for _ in range(200)])

    one_by_one, at_once = asyncio.run(main())
    assert (one_by_one, at_once) == ([2] * 5, [2] * 200)


def test_event_loops_one_after_the_other_and_side_by_side_find_the_same(doubled):
    from side_by_side import results, started

    async def main():
        return [await doubled(n) for n in range(10)]

    for _ in range(3):
        assert asyncio.run(main()) == [2 * n for n in range(10)]
    assert results([started(asyncio.run, main()) for _ in range(4)]) == [[2 * n for n in range(10)]] * 4
    assert doubled.stats.attempts == 10


def test_a_cancelled_hit_does_no_harm(doubled):
    async def main():
        for n in range(5):
            await doubled(n)
        for delay in range(30):
            tasks = [asyncio.ensure_future(doubled(n)) for n in range(5)]
            await asyncio.sleep(delay / 20_000)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert await asyncio.gather(*[doubled(n) for n in range(5)]) == [2 * n for n in range(5)]

    asyncio.run(main())


def test_an_event_loop_that_is_held_up_says_nothing_of_the_server(doubled, monkeypatch):
    from opero.core.stores import redis

    async def main():
        await doubled(1)
        await doubled(1)
        with monkeypatch.context() as patch:
            patch.setattr(redis, "READ_SECONDS", 0.9)
            asked = asyncio.ensure_future(doubled(1))
            await asyncio.sleep(0)
            time.sleep(1.2)  # noqa: ASYNC251 - as a slow computation in the loop
            return await asked, await doubled(1)

    assert asyncio.run(main()) == (2, 2)
    assert [doubled.stats.attempts, doubled.stats.cache_errors] == [1, 0]


def test_a_server_that_goes_away_costs_an_event_loop_little(own_redis):
    async def double(x):
        return 2 * x

    f = opero(**own_redis.options, cache_namespace=own_redis.namespace(), retries=0)(double)

    async def main():
        await f(1)
        await f(1)
        own_redis.server.stop()
        before = time.monotonic()
        got = [await f(1) for _ in range(20)]
        return got, time.monotonic() - before

    got, seconds = asyncio.run(main())
    assert got == [2] * 20
    assert seconds < 3


@pytest.mark.parametrize(
    "settings",
    [
        {"url": f"redis://user:{SECRET}@:port/0"},
        {"url": f"redis://:x/{SECRET}@localhost"},
        {"url": f"redis://:x?{SECRET}@localhost"},
        {"url": f"redis://:x#{SECRET}@localhost"},
        {"url": f"http://:{SECRET}@localhost"},
        {"url": SECRET},
        {"url": 5},
        {"redis_host": f"user:{SECRET}@localhost"},
        {"redis_host": f"redis://user:{SECRET}@localhost"},
        {"url": f"redis://:{SECRET}@localhost", "redis_host": "localhost"},
        {"url": f"redis://:{SECRET}@localhost", "client": redis.Redis()},
        {"client": SECRET},
        {
            "client": redis.Redis(
                connection_pool=redis.ConnectionPool(CountedConnection, decode_responses=True, password=SECRET)
            )
        },
    ],
)
def test_a_wrong_place_is_refused_without_telling_the_password(settings):
    with pytest.raises((TypeError, ValueError)) as caught:
        Cache(backend="redis", **settings)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None or SECRET not in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "settings",
    [
        {"url": f"redis://user:{SECRET}@127.0.0.1:1/0"},
        {"url": f"redis://{SECRET}:{SECRET}@127.0.0.1:1/0"},
        {"redis_host": "127.0.0.1", "redis_port": 1, "redis_password": SECRET},
        {"client": redis.Redis(port=1, password=SECRET)},
    ],
)
def test_no_message_about_a_server_that_is_away_tells_the_password(settings, warnings):
    from opero import OperoError

    f = opero(cache=Cache(backend="redis", namespace="away", **settings), retries=0)(lambda x: x)
    assert f(1) == 1
    with pytest.raises(OperoError) as caught:
        f.cache_clear()
    assert len(warnings) == 1
    texts = [*warnings, str(caught.value), str(caught.value.__cause__), repr(f.__opero__.plan)]
    assert not [text for text in texts if SECRET in text]


def test_a_wrong_password_costs_the_cache_and_is_not_told(own_redis, warnings):
    with own_redis.client() as client:
        client.config_set("requirepass", "right")
    try:
        url = f"redis://:{SECRET}@{own_redis.server.host}:{own_redis.server.port}/0"
        f = opero(cache=Cache(backend="redis", namespace="locked", url=url), retries=0)(lambda x: x)
        assert (f(1), f.stats.cache_errors) == (1, 1)
        assert not [text for text in warnings if SECRET in text]
        right = url.replace(SECRET, "right")
        g = opero(cache=Cache(backend="redis", namespace="locked", url=right), retries=0)(lambda x: x)
        assert [g(1), g(1), g.stats.hits] == [1, 1, 1]
    finally:
        with redis.Redis(host=own_redis.server.host, port=own_redis.server.port, password="right") as client:
            client.config_set("requirepass", "")
