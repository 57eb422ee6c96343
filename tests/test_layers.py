"""The order of the layers, and what passes through all of them at once."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest
import tenacity
from side_by_side import until

from opero import AllFailedError, RejectedResultError, opero, opmap
from opero.core import CallTimeoutError, MisuseError, RateLimiter
from opero.core.clock import clock

PASSING = [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]


# The order, outermost first


def test_a_cache_hit_is_outside_of_every_other_layer(world, fake_clock):
    seen = []

    def ask(key):
        seen.append(key)
        return "answer"

    options = {"total_timeout": 1, "arg_fallback": "key", "rate_limit": 0.001, "retries": 1}
    function = opero(cache=True, **options)(world.define(ask))
    for _ in range(3):
        assert world.run(function, ["a", "b"]) == "answer"
    assert seen == ["a"]
    assert (function.stats.hits, function.stats.waited) == (2, 0)
    # Everything else has to wait for a slot, for which there is no time.
    with pytest.raises(CallTimeoutError):
        world.run(function, ["b"])


def test_the_cache_stores_what_all_other_layers_made_of_the_call(world, fake_clock):
    seen = []

    def ask(key):
        seen.append(key)
        if len(seen) < 4:
            raise LookupError
        return f"answer to {key}"

    function = opero(cache=True, arg_fallback="key")(world.define(ask))
    for _ in range(2):
        assert world.run(function, ["a", "b"]) == "answer to b"
    assert seen == ["a", "b", "a", "b"]


def test_a_failure_is_not_cached(world):
    def fail():
        raise LookupError

    function = opero(cache=True, retries=0)(world.define(fail))
    for _ in range(2):
        with pytest.raises(LookupError):
            world.run(function)
    assert function.stats.attempts == 2


def test_what_a_retry_error_callback_makes_up_is_not_cached(world):
    def fail():
        raise LookupError

    options = {"retry_error_callback": lambda state: "made up"}
    function = opero(cache=True, retries=0, retry_options=options)(world.define(fail))
    for _ in range(2):
        assert world.run(function) == "made up"
    assert function.stats.attempts == 2


def test_total_timeout_is_outside_of_retries_and_candidates(world, fake_clock):
    def ask(key):
        fake_clock.tick(1)
        raise LookupError(key)

    function = opero(arg_fallback="key", retries=9, min_delay=0, total_timeout=2.5)(world.define(ask))
    with pytest.raises(AllFailedError) as caught:
        world.run(function, ["a", "b"])
    assert [error.args[0] for error in caught.value.errors] == ["a", "b", "a"]


def test_retry_is_outside_of_fallback(world, fake_clock):
    def ask(key):
        raise LookupError(key)

    with pytest.raises(AllFailedError) as caught:
        world.run(opero(arg_fallback="key", retries=1)(world.define(ask)), ["a", "b"])
    assert [error.args[0] for error in caught.value.errors] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(("tick", "asked"), [(0, ["a"]), (1, ["a", "b", "a", "b"])])
def test_every_candidate_and_every_retry_takes_a_slot_of_the_rate_limit(world, fake_clock, tick, asked):
    def ask(key):
        fake_clock.tick(tick)
        raise LookupError(key)

    # One slot a second: without time passing there is one execution, and no time left to wait for the next.
    options = {"rate_limit": 1, "total_timeout": 0.5 + 10 * tick, "retries": 1, "min_delay": 0}
    with pytest.raises(AllFailedError) as caught:
        world.run(opero(arg_fallback="key", **options)(world.define(ask)), ["a", "b"])
    assert [error.args[0] for error in caught.value.errors] == asked


def test_the_first_attempt_takes_a_slot_too(world, fake_clock):
    function = opero(rate_limit=1, total_timeout=0.5)(world.define(lambda: "done"))
    world.run(function)
    with pytest.raises(CallTimeoutError):
        world.run(function)


def test_rate_limit_is_outside_of_attempt_timeout():
    @opero(rate_limit=25, attempt_timeout=0.03, retries=0)
    async def instant():
        return "done"

    async def twice():
        return await instant(), await instant()

    started = time.monotonic()
    assert asyncio.run(twice()) == ("done", "done")
    assert time.monotonic() - started > 0.03


def test_attempt_timeout_bounds_each_candidate_by_itself():
    @opero(arg_fallback="key", attempt_timeout=0.02, retries=0)
    async def ask(key):
        await asyncio.Event().wait() if key == "hanging" else None
        return key

    assert asyncio.run(ask(["hanging", "hanging", "good"])) == "good"


# What passes through


def everything(world, function, **options):
    """The function with every layer on that its world has, and a predicate that says yes to all that is raised."""
    options = {
        "cache": True,
        "total_timeout": 100,
        "arg_fallback": "key",
        "fallback_cooldown": 5,
        "rate_limit": 1e6,
        "retry_options": {"retry": tenacity.retry_if_not_exception_type(ZeroDivisionError)},
        **({"attempt_timeout": 50} if world.is_async else {}),
        **options,
    }
    return opero(**options)(world.define(function))


@pytest.mark.parametrize("attempt", [1, 2, 3], ids=["first candidate", "second candidate", "second round"])
@pytest.mark.parametrize("kind", PASSING)
def test_it_passes_every_layer_at_once_and_leaves_nothing_locked(world, fake_clock, kind, attempt):
    asked = []

    def ask(key):
        fake_clock.tick(1)
        asked.append(key)
        if len(asked) > attempt:
            return "done"
        raise kind if len(asked) == attempt else LookupError

    function = everything(world, ask)
    with pytest.raises(kind):
        world.run(function, ["a", "b"])
    assert len(asked) == attempt
    assert world.run(function, ["a", "b"]) == "done"
    assert len(asked) == attempt + 1


@pytest.mark.parametrize("kind", PASSING)
def test_it_passes_the_direct_way_to_the_function_too(world, kind):
    rest = [kind()]

    def ask():
        if rest:
            raise rest.pop()
        return "done"

    function = opero(world.define(ask))
    with pytest.raises(kind):
        world.run(function)
    assert world.run(function) == "done"
    assert function.stats.attempts == 2


@pytest.mark.parametrize("kind", PASSING)
def test_it_passes_from_the_wait_between_two_rounds(world, fake_clock, kind):
    rest = [LookupError(), LookupError()]

    def ask(key):
        fake_clock.tick(1)  # for the next slot
        if rest:
            raise rest.pop()
        return "done"

    def sleep(seconds):
        raise kind

    async def async_sleep(seconds):
        raise kind

    clock.sleep, clock.async_sleep = sleep, async_sleep
    function = everything(world, ask)
    with pytest.raises(kind):
        world.run(function, ["a", "b"])
    assert world.run(function, ["a", "b"]) == "done"


@pytest.mark.parametrize("kind", PASSING)
def test_it_passes_from_a_hook(world, fake_clock, kind):
    rest = [LookupError()]

    def ask(key):
        fake_clock.tick(1)  # for the next slot
        if rest:
            raise rest.pop()
        return "done"

    def retry_on(error):
        raise kind

    function = everything(world, ask, retry_options=None, retry_on=retry_on)
    with pytest.raises(kind):
        world.run(function, ["a", "b"])
    assert world.run(function, ["a", "b"]) == "done"


@pytest.fixture
def ctrl_c():
    """Have SIGINT raise KeyboardInterrupt, which it does not in a process started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_during_the_wait_for_a_slot_gives_the_place_back(fake_clock, ctrl_c):
    function = opero(rate_limit=1)(lambda: "done")
    function()  # the slot of this second, which does not pass by itself
    line = function.__opero__.plan.limit.limiter

    def interrupt():
        until(lambda: line.limit.expected_wait() > 1)
        ctrl_c()

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        function()
    thread.join()
    fake_clock.tick(1)
    assert function() == "done"
    assert function.stats.attempts == 2


def test_a_task_cancelled_in_the_wait_for_a_slot_gives_the_place_back(fake_clock):
    @opero(rate_limit=1)
    async def function():
        return "done"

    async def body():
        await function()  # the slot of this second, which does not pass by itself
        task = asyncio.create_task(function())
        await asyncio.sleep(0)
        assert function.__opero__.plan.limit.limiter.limit.expected_wait() > 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        fake_clock.tick(1)
        return await asyncio.wait_for(function(), 5)

    assert asyncio.run(body()) == "done"


@pytest.mark.parametrize("options", [{}, {"min_delay": 30}], ids=["in an attempt", "between two rounds"])
def test_a_cancelled_task_ends_at_once_and_a_later_call_works(options):
    reached = asyncio.Event()
    first = [True]

    async def ask(key):
        if not first:
            return "done"
        reached.set()
        if options:
            raise LookupError
        return await asyncio.Event().wait()

    function = opero(cache=True, attempt_timeout=50, total_timeout=100, arg_fallback="key", **options)(ask)

    async def body():
        task = asyncio.create_task(function("a"))
        await reached.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        first.clear()
        return await asyncio.wait_for(function("a"), 5)

    assert asyncio.run(body()) == "done"


def test_a_closed_coroutine_leaves_nothing_locked():
    class Suspended:
        def __await__(self):
            yield

    attempts = []

    @opero(cache=True, arg_fallback="key", rate_limit=1e6)
    async def ask(key):
        attempts.append(key)
        if len(attempts) == 1:
            await Suspended()
        return "done"

    coroutine = ask(["a", "b"])
    coroutine.send(None)
    coroutine.close()
    assert asyncio.run(ask(["a", "b"])) == "done"
    assert attempts == ["a", "a"]


@pytest.mark.parametrize("kind", PASSING)
def test_whoever_waits_for_an_identical_call_takes_over_when_it_ends_so(kind):
    computing, interrupt = threading.Event(), threading.Event()
    attempts = []

    @opero(cache=True)
    def ask():
        attempts.append(threading.get_ident())
        if len(attempts) == 1:
            computing.set()
            interrupt.wait(5)
            raise kind
        return "done"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask)
        computing.wait(5)
        second = pool.submit(ask)
        interrupt.wait(0.01)  # time for the second to come and wait
        interrupt.set()
        assert isinstance(first.exception(5), kind)
        assert second.result(5) == "done"


# How it waits


def test_a_sleep_that_was_put_in_place_of_the_usual_one_is_what_waits(world, monkeypatch):
    slept = []

    async def async_sleep(seconds):
        slept.append(seconds)

    def fail():
        raise LookupError

    function = opero(retries=2, min_delay=60, max_delay=60, jitter=False)(world.define(fail))
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(asyncio, "sleep", async_sleep)
    with pytest.raises(LookupError):
        world.run(function)
    assert slept == [60, 60]


# What is kept of an attempt


class Payload:
    """What a failed attempt has in its frame."""


def attempts_that_see_each_other():
    """A function that fails, and a list of how much of its earlier attempts there was at each of them."""
    held, seen = [], []

    def fail(*_):
        seen.append(sum(payload() is not None for payload in held))
        payload = Payload()
        held.append(weakref.ref(payload))
        raise LookupError

    return fail, seen


@pytest.fixture
def no_garbage_collector():
    """Leaves what is in a circle where it is."""
    gc.disable()
    yield
    gc.enable()


ALL_BY_FLOW = [
    {"total_timeout": 100},
    {"total_timeout": 100, "retry_on": lambda _: 0},
    {"breaker": 9},
    {"on_event": lambda _: None},
    {"cache": True},
    {"cache": True, "rate_limit": 1e6},
    {"retry_if_result": lambda _: False},
    {"retry_options": {"before": lambda _: None, "after": lambda _: None, "before_sleep": lambda _: None}},
    {"retry_options": {"retry": tenacity.retry_if_exception_type(LookupError)}, "jitter": False},
]


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("options", ALL_BY_FLOW, ids=" ".join)
def test_nothing_of_an_attempt_is_kept_once_the_next_one_begins(world, options):
    fail, seen = attempts_that_see_each_other()
    with pytest.raises(LookupError):
        world.run(opero(retries=4, min_delay=0, **options)(world.define(fail)))
    assert seen == [0] * len(seen)
    assert len(seen) > 2


@pytest.mark.usefixtures("no_garbage_collector")
def test_nothing_is_kept_of_a_first_attempt_that_the_wrapper_made(world):
    fail, seen = attempts_that_see_each_other()
    is_up = True
    function = opero(retries=4, min_delay=0)(world.define(lambda: None if is_up else fail()))
    world.run(function)
    is_up = False
    with pytest.raises(LookupError):
        world.run(function)
    assert seen == [0] * 5


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("options", [{}, {"total_timeout": 100}], ids=["batch", "flow"])
@pytest.mark.parametrize("mode", ["thread", "async"], indirect=True)
def test_nothing_of_an_items_attempt_is_kept_once_the_next_one_begins(mode, options):
    fail, seen = attempts_that_see_each_other()
    mapped = opmap(**{**mode.options, "workers": 1}, retries=4, min_delay=0, **options, return_exceptions=True)(
        mode.define(fail)
    )
    assert [type(error) for error in mode.run(mapped, [1])] == [LookupError]
    assert seen == [0] * 5


def test_with_candidates_all_errors_are_kept(world, fake_clock):
    fail, seen = attempts_that_see_each_other()

    def ask(key):
        fail()

    with pytest.raises(AllFailedError) as caught:
        world.run(opero(arg_fallback="key", retries=1)(world.define(ask)), ["a", "b"])
    assert seen == [0, 1, 2, 3]
    assert all(error.__traceback__ is not None for error in caught.value.errors)


# A task that is being cancelled


class Converting:
    """A service whose client makes an error of its own of a cancellation, or a result."""

    def __init__(self, make=None, kind=ConnectionError):
        self.asked = []
        self.reached = asyncio.Event()
        self.make, self.kind = make, kind

    async def __call__(self, key="a"):
        self.asked.append(key)
        self.reached.set()
        try:
            if len(self.asked) == 1:
                await asyncio.Event().wait()
            raise ConnectionError("again")
        except asyncio.CancelledError:
            if self.make is not None:
                return self.make()
            raise self.kind("closed") from None

    async def cancelled(self, function, *args):
        """Cancel a call of a function that asks this service, and give what came of it."""
        task = asyncio.create_task(function(*args))
        await self.reached.wait()
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        return outcome


@pytest.mark.parametrize(
    "options",
    [
        {"total_timeout": 100},
        {"total_timeout": 100, "attempt_timeout": 50},
        {"cache": True},
        {"arg_fallback": "key", "fallback_cooldown": 60},
        {"breaker": 1},
        {"retry_options": {"retry": tenacity.retry_if_exception_type()}},
        {"retries": 5},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("is_first_call", [True, False], ids=["first call", "later call"])
@pytest.mark.parametrize("kind", [ConnectionError, TimeoutError])
def test_no_attempt_follows_once_the_task_is_being_cancelled(options, is_first_call, kind):
    service = Converting(kind=kind)
    is_up = not is_first_call

    @opero(**options)
    async def ask(key=("a", "b"), number=1):
        return "up" if is_up else await service(key)

    if is_up:
        asyncio.run(ask(number=0))
        is_up = False
    error = asyncio.run(service.cancelled(ask))
    assert isinstance(error, kind)
    assert any("its task is being cancelled" in note for note in error.__notes__)
    assert len(service.asked) == 1


@pytest.mark.skipif(sys.version_info < (3, 13), reason="there a failed TaskGroup looks like a cancellation")
def test_a_rejected_result_of_a_cancelled_attempt_is_the_last_one():
    service = Converting(make=lambda: None)

    @opero(retry_if_result=lambda result: result is None)
    async def ask():
        return await service()

    assert isinstance(asyncio.run(service.cancelled(ask)), RejectedResultError)
    assert service.asked == ["a"]


def test_the_circuit_hears_nothing_of_a_cancelled_attempt():
    service = Converting()

    @opero(breaker=1, retries=0)
    async def ask():
        return "done" if service.asked else await service()

    async def body():
        await service.cancelled(ask)
        return await ask()

    assert asyncio.run(body()) == "done"


@pytest.mark.parametrize("is_begun", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("options", [{}, {"total_timeout": 100}, {"rate_limit": 1e6}], ids=str)
def test_calls_of_a_task_that_was_cancelled_before_are_retried(options, is_begun):
    tries = []

    @opero(min_delay=0, **options)
    async def tidy_up():
        tries.append(1)
        if len(tries) < 3 and begun:
            raise ConnectionError
        return "tidy"

    begun = not is_begun
    if is_begun:
        asyncio.run(tidy_up())
        tries.clear()
        begun = True

    async def work(begun):
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            assert await tidy_up() == "tidy"

    async def body():
        begun = asyncio.Event()
        task = asyncio.create_task(work(begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())
    assert len(tries) == 3


@pytest.mark.parametrize("options", [{}, {"total_timeout": 100}, {"retry_if_result": lambda r: r is None}], ids=str)
def test_what_failed_after_a_task_group_has_failed_is_retried(options):
    tries = []

    async def fail():
        raise ConnectionError

    @opero(retries=2, min_delay=0, **options)
    async def gather():
        tries.append(1)
        error = None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fail())
        except* ConnectionError as group:
            error = group.exceptions[0]
        if "retry_if_result" in options:
            return
        raise error

    with pytest.raises((ConnectionError, RejectedResultError)):
        asyncio.run(gather())
    assert len(tries) == 3


async def limited_by_asyncio():
    async with asyncio.timeout(0.001):
        await asyncio.Event().wait()


async def limited_by_waiting():
    await asyncio.wait_for(asyncio.Event().wait(), 0.001)


async def limited_by_anyio():
    with anyio.fail_after(0.001):
        await asyncio.Event().wait()


@pytest.mark.parametrize("options", [{}, {"total_timeout": 100}], ids=str)
@pytest.mark.parametrize("limited", [limited_by_asyncio, limited_by_waiting, limited_by_anyio])
@pytest.mark.parametrize("is_over", [False, True], ids=["during the cancellation", "after it"])
def test_time_limits_within_a_function_are_no_cancellation_in_a_task_that_was_cancelled_before(
    options, limited, is_over
):
    tries = []

    @opero(retries=2, min_delay=0, **options)
    async def flush():
        tries.append(1)
        await limited()

    async def work():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not is_over:
                await flush()
        await flush()

    async def body():
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(TimeoutError):
            await task

    asyncio.run(body())
    assert len(tries) == 3


def test_a_time_limit_that_the_function_makes_an_error_of_is_no_cancellation():
    service = Converting()

    @opero(attempt_timeout=0.01, retries=2, min_delay=0)
    async def ask():
        return await service()

    with pytest.raises(ConnectionError, match="again"):
        asyncio.run(ask())
    assert len(service.asked) == 3


# Where no asyncio loop runs, as under trio


def by_hand(coroutine):
    """Run what never waits, under no library at all."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


EVERYTHING_WITHOUT_A_WAIT = {"cache": True, "arg_fallback": "key", "rate_limit": 1e6, "breaker": 3}


@pytest.mark.parametrize("options", [{}, EVERYTHING_WITHOUT_A_WAIT], ids=["alone", "with policies"])
def test_what_needs_no_wait_works_without_asyncio(options):
    @opero(**options)
    async def ask(key):
        return key

    assert by_hand(ask("a")) == "a"


def test_candidates_are_tried_without_asyncio():
    async def ask(key):
        if key != "c":
            raise LookupError(key)
        return key

    assert by_hand(opero(arg_fallback="key")(ask)(["a", "b", "c"])) == "c"


@pytest.mark.parametrize("options", [{}, {"arg_fallback": "key"}, {"breaker": 3}, {"cache": True}], ids=str)
def test_a_wait_without_asyncio_says_so_and_does_not_hide_the_functions_error(options):
    own = LookupError("own")

    @opero(**options)
    async def ask(key):
        raise own

    with pytest.raises(MisuseError, match=r"no asyncio loop is running here: call .*ask under asyncio") as caught:
        ask("a").send(None)
    assert caught.value.__context__ is own


@pytest.mark.parametrize("options", [{"total_timeout": 5}, {"attempt_timeout": 5}, {"disk": True}], ids=" ".join)
def test_what_has_to_wait_for_its_first_attempt_is_not_called_without_asyncio(options, disk_backend):
    called = []
    options = disk_backend.options | {"cache_namespace": "nowhere"} if "disk" in options else options

    @opero(**options)
    async def ask():
        called.append(1)

    with pytest.raises(MisuseError, match="no asyncio loop is running here"):
        ask().send(None)
    assert called == []


def test_a_slot_that_has_to_be_waited_for_without_asyncio_says_so_and_leaves_no_place(fake_clock):
    limit = RateLimiter(1)

    @opero(rate_limit=limit)
    async def ask():
        return "done"

    assert by_hand(ask()) == "done"
    with pytest.raises(MisuseError, match="no asyncio loop is running here"):
        ask().send(None)
    with pytest.raises(MisuseError, match="no asyncio loop is running here"):
        limit.acquire_async().send(None)
    fake_clock.tick(1)
    assert by_hand(ask()) == "done"
