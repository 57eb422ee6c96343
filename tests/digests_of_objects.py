"""A program that prints the digests of its own objects, as it sees them and as its worker processes do."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import multiprocessing
import re
import sys
import types
from typing import Annotated, Any, Literal, TypedDict

import pydantic

import opero
from opero.core.keys import KeyMaker


class Plain:
    def __init__(self, *words):
        self.words = set(words)
        self.more = {"tags": {"x", "y", "z"}}


class Slotted:
    __slots__ = ("one", "two")

    def __init__(self):
        self.one = frozenset("abc")
        self.two = Plain("a", "b")


class Cyclic:
    def __init__(self):
        self.me = self
        self.children = [Plain("a", "b"), self]


class WithState:
    def __getstate__(self):
        return {"u", "v", "w"}


class Words(list):
    pass


class TroubleError(Exception):
    pass


@dataclasses.dataclass(eq=False)
class Record:
    tags: set


class Fields(TypedDict):
    words: Annotated[set, frozenset({"a", "b", "c"})]


class Model(pydantic.BaseModel):
    words: set[str] = pydantic.Field(default={"a", "b"}, description="words")
    part: Literal["a", "b"] | None = None

    @pydantic.field_validator("words", "part")
    @classmethod
    def check(cls, value: Any) -> Any:
        return value


TABLE = [{"a", "b"}, {"c": Plain("x", "y")}]


def looking_up(model: Model) -> Fields:
    return TABLE[model.part]


def function(*words):
    return words


def objects():
    words = Words([{"a", "b"}])
    words.more = {"c", "d"}
    return [
        Plain("a", "b", "c"),
        Plain("a", "b"),
        Slotted(),
        Cyclic(),
        WithState(),
        words,
        TroubleError({"a", "b"}),
        Record({"a", "b", "c"}),
        re.compile("a+", re.IGNORECASE),
        functools.partial(function, {"x", "y"}, k={"q", "w"}),
        function,
        Plain,
        Plain("a", "b").__init__,
        Fields,
        Model,
        list[Model],
        Model(words={"a", "b"}),
        looking_up,
        types.SimpleNamespace(a={"a", "b"}),
        collections.deque([{"a", "b"}]),
        {"a": Plain("x", "y"), "b": {Plain("p", "q"), Record({"r", "s"})}},
    ]


def digests():
    key_of = KeyMaker(lambda x: None, opero.Cache(backend="disk")).key_of
    return [key_of(value).hex() for value in objects()]


if __name__ == "__main__":
    found = {"here": digests()}
    for method in sys.argv[1:]:
        with multiprocessing.get_context(method).Pool(1) as pool:
            found[method] = pool.apply(digests)
    json.dump(found, sys.stdout)
