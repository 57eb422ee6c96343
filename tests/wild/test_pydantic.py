"""Models and validated functions of pydantic."""

from __future__ import annotations

import functools
import inspect
import pickle
from typing import Any, ClassVar, Self

import pydantic
import pydantic.dataclasses
import pytest

from opero import opero, opmap


class Client(pydantic.BaseModel):
    base: str = "u"
    calls: int = 0

    @opero(min_delay=0)
    def sync(self, path: str) -> str:
        return self._fetch(path)

    @opero(min_delay=0)
    async def awaited(self, path: str) -> str:
        return self._fetch(path)

    @opero
    def bare(self, path: str) -> str:
        return self.base + path

    @classmethod
    @opero(min_delay=0)
    def named(cls, base: str) -> Self:
        return cls(base=base)

    @staticmethod
    @opero(min_delay=0)
    def join(base: str, path: str) -> str:
        return base + path

    def _fetch(self, path: str) -> str:
        self.calls += 1
        if self.calls < 2:
            raise ConnectionError
        return self.base + path


class Cached(pydantic.BaseModel):
    base: str
    _calls: int = pydantic.PrivateAttr(default=0)

    @opero(cache=True)
    def fetch(self, path: str) -> str:
        self._calls += 1
        return self.base + path


class Settings(pydantic.BaseModel, frozen=True):
    base: str


class Sized(pydantic.BaseModel):
    name: str = "tea"

    @pydantic.computed_field
    @property
    @opero(min_delay=0)
    def size(self) -> int:
        return len(self.name)

    @pydantic.computed_field
    @functools.cached_property
    @opero(min_delay=0)
    def shout(self) -> str:
        return self.name.upper()


@pydantic.dataclasses.dataclass
class Order:
    item: str

    @opero(min_delay=0)
    def priced(self) -> str:
        return f"{self.item}: 1"


def method_of(world, client):
    return client.awaited if world.is_async else client.sync


def test_a_models_method_is_retried(world):
    client = Client()
    assert world.run(method_of(world, client), "/a") == "u/a"
    assert client.calls == 2


def test_a_models_method_is_no_field():
    assert set(Client.model_fields) == {"base", "calls"}
    assert Client().model_dump() == {"base": "u", "calls": 0}


def test_a_models_method_is_decorated_without_parentheses():
    assert Client().bare("/a") == "u/a"


def test_class_and_static_methods_of_a_model():
    assert Client.named("v").base == "v"
    assert Client.join("u", "/a") == "u/a"


def test_a_subclass_of_a_model_has_the_method(world):
    class Sub(Client):
        base: str = "sub"

    assert world.run(method_of(world, Sub()), "/a") == "sub/a"


def test_a_model_overrides_a_method_and_calls_the_one_above_it():
    class Louder(Client):
        @opero(min_delay=0)
        def sync(self, path: str) -> str:
            return super().sync(path).upper()

    assert Louder().sync("/a") == "U/A"


def test_a_model_with_a_decorated_method_is_pickled_and_copied():
    client = Client(base="v", calls=1)
    for same in (pickle.loads(pickle.dumps(client)), client.model_copy(deep=True)):
        assert same == client
        assert same.sync("/a") == "v/a"


def test_a_map_in_a_model_stands_below_classvar():
    class Squares(pydantic.BaseModel):
        power: int = 2
        of: ClassVar[Any] = opmap(mode="thread", retries=0, progress=False)(lambda self, x: x**self.power)

    assert list(Squares().of([1, 2, 3])) == [1, 4, 9]
    assert set(Squares.model_fields) == {"power"}


def test_models_do_not_share_what_their_method_cached():
    first, second = Cached(base="a"), Cached(base="b")
    assert [first.fetch("/"), second.fetch("/"), first.fetch("/")] == ["a/", "b/", "a/"]
    assert (first._calls, second._calls) == (1, 1)


def test_a_frozen_model_has_a_cached_method():
    class Frozen(pydantic.BaseModel, frozen=True):
        base: str

        @opero(cache=True)
        def fetch(self) -> str:
            return self.base

    model = Frozen(base="a")
    assert [model.fetch(), model.fetch()] == ["a", "a"]


def test_equal_models_are_one_entry_of_a_cache(world):
    runs = []

    @opero(cache=True)
    @world.define
    def base_of(settings):
        runs.append(settings)
        return settings.base

    given = [Settings(base="u"), Settings(base="u"), Settings(base="v")]
    assert [world.run(base_of, settings) for settings in given] == ["u", "u", "v"]
    assert len(runs) == 2


def test_a_computed_field_is_made_by_a_decorated_method():
    assert Sized().model_dump() == {"name": "tea", "size": 3, "shout": "TEA"}


def test_the_type_of_a_computed_field_is_seen():
    schema = Sized.model_json_schema(mode="serialization")["properties"]
    assert {name: field["type"] for name, field in schema.items()} == {
        "name": "string",
        "size": "integer",
        "shout": "string",
    }


def test_a_dataclass_of_pydantic_has_a_decorated_method():
    assert Order(item="tea").priced() == "tea: 1"


@pydantic.validate_call
@opero(min_delay=0)
def half(x: int) -> float:
    return x / 2


@pydantic.validate_call
@opero(min_delay=0)
async def half_async(x: int) -> float:
    return x / 2


@opero(min_delay=0)
@pydantic.validate_call
def validated_half(x: int) -> float:
    return x / 2


@opero(min_delay=0)
@pydantic.validate_call
async def validated_half_async(x: int) -> float:
    return x / 2


above_and_below = pytest.mark.parametrize(
    "functions", [(half, half_async), (validated_half, validated_half_async)], ids=["above", "below"]
)


@above_and_below
def test_validate_call_sees_the_annotations(world, functions):
    function = functions[world.is_async]
    assert inspect.iscoroutinefunction(function) == world.is_async
    assert world.run(function, "4") == 2.0


@above_and_below
def test_what_validate_call_refuses_does_not_run(world, functions):
    with pytest.raises(pydantic.ValidationError, match="valid integer"):
        world.run(functions[world.is_async], "four")


def test_validate_call_above_a_method():
    class Halves:
        @pydantic.validate_call
        @opero(min_delay=0)
        def of(self, x: int) -> float:
            return x / 2

    assert Halves().of("4") == 2.0
