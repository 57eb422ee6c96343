"""Mocks of decorated functions, decorated mocks, and the decorators and test cases of unittest (and pytest)."""

from __future__ import annotations

import inspect
import os
import platform
import unittest
from unittest import mock

import pytest

from opero import opero


@opero(min_delay=0)
def fetch(path, *, deep=False):
    return f"real {path}"


@opero(min_delay=0)
async def fetch_async(path, *, deep=False):
    return f"real {path}"


class Client:
    @opero(min_delay=0)
    def fetch(self, path):
        return f"real {path}"

    @opero(min_delay=0)
    async def fetch_async(self, path):
        return f"real {path}"


@pytest.fixture
def function(world):
    return fetch_async if world.is_async else fetch


@pytest.fixture
def name(world):
    """Of the client's method."""
    return "fetch_async" if world.is_async else "fetch"


# Mocks of what is decorated


def test_an_autospec_is_called_like_the_function(world, function):
    stand_in = mock.create_autospec(function, return_value="mocked")
    assert world.run(stand_in, "/a", deep=True) == "mocked"
    stand_in.assert_called_once_with("/a", deep=True)


def test_an_autospec_refuses_what_the_function_would(world, function):
    stand_in = mock.create_autospec(function)
    with pytest.raises(TypeError, match="path"):
        world.run(stand_in)
    with pytest.raises(TypeError, match="unexpected"):
        world.run(stand_in, "/a", wide=True)


def test_an_autospec_of_an_instance_has_its_methods(world, name):
    stand_in = mock.create_autospec(Client, instance=True)
    method = getattr(stand_in, name)
    method.return_value = "mocked"
    assert world.run(method, "/a") == "mocked"
    with pytest.raises(TypeError, match="path"):
        world.run(method)


def test_a_patched_method_with_autospec_gets_the_instance(world, name):
    client = Client()
    with mock.patch.object(Client, name, autospec=True, return_value="mocked") as stand_in:
        assert world.run(getattr(client, name), "/a") == "mocked"
    stand_in.assert_called_once_with(client, "/a")
    assert world.run(getattr(client, name), "/a") == "real /a"


def test_a_method_of_one_instance_is_patched(world, name):
    client = Client()
    with mock.patch.object(client, name, return_value="mocked"):
        assert world.run(getattr(client, name), "/a") == "mocked"
    assert world.run(getattr(client, name), "/a") == "real /a"


def test_a_mock_wraps_a_decorated_function(world, function):
    stand_in = mock.Mock(wraps=function)
    assert world.run(stand_in, "/a") == "real /a"
    stand_in.assert_called_once_with("/a")


# What is decorated is a mock


def mocked(world, *results):
    return (mock.AsyncMock if world.is_async else mock.Mock)(side_effect=results)


def test_a_decorated_mock_is_retried(world):
    stand_in = mocked(world, ConnectionError, "came")
    assert world.run(opero(min_delay=0)(stand_in), 1, a=2) == "came"
    assert stand_in.mock_calls == [mock.call(1, a=2)] * 2


def test_a_decorated_mock_fails_with_its_own_error(world):
    error = ConnectionError("down")
    stand_in = mocked(world, *[error] * 3)
    with pytest.raises(ConnectionError) as caught:
        world.run(opero(retries=2, min_delay=0)(stand_in))
    assert caught.value is error


def test_a_decorated_mock_is_cached(world):
    stand_in = mocked(world, "first", "second")
    function = opero(cache=True, cache_namespace=f"mocked {world.is_async}")(stand_in)
    assert [world.run(function, 1), world.run(function, 1)] == ["first", "first"]


def test_a_decorated_mock_falls_back(world):
    stand_in = mocked(world, ConnectionError, "came")
    stand_in.__signature__ = inspect.signature(lambda key: None)
    assert world.run(opero(min_delay=0, arg_fallback="key")(stand_in), ["a", "b"]) == "came"
    assert stand_in.mock_calls == [mock.call("a"), mock.call("b")]


def test_a_decorated_autospec_is_retried(world, function):
    stand_in = mock.create_autospec(function, side_effect=[ConnectionError, "came"])
    assert world.run(opero(min_delay=0)(stand_in), "/a") == "came"


def test_a_magic_mock_is_decorated():
    assert opero(min_delay=0)(mock.MagicMock(side_effect=[ConnectionError, "came"]))() == "came"


def test_a_patched_sleep_is_the_one_that_waits():
    with mock.patch("time.sleep") as sleep:
        opero(retries=1, min_delay=0.5, jitter=False)(mock.Mock(side_effect=[ConnectionError, "came"]))()
    sleep.assert_called_once_with(0.5)


# Decorators of unittest


@mock.patch("platform.node", return_value="patched")
@opero(min_delay=0)
def patched_above(word, node):
    assert platform.node is node
    return word + platform.node()


@mock.patch("platform.node", return_value="patched")
@opero(min_delay=0)
async def patched_above_async(word, node):
    assert platform.node is node
    return word + platform.node()


@opero(min_delay=0)
@mock.patch("platform.node", return_value="patched")
def patched_below(word, node):
    assert platform.node is node
    return word + platform.node()


@opero(min_delay=0)
@mock.patch("platform.node", return_value="patched")
async def patched_below_async(word, node):
    assert platform.node is node
    return word + platform.node()


@pytest.mark.parametrize(
    "functions", [(patched_above, patched_above_async), (patched_below, patched_below_async)], ids=["above", "below"]
)
def test_a_patch_gives_its_mock_to_the_function(world, functions):
    assert world.run(functions[world.is_async], "is ") == "is patched"


def test_a_patch_of_a_dictionary_holds_for_each_attempt():
    seen = []

    @opero(retries=1, min_delay=0)
    @mock.patch.dict(os.environ, {"OPERO_WILD": "patched"})
    def look():
        seen.append(os.environ.pop("OPERO_WILD"))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        look()
    assert seen == ["patched", "patched"]


def results_of(case: type[unittest.TestCase]) -> unittest.TestResult:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    return result


def test_a_test_case_runs_decorated_methods():
    tries = []

    class Case(unittest.TestCase):
        @opero(min_delay=0)
        def setUp(self):
            tries.append("set up")
            if len(tries) == 1:
                raise ConnectionError

        @mock.patch("platform.node", return_value="patched")
        @opero(min_delay=0)
        def test_flaky(self, node):
            tries.append(node())
            if len(tries) == 3:
                raise ConnectionError

        @opero(retries=0)
        def test_wrong(self):
            self.fail("said")

    result = results_of(Case)
    assert result.testsRun == 2
    assert (len(result.failures), result.errors) == (1, [])
    assert tries == ["set up", "set up", "patched", "patched", "set up"]


def test_an_async_test_case_runs_decorated_methods():
    tries = []

    class Case(unittest.IsolatedAsyncioTestCase):
        @opero(min_delay=0)
        async def asyncSetUp(self):
            tries.append("set up")

        @opero(min_delay=0)
        async def test_flaky(self):
            tries.append("tried")
            if len(tries) == 2:
                raise ConnectionError

    assert results_of(Case).wasSuccessful()
    assert tries == ["set up", "tried", "tried"]


def test_a_test_that_is_skipped_is_not_retried():
    tries = []

    class Case(unittest.TestCase):
        @opero(min_delay=0, retry_on=ConnectionError)
        def test_skipped(self):
            tries.append(1)
            self.skipTest("not here")

    assert len(results_of(Case).skipped) == 1
    assert tries == [1]


# pytest itself


@pytest.fixture
@opero(min_delay=0)
def folder(tmp_path):
    made = tmp_path / "made"
    if not made.exists():
        made.mkdir()
        raise ConnectionError
    return made


@pytest.fixture
@opero(min_delay=0)
def opened(folder):
    with (folder / "file").open("w") as file:
        yield file


@pytest.mark.parametrize("number", [1, 2])
@opero(min_delay=0)
def test_fixtures_and_tests_of_pytest_are_decorated(opened, number):
    assert number in {1, 2}
    opened.write("yes")
