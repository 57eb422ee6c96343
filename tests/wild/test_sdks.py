"""The SDKs of OpenAI and Anthropic, against a service on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anthropic
import openai
import pytest
from loopback import Answer, Request, Service

import opero
from opero.http import retry_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GREETING = "hello"
PROMPT = [{"role": "user", "content": "hi"}]
GREETINGS = {
    "/v1/chat/completions": {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": GREETING, "refusal": None},
            }
        ],
    },
    "/v1/messages": {
        "id": "1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": GREETING}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
}


def greet(request: Request) -> Answer:
    return Answer(body=GREETINGS[request.path])


def refuse(status: int, **headers: str) -> Answer:
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, told, {"type": "error", "error": {"type": "some_error", "message": "no"}})


def key_of(request: Request) -> str:
    return request.headers.get("x-api-key") or request.headers["authorization"].removeprefix("Bearer ")


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service(greet)
    yield service
    service.stop()


class Sdk:
    """One of the SDKs, blocking or not; its own retries are off, as opero's documentation says."""

    def __init__(self, module: Any, *, is_async: bool, service: Service) -> None:
        name = {openai: "OpenAI", anthropic: "Anthropic"}[module]
        self.module = module
        self._is_async = is_async
        self._is_openai = module is openai
        self._client = getattr(module, f"Async{name}" if is_async else name)
        self._url = service.url + ("/v1" if self._is_openai else "")

    def ask(self) -> Callable[..., Any]:
        """A user's function that asks by the SDK."""

        def ask(api_key: str = "key") -> str:
            with self._client(api_key=api_key, base_url=self._url, max_retries=0) as client:
                return self._text(self._create(client))

        async def ask_async(api_key: str = "key") -> str:
            async with self._client(api_key=api_key, base_url=self._url, max_retries=0) as client:
                return self._text(await self._create(client))

        return ask_async if self._is_async else ask

    def _create(self, client: Any) -> Any:
        if self._is_openai:
            return client.chat.completions.create(model="m", messages=PROMPT)
        return client.messages.create(model="m", max_tokens=5, messages=PROMPT)

    def _text(self, answer: Any) -> str:
        return answer.choices[0].message.content if self._is_openai else answer.content[0].text


@pytest.fixture(params=[openai, anthropic], ids=lambda module: module.__name__)
def sdk(request, world, service) -> Sdk:
    return Sdk(request.param, is_async=world.is_async, service=service)


@pytest.mark.parametrize(
    "asked", [({"retry_after": "7"}, 7.0), ({"retry_after_ms": "250"}, 0.25)], ids=["seconds", "milliseconds"]
)
def test_a_429_is_retried_when_the_service_asks_for_it(world, sdk, service, fake_clock, asked):
    headers, waited = asked
    service.answer = lambda request: refuse(429, **headers) if len(service.requests) == 1 else greet(request)
    service.start()
    ask = opero.opero(retry_on=retry_after)(sdk.ask())

    assert world.run(ask) == GREETING
    assert fake_clock.sleeps == [waited]


def test_a_refused_connection_is_retried(world, sdk, service):
    def come_up(_state: object) -> None:
        service.start()

    ask = opero.opero(retry_on=retry_after, min_delay=0.001, retry_options={"before_sleep": come_up})(sdk.ask())

    assert world.run(ask) == GREETING


def test_a_400_ends_the_call(world, sdk, service):
    service.answer = lambda _request: refuse(400)
    service.start()
    ask = opero.opero(retry_on=retry_after, min_delay=0)(sdk.ask())

    with pytest.raises(sdk.module.BadRequestError):
        world.run(ask)
    assert len(service.requests) == 1


def test_a_400_is_not_tried_with_the_next_key(world, sdk, service):
    service.answer = lambda _request: refuse(400)
    service.start()
    ask = opero.opero(retry_on=retry_after, min_delay=0, arg_fallback="api_key")(sdk.ask())

    with pytest.raises(opero.AllFailedError):
        world.run(ask, ["first", "second"])
    assert [key_of(request) for request in service.requests] == ["first"]


@pytest.mark.parametrize("status", [401, 403, 429])
def test_a_key_that_is_refused_is_followed_by_the_next_one(world, sdk, service, status):
    service.answer = lambda request: refuse(status) if key_of(request) == "first" else greet(request)
    service.start()
    ask = opero.opero(retry_on=retry_after, retries=1, arg_fallback="api_key")(sdk.ask())

    assert world.run(ask, ["first", "second"]) == GREETING
    assert [key_of(request) for request in service.requests] == ["first", "second"]


def test_a_key_that_asked_for_a_rest_is_tried_last_by_the_next_call(world, sdk, service):
    service.answer = lambda request: refuse(429, retry_after="60") if key_of(request) == "first" else greet(request)
    service.start()
    ask = opero.opero(retry_on=retry_after, retries=1, arg_fallback="api_key")(sdk.ask())

    world.run(ask, ["first", "second"])
    world.run(ask, ["first", "second"])
    assert [key_of(request) for request in service.requests] == ["first", "second", "second"]


def test_a_streamed_answer_is_passed_on(service):
    chunk = b'data: {"id":"1","object":"chat.completion.chunk","created":0,"model":"m","choices":[]}\n\n'
    events = Answer(headers={"content-type": "text/event-stream"}, body=chunk * 2 + b"data: [DONE]\n\n")
    service.answer = lambda _request: refuse(429) if len(service.requests) == 1 else events
    service.start()
    with openai.OpenAI(api_key="key", base_url=f"{service.url}/v1", max_retries=0) as client:
        create = opero.opero(retry_on=retry_after, min_delay=0)(client.chat.completions.create)

        with create(model="m", messages=PROMPT, stream=True) as stream:
            assert len(list(stream)) == 2
    assert len(service.requests) == 2


def test_a_method_of_a_client_can_be_decorated_itself(service):
    service.answer = lambda request: refuse(503) if len(service.requests) == 1 else greet(request)
    service.start()
    with anthropic.Anthropic(api_key="key", base_url=service.url, max_retries=0) as client:
        create = opero.opero(retry_on=retry_after, min_delay=0)(client.messages.create)

        assert create(model="m", max_tokens=5, messages=PROMPT).content[0].text == GREETING
