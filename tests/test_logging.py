"""What opero says, to whom, and what it never says; and what it takes to import it."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import textwrap

import pytest

from opero import OperoError, configure_logging, opero
from opero.telemetry.lines import log_events
from opero.utils import logging as opero_logging

# A program's view, in a process of its own: `fail()` is a call that opero has something to say about.
FAIL = """
def fail():
    @opero.opero(retries=1, min_delay=0)
    def parse(text):
        return int(text)
    try:
        parse("text")
    except ValueError:
        pass
"""


def program(source):
    """Run a program and give what it wrote to stdout and to stderr, where loguru writes unless told otherwise."""
    command = [sys.executable, "-W", "error", "-c", FAIL + textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# Silent by default


@pytest.mark.parametrize(
    "source",
    [
        "import opero; fail()",
        "import loguru, opero; fail()",
        "import opero, loguru; fail()",
        "import opero; fail(); import loguru; fail()",
        "from loguru import logger; logger.disable('opero'); import opero; fail()",
        "from loguru import logger; import opero; logger.enable('opero'); logger.disable('opero'); fail()",
        "import opero; opero.configure_logging(); from loguru import logger; logger.disable('opero'); fail()",
    ],
)
def test_opero_is_silent(source):
    assert program(source) == ("", "")


def test_opero_stays_silent_after_a_recursion_that_was_too_deep():
    # Where the stack ends depends on where the recursion begins.
    source = """
    import os, loguru, opero

    @opero.opero(retries=0)
    def descend(depth):
        return descend(depth + 1)

    def begin_deeper(by):
        if by:
            begin_deeper(by - 1)
        try:
            descend(0)
        except RecursionError:
            fail()

    for by in range(6):
        child = os.fork()
        if not child:
            begin_deeper(by)
            os._exit(0)
        os.waitpid(child, 0)
    """
    assert program(source) == ("", "")


@pytest.mark.parametrize(
    "source",
    [
        "from loguru import logger; logger.enable('opero'); import opero; fail()",
        "import opero; from loguru import logger; logger.enable('opero'); fail()",
        "import opero; fail(); from loguru import logger; fail(); logger.enable('opero'); fail()",
        "from loguru import logger; logger.configure(activation=[('', False), ('opero', True)]); import opero; fail()",
        "import opero; opero.configure_logging('DEBUG'); fail()",
        "import opero; fail(); opero.configure_logging('DEBUG'); fail()",
    ],
)
def test_opero_speaks_once_it_is_asked_to(source):
    _, said = program(source)
    retrying, failed = said.splitlines()
    assert "DEBUG" in retrying
    assert "parse" in retrying
    assert "WARNING" in failed
    assert "2 attempts" in failed


# Asking


def test_configure_logging_is_idempotent_and_leaves_the_sinks_alone():
    _, said = program("""
        from loguru import logger
        import opero
        logger.add(print, format="{message}", level="ERROR")
        before = dict(logger._core.handlers)
        for _ in range(3):
            opero.configure_logging("DEBUG")
        fail()
        assert logger._core.handlers == before
        assert len(before) == 2
    """)
    assert len(said.splitlines()) == 2


def test_configure_logging_sets_the_lowest_level():
    assert len(program("import opero; opero.configure_logging(); fail()")[1].splitlines()) == 1
    assert program("import opero; opero.configure_logging('ERROR'); fail()")[1] == ""


@pytest.mark.parametrize("level", ["LOUD", "", None, 3.5], ids=repr)
def test_an_unknown_level_is_refused(level):
    with pytest.raises(ValueError, match="loguru level"):
        configure_logging(level)


def test_nothing_that_opero_imports_touches_the_sinks_of_the_host():
    program("""
        import importlib, pkgutil
        from loguru import logger
        logger.remove()
        logger.add(print)
        before = dict(logger._core.handlers)
        import opero
        for module in pkgutil.walk_packages(opero.__path__, "opero."):
            importlib.import_module(module.name)
        assert logger._core.handlers == before, logger._core.handlers

        @opero.opero(cache=True, rate_limit=1000, arg_fallback="key")
        def ask(key):
            return key

        def double(x):
            return 2 * x

        assert ask(["a"]) == "a"
        assert opero.opmap(mode="thread", workers=2)(double)([1, 2]) == [2, 4]
        assert opero.opmap(mode="process", workers=1)(double)([1, 2]) == [2, 4]
        assert logger._core.handlers == before, logger._core.handlers
    """)


def test_a_sink_that_raises_does_not_replace_the_users_error():
    program("""
        import opero
        from loguru import logger
        def sink(message):
            raise OSError("disk full")
        logger.remove()
        logger.add(sink, catch=False)
        logger.enable("opero")
        fail()
    """)


def test_importing_opero_imports_none_of_the_heavy_libraries():
    heavy = {
        *("asyncio", "loguru", "tenacity", "cachebox", "twat_cache", "twat_mp", "asynciolimiter", "tqdm", "pydantic"),
        *("multiprocessing", "multiprocess", "pathos", "dill", "diskcache", "redis", "numpy"),
    }
    imported, _ = program("import sys; from opero import *; from opero.core import *; print(*sys.modules)")
    assert "opero.decorators.opmap" in imported
    assert heavy.isdisjoint(imported.split())


# Secrets


@pytest.fixture
def said():
    """All that opero logs."""
    from loguru import logger

    lines = []
    before = opero_logging._threshold
    sink = logger.add(lines.append, level=0, format="{name} {level} {message} {extra}", filter="opero")
    configure_logging("TRACE")
    yield lines
    logger.remove(sink)
    logger.disable("opero")
    opero_logging._threshold = before


SECRET = "swordfish"


def words_of(error):
    """All that opero may have written into an error: notes, and the message of a group."""
    parts = getattr(error, "exceptions", ())
    notes = [note for e in (error, *parts) for note in getattr(e, "__notes__", ())]
    return [*notes, str(error)] if parts or isinstance(error, OperoError) else notes


FAILURES = {
    "retry": {"retries": 1},
    "not retryable": {"retry_on": KeyError},
    "fallback": {"retries": 1, "arg_fallback": "key"},
    "cooldown": {"retries": 1, "arg_fallback": "key", "fallback_cooldown": 5},
    "out of time": {"retries": 5, "arg_fallback": "key", "total_timeout": 1, "min_delay": 5},
    "no slot": {"rate_limit": 0.01, "total_timeout": 1},
    "cache": {"retries": 1, "cache": True},
    "result": {"retries": 1, "retry_options": {"retry": lambda state: True}},
    "broken hook": {"retry_on": lambda error: error.missing},
    "no reraise": {"retries": 1, "retry_options": {"reraise": False}},
}


@pytest.mark.parametrize("options", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("form", ["function", "partial"])
def test_no_argument_appears_in_a_message_a_note_or_a_log(world, fake_clock, said, options, form):
    def ask(key, other):
        raise ValueError("the function's own words")

    function = world.define(ask)
    if form == "partial":
        function = functools.partial(function, other=SECRET)
    function = opero(**options)(function)
    for _ in range(2):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - of many classes
            world.run(function, [SECRET, SECRET + "2"], other=SECRET)
        assert SECRET not in "".join([*words_of(caught.value), str(caught.value)])
    assert said
    assert SECRET not in "".join(said)


def broken_hook(about):
    raise KeyError(f"no rule for {SECRET}")


@pytest.mark.parametrize(
    "options", [{"retry_on": broken_hook}, {"retry_options": {"before_sleep": broken_hook}}], ids=["retry_on", "hook"]
)
@pytest.mark.parametrize("arg_fallback", [None, "key"])
def test_the_words_of_a_broken_hook_are_not_repeated(world, fake_clock, said, options, arg_fallback):
    def ask(key):
        raise ValueError(key)

    with pytest.raises(Exception) as caught:  # noqa: PT011 - of either class
        world.run(opero(arg_fallback=arg_fallback, **options)(world.define(ask)), SECRET)
    assert "KeyError" in "".join(said)
    assert SECRET not in "".join([*words_of(caught.value), *said])


@pytest.mark.parametrize("empty", [[], (), None], ids=repr)
def test_no_argument_appears_when_the_call_is_a_misuse(said, empty):
    def ask(key, other):
        return iter_later()

    async def iter_later():
        """Never awaited."""

    with pytest.raises((ValueError, TypeError)) as caught:
        opero(arg_fallback="key")(ask)(empty, SECRET)
    assert SECRET not in "".join([*words_of(caught.value), *said])


def test_a_stopped_attempt_tells_no_argument(said):
    import asyncio

    @opero(attempt_timeout=0.01, retries=0)
    async def ask(key):
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(ask(SECRET))
    assert said
    assert SECRET not in "".join([*words_of(caught.value), *said])


# The standard library


@pytest.fixture
def app_log(caplog):
    """A program's own logger, which opero is told to write to."""
    caplog.set_level(logging.DEBUG)
    before = opero_logging._threshold
    configure_logging("DEBUG", to=logging.getLogger("app"))
    yield caplog
    opero_logging._threshold = before
    opero_logging.standard.clear()


def test_a_logger_of_the_standard_library_gets_the_messages(world, fake_clock, app_log):
    def fail():
        raise ValueError(SECRET)

    with pytest.raises(ValueError, match=SECRET):
        world.run(opero(retries=1, min_delay=2, jitter=False)(world.define(fail)))
    told = [(name, level, text.rpartition("<locals>.")[2]) for name, level, text in app_log.record_tuples]
    assert [entry for entry in told if entry[0] == "app"] == [
        ("app", logging.DEBUG, "fail failed, next round in 2 s"),
        ("app", logging.WARNING, "fail failed after 2 attempts in 2 s"),
    ]


def test_it_gets_each_message_whole_because_not_all_loggers_fill_in_arguments(fake_clock, app_log):
    with log_events(logging.getLogger("app")), pytest.raises(ValueError, match="text"):
        opero(retries=1)(lambda text: [int(text)])("text")
    told = [(record.msg, record.args) for record in app_log.records if record.name == "app"]
    assert len(told) == 6
    assert all("lambda" in text and not arguments for text, arguments in told)


def test_it_gets_no_messages_below_the_level(app_log):
    configure_logging("WARNING", to=logging.getLogger("app"))
    opero_logging.log("INFO", "{}", "a message")
    assert app_log.messages == []
    opero_logging.log("WARNING", "{}", "100% {}")
    assert app_log.messages == ["100% {}"]


def test_the_last_call_says_where_messages_go(app_log):
    configure_logging("DEBUG")
    try:
        opero_logging.log("WARNING", "a message")
        assert [record for record in app_log.records if record.name == "app"] == []
    finally:
        from loguru import logger

        logger.disable("opero")


@pytest.mark.parametrize(("level", "error"), [("LOUD", ValueError), (None, ValueError)], ids=str)
def test_a_level_that_the_standard_library_does_not_know_is_refused(level, error):
    with pytest.raises(error, match="logging level"):
        configure_logging(level, to=logging.getLogger("app"))


@pytest.mark.parametrize("to", ["app", 3, print], ids=str)
def test_what_is_no_logger_is_refused(to):
    with pytest.raises(TypeError, match="logger of the standard library"):
        configure_logging(to=to)


def test_with_the_standard_library_loguru_is_not_imported():
    done = """
        import logging, sys, opero
        from opero.telemetry.lines import log_events
        logging.basicConfig(level="DEBUG", format="%(name)s %(levelname)s %(message)s")
        opero.configure_logging("DEBUG", to=logging.getLogger("app"))
        with log_events(logging.getLogger("events")):
            fail()
        assert "loguru" not in sys.modules
    """
    _, said = program(done)
    lines = said.splitlines()
    assert [line.split()[0] for line in lines] == ["events", "app", "events", "events", "app", "events"]
    assert "app WARNING fail.<locals>.parse failed after 2 attempts" in said
    assert "events WARNING __main__.fail.<locals>.parse (call 1) failed after 2 attempts" in said
