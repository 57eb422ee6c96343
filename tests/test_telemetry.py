"""Events as log lines, as spans and metrics of OpenTelemetry, and as metrics of Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from loguru import logger
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import REGISTRY, CollectorRegistry, Counter

import opero
from opero.telemetry import otel, prometheus
from opero.telemetry.lines import log_events


def failing(times):
    """A function that raises so many times before it returns."""
    left = [times]

    def function(*_args):
        if left[0]:
            left[0] -= 1
            raise ValueError("secret-text")
        return "secret-result"

    return function


def cancel_a_call_of(function):
    async def main():
        task = asyncio.create_task(function())
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())


async def sleep_long():
    await asyncio.Event().wait()


# Lines


@pytest.fixture
def lines():
    """What arrives at a sink of the program's: (level, text)."""
    gathered = []

    def sink(message):
        gathered.append((message.record["level"].name, message.record["message"]))

    number = logger.add(sink, level=0, filter="opero")
    yield gathered
    logger.remove(number)
    logger.disable("opero")


def test_a_line_tells_each_failed_attempt_and_the_retry_and_the_failure(world, lines, fake_clock):
    f = opero.opero(retries=1, min_delay=2, jitter=False)(world.define(failing(5)))
    with log_events(), contextlib.suppress(ValueError):
        world.run(f, "secret-argument")
    told = [(level, text.split(") ", 1)[1]) for level, text in lines]
    assert told == [
        ("INFO", "failed in attempt 1 after 0 s: ValueError"),
        ("INFO", "begins round 2 in 2 s"),
        ("INFO", "failed in attempt 2 after 0 s: ValueError"),
        ("WARNING", "failed after 2 attempts in 2 s: ValueError"),
    ]


def test_a_line_names_function_and_call(world, lines):
    f = opero.opero(retries=0)(world.define(failing(1)))
    with log_events("WARNING"), contextlib.suppress(ValueError):
        world.run(f)
    ((_, text),) = lines
    assert text.startswith("test_telemetry.failing.<locals>.function (call ")


def test_a_line_names_the_place_of_an_item(mode, lines):
    mapped = opero.opmap(retries=0, return_exceptions=True, **mode.options)(mode.define(lambda x: 1 / x))
    with log_events("WARNING"):
        mode.run(mapped, [1, 0])
    ((_, text),) = lines
    assert ", item 1) failed" in text


def test_a_line_tells_that_a_candidate_takes_over(world, lines):
    f = opero.opero(arg_fallback="key", retries=0)(world.define(lambda key: 1 / (key != "secret-a")))
    with log_events():
        world.run(f, ["secret-a", "secret-b"])
    assert lines[-1][0] == "INFO"
    assert lines[-1][1].endswith("goes on with candidate 2")


def test_a_line_tells_of_a_long_wait_for_a_slot(world, lines):
    f = opero.opero(rate_limit=5, rate_limit_options={"max_burst": 1})(world.define(lambda: None))
    with log_events("DEBUG"):
        world.run(f)
        world.run(f)
    ((level, text),) = lines
    assert level == "DEBUG"
    assert re.search(r"\) waited \d+ ms for the rate limit$", text)


def test_a_short_wait_for_a_slot_is_not_worth_a_line(world, lines):
    f = opero.opero(rate_limit=50, rate_limit_options={"max_burst": 1})(world.define(lambda: None))
    with log_events("DEBUG"):
        world.run(f)
        world.run(f)
    assert lines == []


def test_a_line_has_no_argument_no_result_and_no_text_of_an_error(world, lines):
    f = opero.opero(arg_fallback="key", retries=1, min_delay=0)(world.define(lambda key: failing(9)()))
    g = opero.opero(min_delay=0)(world.define(failing(1)))
    with log_events("TRACE"), contextlib.suppress(opero.AllFailedError):
        world.run(g, "secret-argument")
        world.run(f, ["secret-a", "secret-b"])
    assert len(lines) > 5
    assert "secret" not in str(lines)


def test_lines_below_the_level_are_not_logged(world, lines):
    f = opero.opero(min_delay=0)(world.define(failing(1)))
    with log_events("WARNING"):
        world.run(f)
    assert lines == []


def test_after_the_end_there_are_no_lines(world, lines):
    log_events().close()
    with contextlib.suppress(ValueError):
        world.run(opero.opero(retries=0)(world.define(failing(1))))
    assert lines == []


def test_a_level_that_loguru_does_not_know_is_refused():
    with pytest.raises(ValueError, match="LOUD"):
        log_events("LOUD")


def test_a_logger_that_is_neither_is_refused_as_such():
    class Logger:
        def log(self, level, event):
            raise AssertionError

    with pytest.raises(TypeError, match="log_events got a Logger as to; write a logger of the standard library"):
        log_events(Logger())


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [
        (lambda logger: {"level": logger}, ["INFO", "INFO", "INFO", "WARNING"]),
        (lambda logger: {"to": logger}, ["INFO", "INFO", "INFO", "WARNING"]),
        (lambda logger: {"level": "WARNING", "to": logger}, ["WARNING"]),
    ],
    ids=["logger", "to", "level and to"],
)
def test_lines_go_to_a_logger_of_the_standard_library(world, caplog, fake_clock, arguments, levels):
    caplog.set_level(logging.DEBUG, "app")
    with log_events(**arguments(logging.getLogger("app"))), contextlib.suppress(ValueError):
        world.run(opero.opero(retries=1)(world.define(failing(2))))
    assert [record.levelname for record in caplog.records if record.name == "app"] == levels


ENABLE = "from loguru import logger; logger.enable('opero')"
DISABLE = "from loguru import logger; logger.disable('opero')"

FAIL = """
import opero
def fail():
    @opero.opero(retries=0)
    def parse(text):
        return int(text)
    try:
        parse("text")
    except ValueError:
        pass
"""


def program(source):
    """What a program writes to stderr, where loguru writes unless told otherwise."""
    command = [sys.executable, "-W", "error", "-c", FAIL + textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("before", ["", "import loguru", "fail()", "import loguru; fail()", DISABLE])
def test_a_wish_for_lines_lets_them_through_and_nothing_else_of_opero(before):
    (line,) = program(f"{before}\nfrom opero.telemetry.lines import log_events\nlog_events('WARNING')\nfail()")
    assert "opero.telemetry.lines" in line


def test_a_host_that_has_opero_say_all_goes_on_hearing_all():
    told = program(f"{ENABLE}\nfrom opero.telemetry.lines import log_events\nlog_events('WARNING')\nfail()")
    assert len(told) == 2


def test_disabling_opero_afterwards_silences_the_lines():
    assert program(f"from opero.telemetry.lines import log_events\nlog_events()\n{DISABLE}\nfail()") == []


# OpenTelemetry


@pytest.fixture
def telemetry():
    """The SDK with its exporters in memory, and opero instrumented."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    subscription = otel.instrument(tracers, meters)

    def measured(name):
        data = reader.get_metrics_data()
        scopes = [] if data is None else [scope for one in data.resource_metrics for scope in one.scope_metrics]
        return [point for scope in scopes for m in scope.metrics if m.name == name for point in m.data.data_points]

    with subscription:
        yield SimpleNamespace(
            spans=exporter.get_finished_spans,
            measured=measured,
            tracer=tracers.get_tracer("test"),
            subscription=subscription,
            live=subscription.callback._live,
        )
    assert trace.get_current_span() is trace.INVALID_SPAN
    tracers.shutdown()
    meters.shutdown()


def names(span):
    return [event.name for event in span.events]


def test_a_call_is_a_span(world, telemetry):
    f = opero.opero(world.define(lambda: None))
    world.run(f)
    (span,) = telemetry.spans()
    assert span.name == f.__qualname__
    assert span.kind is SpanKind.INTERNAL
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "code.function.name": f"{f.__module__}.{f.__qualname__}",
        "opero.outcome": "success",
        "opero.attempts": 1,
        "opero.cached": False,
    }
    assert names(span) == ["opero.attempt"]


def test_a_span_tells_its_attempts_and_retries(world, telemetry):
    world.run(opero.opero(min_delay=0)(world.define(failing(1))))
    (span,) = telemetry.spans()
    assert names(span) == ["opero.attempt", "opero.attempt.failed", "opero.retry", "opero.attempt"]
    assert span.events[1].attributes["error.type"] == "ValueError"
    assert dict(span.events[3].attributes) == {"opero.attempt": 2, "opero.round": 2}


def test_a_span_tells_that_a_candidate_takes_over_but_not_which(world, telemetry):
    f = opero.opero(arg_fallback="key", retries=0)(world.define(lambda key: 1 / (key != "secret-a")))
    world.run(f, ["secret-a", "secret-b"])
    (span,) = telemetry.spans()
    assert [dict(e.attributes) for e in span.events if e.name == "opero.candidate"] == [{"opero.place": 1}]
    assert "secret" not in span.to_json()


def test_a_span_tells_a_cache_hit(world, telemetry):
    f = opero.opero(cache=True)(world.define(lambda: None))
    world.run(f)
    world.run(f)
    hit = telemetry.spans()[1]
    assert names(hit) == ["opero.cache.hit"]
    assert hit.attributes["opero.cached"]


def test_a_span_tells_a_wait_for_a_slot(world, telemetry):
    f = opero.opero(rate_limit=50, rate_limit_options={"max_burst": 1})(world.define(lambda: None))
    world.run(f)
    world.run(f)
    waiting = telemetry.spans()[1]
    assert names(waiting) == ["opero.rate_limit.wait", "opero.attempt"]
    assert waiting.events[0].attributes["opero.seconds"] > 0.001


def test_the_span_of_a_failed_call_has_the_error(world, telemetry):
    with pytest.raises(ValueError, match="secret"):
        world.run(opero.opero(retries=0)(world.define(failing(1))))
    (span,) = telemetry.spans()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes["error.type"], span.attributes["opero.outcome"]) == ("ValueError", "failure")
    (recorded,) = [event for event in span.events if event.name == "exception"]
    assert recorded.attributes["exception.type"] == "ValueError"


def test_an_error_of_a_package_has_its_full_name(world, telemetry):
    f = opero.opero(arg_fallback="key", retries=0)(world.define(lambda key: 1 / 0))
    with pytest.raises(opero.AllFailedError):
        world.run(f, "key")
    assert telemetry.spans()[0].attributes["error.type"] == "opero.exceptions.AllFailedError"


def test_calls_attempts_retries_and_hits_are_counted(world, telemetry):
    f = opero.opero(cache=True, min_delay=0)(world.define(failing(2)))
    world.run(f, 1)
    world.run(f, 1)
    counts = {
        name: [point.value for point in telemetry.measured(f"opero.{name}")]
        for name in ("calls", "attempts", "retries", "cache.hits")
    }
    assert counts == {"calls": [2], "attempts": [3], "retries": [2], "cache.hits": [1]}


def test_durations_are_measured_in_seconds_and_by_error(world, telemetry, fake_clock):
    f = opero.opero(retries=1, min_delay=2, jitter=False)(world.define(failing(2)))
    with pytest.raises(ValueError, match="secret"):
        world.run(f)
    world.run(f)
    failed, good = sorted(telemetry.measured("opero.call.duration"), key=lambda point: -point.sum)
    assert (failed.sum, failed.count, failed.attributes["error.type"]) == (2, 1, "ValueError")
    assert (good.sum, good.count, "error.type" in good.attributes) == (0, 1, False)


def test_a_nested_call_is_a_child(world, telemetry):
    inner = opero.opero(world.define(lambda: None))
    if world.is_async:

        @opero.opero
        async def outer():
            await inner()

    else:

        @opero.opero
        def outer():
            inner()

    world.run(outer)
    child, parent = telemetry.spans()
    assert child.parent.span_id == parent.context.span_id
    assert parent.parent is None


def test_a_span_of_the_function_is_a_child_and_one_after_the_call_is_not(world, telemetry):
    def function():
        with telemetry.tracer.start_as_current_span("inside"):
            pass

    world.run(opero.opero(world.define(function)))
    with telemetry.tracer.start_as_current_span("after"):
        pass
    inside, call, after = telemetry.spans()
    assert inside.parent.span_id == call.context.span_id
    assert after.parent is None


def test_a_call_is_a_child_of_the_current_span_and_leaves_it_current(world, telemetry):
    f = opero.opero(retries=0)(world.define(failing(1)))
    with telemetry.tracer.start_as_current_span("outside") as outside:
        with contextlib.suppress(ValueError):
            world.run(f)
        assert trace.get_current_span() is outside
    assert telemetry.spans()[0].parent.span_id == outside.get_span_context().span_id


def test_calls_in_tasks_side_by_side_are_not_children_of_each_other(telemetry):
    @opero.opero
    async def f():
        await asyncio.sleep(0.001)

    async def main():
        await asyncio.gather(f(), f(), f())

    asyncio.run(main())
    assert [span.parent for span in telemetry.spans()] == [None] * 3


def test_each_item_of_a_map_is_a_child_of_its_callers_span(mode, telemetry):
    mapped = opero.opmap(retries=1, min_delay=0, **mode.options, return_exceptions=True)(mode.define(lambda x: 1 / x))
    with telemetry.tracer.start_as_current_span("caller") as caller:
        mode.run(mapped, [1, 0, 2])
    *items, _ = telemetry.spans()
    outcomes = {span.attributes["opero.index"]: span.attributes["opero.outcome"] for span in items}
    assert outcomes == {0: "success", 1: "failure", 2: "success"}
    assert {span.parent.span_id for span in items} == {caller.get_span_context().span_id}
    assert telemetry.live == {}


def test_a_map_inside_a_call_has_its_items_below_the_call(telemetry):
    mapped = opero.opmap(mode="thread", workers=2, progress=False)(abs)

    @opero.opero
    def outer():
        return mapped([1, 2])

    outer()
    *items, call = telemetry.spans()
    assert [span.parent.span_id for span in items] == [call.context.span_id] * 2


def test_a_stream_that_is_closed_ends_the_spans_of_its_items(telemetry):
    mapped = opero.opmap(mode="thread", workers=2, progress=False)(lambda x: x)
    stream = mapped.stream(iter(int, 1))
    next(stream)
    stream.close()
    assert telemetry.live == {}
    assert "cancelled" in {span.attributes["opero.outcome"] for span in telemetry.spans()}


def test_the_span_of_a_cancelled_call_ends_and_is_no_failure(telemetry):
    cancel_a_call_of(opero.opero(sleep_long))
    (span,) = telemetry.spans()
    assert span.attributes["opero.outcome"] == "cancelled"
    assert span.status.status_code is StatusCode.UNSET
    assert telemetry.live == {}
    assert telemetry.measured("opero.calls")[0].attributes["opero.outcome"] == "cancelled"


def test_an_interrupted_call_leaves_no_span_current(telemetry):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opero.opero(interrupted)()
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert len(telemetry.spans()) == 1


def test_a_call_that_ends_in_another_context_ends_its_span_without_complaint(telemetry, caplog):
    @opero.opero
    async def f():
        await asyncio.Event().wait()

    coroutine = f()

    async def begin():
        coroutine.send(None)

    asyncio.run(begin())
    coroutine.close()
    (span,) = telemetry.spans()
    assert span.attributes["opero.outcome"] == "cancelled"
    assert caplog.records == []


def test_after_the_end_there_are_no_spans(world, telemetry):
    telemetry.subscription.close()
    world.run(opero.opero(world.define(lambda: None)))
    assert telemetry.spans() == ()
    assert telemetry.measured("opero.calls") == []


def test_a_call_under_way_at_the_end_still_ends_its_span(telemetry):
    opero.opero(telemetry.subscription.close)()
    assert len(telemetry.spans()) == 1
    assert telemetry.live == {}


def test_an_exporter_that_fails_changes_no_call(world, telemetry):
    class Broken(SimpleSpanProcessor):
        def on_start(self, span, parent_context=None):
            raise OSError

        def on_end(self, span):
            raise OSError

    tracers = TracerProvider()
    tracers.add_span_processor(Broken(InMemorySpanExporter()))
    with otel.instrument(tracers):
        assert world.run(opero.opero(world.define(lambda: "result"))) == "result"
    assert len(telemetry.spans()) == 1
    tracers.shutdown()


def test_two_pairs_of_providers_leave_no_span_current(world, telemetry):
    tracers = TracerProvider()
    with otel.instrument(tracers):
        world.run(opero.opero(world.define(lambda: None)))
        assert trace.get_current_span() is trace.INVALID_SPAN
    tracers.shutdown()


def test_calls_that_an_exporter_makes_have_no_spans(telemetry):
    class Exporter(InMemorySpanExporter):
        def export(self, spans):
            send()
            return super().export(spans)

    send, f = opero.opero(lambda: None), opero.opero(lambda: None)
    exporter, tracers = Exporter(), TracerProvider()
    tracers.add_span_processor(BatchSpanProcessor(exporter))
    with otel.instrument(tracers):
        f()
        tracers.force_flush()
        tracers.force_flush()
        f()
        tracers.force_flush()
    tracers.shutdown()
    assert (len(exporter.get_finished_spans()), send.stats.calls) == (2, 2)


def test_without_providers_the_global_ones_are_used(world):
    with otel.instrument():
        assert world.run(opero.opero(world.define(lambda: "result"))) == "result"


# Prometheus


@pytest.fixture
def registry():
    return CollectorRegistry()


def value(registry, name, function, **labels):
    return registry.get_sample_value(
        f"opero_{name}", {"function": f"{function.__module__}.{function.__qualname__}", **labels}
    )


def test_calls_are_counted_by_function_and_outcome(world, registry):
    f = opero.opero(retries=0)(world.define(failing(1)))
    with prometheus.instrument(registry):
        for _ in range(3):
            with contextlib.suppress(ValueError):
                world.run(f)
    assert value(registry, "calls_total", f, outcome="failure") == 1
    assert value(registry, "calls_total", f, outcome="success") == 2


def test_attempts_retries_hits_and_seconds_are_counted(world, registry, fake_clock):
    f = opero.opero(cache=True, min_delay=2, jitter=False)(world.define(failing(2)))
    with prometheus.instrument(registry):
        world.run(f, 1)
        world.run(f, 1)
    assert value(registry, "attempts_total", f) == 3
    assert value(registry, "retries_total", f) == 2
    assert value(registry, "cache_hits_total", f) == 1
    assert value(registry, "call_duration_seconds_count", f) == 2
    assert value(registry, "call_duration_seconds_sum", f) == 6


def test_seconds_of_waiting_for_slots_are_counted(world, registry):
    f = opero.opero(rate_limit=50, rate_limit_options={"max_burst": 1})(world.define(lambda: None))
    with prometheus.instrument(registry):
        for _ in range(3):
            world.run(f)
    assert value(registry, "rate_limit_wait_seconds_total", f) == pytest.approx(f.stats.waited, abs=0.001)


def test_items_of_a_map_are_counted(mode, registry):
    mapped = opero.opmap(retries=1, min_delay=0, **mode.options, return_exceptions=True)(mode.define(lambda x: 1 / x))
    with prometheus.instrument(registry):
        mode.run(mapped, [1, 0, 2])
    assert value(registry, "calls_total", mapped, outcome="success") == 2
    assert value(registry, "calls_total", mapped, outcome="failure") == 1
    assert value(registry, "attempts_total", mapped) == 4


def test_a_cancelled_call_is_counted_as_cancelled(registry):
    f = opero.opero(sleep_long)
    with prometheus.instrument(registry):
        cancel_a_call_of(f)
    assert value(registry, "calls_total", f, outcome="cancelled") == 1


def test_who_asks_twice_for_one_registry_has_each_call_counted_once(world, registry):
    f = opero.opero(world.define(lambda: None))
    with prometheus.instrument(registry) as first, prometheus.instrument(registry):
        world.run(f)
        first.close()
        world.run(f)
    world.run(f)
    assert value(registry, "calls_total", f, outcome="success") == 2
    assert value(registry, "attempts_total", f) == 2


def test_two_registries_count_each_for_itself(world, registry):
    other = CollectorRegistry()
    f = opero.opero(world.define(lambda: None))
    with prometheus.instrument(registry), prometheus.instrument(other):
        world.run(f)
    assert [value(r, "calls_total", f, outcome="success") for r in (registry, other)] == [1, 1]


def test_a_registry_is_not_kept_alive():
    import weakref

    registry = CollectorRegistry()
    prometheus.instrument(registry).close()
    seen = weakref.ref(registry)
    del registry
    gc.collect()
    assert seen() is None


def test_a_registry_with_such_a_metric_of_somebody_else_is_refused(registry):
    Counter("opero_retries", "theirs", registry=registry)
    with pytest.raises(ValueError, match="opero_retries"):
        prometheus.instrument(registry)


def test_without_a_registry_the_usual_one_is_used(world):
    f = opero.opero(world.define(lambda: None))
    with prometheus.instrument():
        world.run(f)
    assert value(REGISTRY, "calls_total", f, outcome="success") >= 1


def test_a_registry_that_fails_changes_no_call(world, registry):
    with prometheus.instrument(registry) as subscription:
        subscription.callback.calls = None
        assert world.run(opero.opero(world.define(lambda: "result"))) == "result"


# Names


def same_named(module):
    """A function called as others are, elsewhere."""
    function = failing(0)
    function.__module__, function.__qualname__ = module, "fetch"
    return opero.opero(function)


def test_same_named_functions_of_two_modules_are_told_apart(telemetry, registry, lines):
    with prometheus.instrument(registry):
        for module in ("app.one", "app.two"):
            same_named(module)()
    assert {span.name for span in telemetry.spans()} == {"fetch"}
    full = {"app.one.fetch", "app.two.fetch"}
    assert {span.attributes["code.function.name"] for span in telemetry.spans()} == full
    assert {point.attributes["code.function.name"] for point in telemetry.measured("opero.calls")} == full
    assert [
        registry.get_sample_value("opero_calls_total", {"function": name, "outcome": "success"})
        for name in sorted(full)
    ] == [1, 1]


class Callable:
    def __call__(self):
        pass

    def method(self):
        pass


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (functools.partial(sleep_long), "sleep_long"),
        (Callable(), "Callable"),
        (Callable().method, "Callable.method"),
        (opero.opero(sleep_long), "sleep_long"),
        (len, "len"),
    ],
    ids=["partial", "object", "method", "decorated", "builtin"],
)
def test_whatever_is_decorated_has_the_module_of_what_it_is_named_by(function, name):
    plan = opero.opero(function).__opero__.plan
    assert (plan.module, plan.name) == ("builtins" if function is len else __name__, name)


def test_a_function_without_a_module_has_its_name_alone(telemetry):
    same_named(None)()
    assert telemetry.spans()[0].attributes["code.function.name"] == "fetch"


def test_what_opero_says_of_a_failed_fallback_has_no_candidate_in_it(world, telemetry):
    def function(key):
        raise ConnectionError

    f = opero.opero(arg_fallback="key", retries=1, min_delay=0)(world.define(function))
    with pytest.raises(opero.AllFailedError):
        world.run(f, ["secret-a", "secret-b"])
    (span,) = telemetry.spans()
    assert "exception.stacktrace" in span.to_json()
    assert "secret-a" not in span.to_json()


# Threads, tasks and maps at the same time


def test_threads_are_counted_exactly_and_leave_nothing_open(telemetry, registry):
    f = opero.opero(retries=1, min_delay=0)(lambda x: 1 / (x % 5))
    with prometheus.instrument(registry), ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(f, x) for x in range(500)]:
            future.exception()
    assert telemetry.live == {}
    assert value(registry, "calls_total", f, outcome="failure") == 100
    assert value(registry, "calls_total", f, outcome="success") == 400
    assert value(registry, "attempts_total", f) == 600
    assert {span.parent for span in telemetry.spans()} == {None}
    assert sum(point.value for point in telemetry.measured("opero.calls")) == 500


def test_tasks_and_a_map_beside_each_other_have_each_its_own_parents(telemetry):
    mapped = opero.opmap(mode="async", progress=False, retries=0)(asyncio.sleep)

    @opero.opero
    async def outer(number):
        await asyncio.sleep(0)
        return await mapped([0.001 * number, 0])

    async def main():
        await asyncio.gather(*map(outer, range(5)))

    asyncio.run(main())
    outers = {span.context.span_id for span in telemetry.spans() if span.name.endswith("outer")}
    parents = [span.parent.span_id for span in telemetry.spans() if span.context.span_id not in outers]
    assert (len(outers), len(parents), set(parents)) == (5, 10, outers)
    assert telemetry.live == {}


# What importing takes


LIBRARIES = {"lines": "loguru", "otel": "opentelemetry", "prometheus": "prometheus_client"}


@pytest.mark.parametrize("module", LIBRARIES)
def test_a_module_imports_its_library_and_not_those_of_the_others(module):
    others = [library for name, library in LIBRARIES.items() if name != module]
    source = f"import sys, opero.telemetry.{module}\nassert not set({others}) & set(sys.modules)"
    assert program(source) == []


def test_opero_imports_no_telemetry():
    assert program("import sys; assert not any('telemetry' in name for name in sys.modules)") == []


@pytest.mark.parametrize("module", ["otel", "prometheus"])
def test_a_missing_library_is_told_with_the_command_that_installs_it(module):
    source = f"""
    import sys
    sys.modules[{LIBRARIES[module]!r}] = None
    try:
        import opero.telemetry.{module}
    except ImportError as error:
        assert "pip install 'opero[" in str(error)
    else:
        sys.exit("imported")
    """
    assert program(source) == []
