"""Endpoints and dependencies of FastAPI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import fastapi
import pydantic
import pytest
from fastapi.testclient import TestClient

from opero import control, opero

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


class Item(pydantic.BaseModel):
    """Stands in annotations, which are text here; FastAPI looks for it where the function was written."""

    name: str
    count: int = 1


class Flaky:
    """Fails each first time for a name."""

    def __init__(self) -> None:
        self.tries: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        self.tries[name] = self.tries.get(name, 0) + 1
        if self.tries[name] == 1:
            raise ConnectionError
        return name


flaky = Flaky()
closed: list[str] = []
app = fastapi.FastAPI()


@opero(min_delay=0)
def greeting(word: str = "hello") -> str:
    return flaky(word)


@opero(min_delay=0)
async def greeting_async(word: str = "hello") -> str:
    return flaky(word)


@opero(min_delay=0)
def session(name: str) -> Iterator[str]:
    yield flaky(name)
    closed.append(name)


@opero(min_delay=0)
async def session_async(name: str) -> AsyncIterator[str]:
    yield flaky(name)
    closed.append(name)


@app.get("/sync/items/{number}")
@opero(min_delay=0)
def item(number: int, name: str = "tea") -> dict[str, Any]:
    """Tell of one item."""
    return {"number": number, "name": flaky(name)}


@app.get("/async/items/{number}")
@opero(min_delay=0)
async def item_async(number: int, name: str = "tea") -> dict[str, Any]:
    """Tell of one item."""
    return {"number": number, "name": flaky(name)}


@app.post("/sync/items")
@opero(min_delay=0)
def add(item: Item) -> Item:
    return Item(name=flaky(item.name), count=item.count + 1)


@app.post("/async/items")
@opero(min_delay=0)
async def add_async(item: Item) -> Item:
    return Item(name=flaky(item.name), count=item.count + 1)


@app.get("/sync/greeting")
def greet(word: Annotated[str, fastapi.Depends(greeting)]) -> str:
    return word


@app.get("/async/greeting")
async def greet_async(word: Annotated[str, fastapi.Depends(greeting_async)]) -> str:
    return word


@app.get("/sync/session")
def in_session(name: Annotated[str, fastapi.Depends(session)]) -> list[str]:
    return [name, *closed]


@app.get("/async/session")
async def in_session_async(name: Annotated[str, fastapi.Depends(session_async)]) -> list[str]:
    return [name, *closed]


@app.get("/sync/whole")
@opero(cache=True)
def whole(word: Annotated[str, fastapi.Depends(greeting)]) -> str:
    return word


@app.get("/async/whole")
@opero(cache=True)
async def whole_async(word: Annotated[str, fastapi.Depends(greeting_async)]) -> str:
    return word


@pytest.fixture(autouse=True)
def counted_anew():
    flaky.tries.clear()
    closed.clear()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture(params=["/sync", "/async"])
def at(request) -> str:
    return request.param


def test_an_endpoint_gets_the_parameters_of_its_signature(client, at):
    assert client.get(f"{at}/items/3?name=milk").json() == {"number": 3, "name": "milk"}


def test_an_endpoint_has_the_defaults_of_its_signature(client, at):
    assert client.get(f"{at}/items/3").json() == {"number": 3, "name": "tea"}


def test_a_parameter_of_a_wrong_type_is_refused(client, at):
    assert client.get(f"{at}/items/three").status_code == 422
    assert flaky.tries == {}


def test_an_endpoint_is_retried(client, at):
    client.get(f"{at}/items/3")
    assert flaky.tries == {"tea": 2}


def test_an_annotation_as_text_is_found_where_the_function_was_written(client, at):
    assert client.post(f"{at}/items", json={"name": "tea"}).json() == {"name": "tea", "count": 2}


def test_a_dependency_has_parameters_and_is_retried(client, at):
    assert client.get(f"{at}/greeting?word=hi").json() == "hi"
    assert flaky.tries == {"hi": 2}


def test_a_dependency_that_yields_is_retried_until_it_yields_and_ended_after_the_answer(client, at):
    assert client.get(f"{at}/session?name=db").json() == ["db"]
    assert flaky.tries == {"db": 2}
    assert closed == ["db"]


def test_an_endpoint_with_a_dependency_is_cached(client, at):
    for _ in range(2):
        assert client.get(f"{at}/whole?word=hi").json() == "hi"
    assert control(whole_async if at == "/async" else whole).stats.hits == 1


def test_the_schema_tells_what_the_function_says(client, at):
    told = client.get("/openapi.json").json()["paths"][f"{at}/items/{{number}}"]["get"]
    assert told["description"] == "Tell of one item."
    assert [parameter["name"] for parameter in told["parameters"]] == ["number", "name"]


def test_an_endpoint_is_added_to_a_router(at):
    router = fastapi.APIRouter()
    router.add_api_route("/items/{number}", item_async if at == "/async" else item)
    other = fastapi.FastAPI()
    other.include_router(router)
    with TestClient(other) as client:
        assert client.get("/items/3").json() == {"number": 3, "name": "tea"}
