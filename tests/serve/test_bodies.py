"""Bodies of any bytes are taken, or refused in OpenAI's shape with the field at fault."""

import asyncio
import gzip
import json
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import serve.errors
from lorafleet.config import Serving
from serve.body_limit import KIB, BodyLimit
from serve.errors import answer_errors
from serve.gateway import api as endpoint
from serve.json_body import MAX_LEVELS, MAX_MEMBERS, JsonRoute
from serve.protocol.requests import AdapterRequest, ChatCompletionRequest, CompletionRequest, RouteRequest

WHOLE: Mapping[type[BaseModel], Mapping[str, Any]] = {
    CompletionRequest: {"prompt": "a"},
    ChatCompletionRequest: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    RouteRequest: {"input": "a"},
    AdapterRequest: {"name": "a", "source": "a"},
}
PATHS: Mapping[type[BaseModel], str] = {
    CompletionRequest: "/v1/completions",
    ChatCompletionRequest: "/v1/chat/completions",
    RouteRequest: "/v1/route",
    AdapterRequest: "/v1/adapters",
}
JSON = "application/json"


def application() -> FastAPI:
    """The endpoint's own reading of bodies, errors and limits, before routes that do nothing."""
    api = FastAPI()
    api.router.route_class = endpoint.router.route_class
    api.add_middleware(BodyLimit)
    answer_errors(api)
    for model, path in PATHS.items():

        async def reached(request: model) -> dict[str, Any]:
            return {"read": request.model_dump(mode="json")}

        api.add_api_route(path, reached, methods=["POST"])
    return api


API = application()


def post(body: bytes, model: type[BaseModel] = CompletionRequest, **headers: str) -> httpx.Response:
    async def posted() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(API), base_url="http://localhost") as http:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await http.post(PATHS[model], content=body, headers={"Content-Type": JSON} | named)

    return asyncio.run(posted())


def refused(answer: httpx.Response, status: int = 400) -> Mapping[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error


def completion(**fields: object) -> bytes:
    return json.dumps({"prompt": "a", **fields}).encode()


def test_the_endpoint_reads_bodies_as_the_tests_here_do() -> None:
    assert endpoint.router.route_class is JsonRoute
    documented = endpoint.openapi()["paths"]
    assert {path for path, methods in documented.items() if "requestBody" in methods.get("post", {})} == set(PATHS.values())


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("levels", [MAX_LEVELS, 400, 900, 100_000])
def test_nesting_is_bounded_and_the_bound_is_said(opening: str, closing: str, levels: int) -> None:
    def nested(levels: int) -> bytes:
        return f'{{"prompt":"a","metadata":{opening * levels}1{closing * levels}}}'.encode()

    assert post(nested(MAX_LEVELS - 1)).status_code == 200
    error = refused(post(nested(levels)))
    assert f"deeper than {MAX_LEVELS} levels" in error["message"]
    assert error["param"] in ("metadata", None)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ('"seed": ' + "1" * 5000, "seed", "out of range"),
        ('"seed": ' + "1" * 30, "seed", "out of range"),
        ('"composition": {"weights": {"a": -1e999}}', "composition.weights.a", "out of range"),
        ('"metadata": [1, NaN]', "metadata.1", "out of range"),
        (r'"metadata": {"a": ["x", "\ud83d"]}', "metadata.a.1", "surrogate"),
        (r'"metadata": {"\ud83d": 1}', "metadata", "surrogate"),
        (r'"\ud83d": 1', None, "surrogate"),
        (f'"metadata": {{"{"x" * 257}": 1}}', "metadata", "name of more than 256"),
        ('"n" 1', None, "not JSON.*line 1, column"),
    ],
)
def test_what_json_can_spell_and_nothing_can_take_is_refused_by_field(body: str, param: str | None, says: str) -> None:
    for model, path in PATHS.items():
        whole = json.dumps(WHOLE[model])
        error = refused(post(f"{whole[:-1]}, {body}}}".encode(), model))
        assert (error["param"], bool(re.search(says, error["message"]))) == (param, True), (path, error)


def test_a_field_at_fault_comes_before_one_that_is_given_twice() -> None:
    twice = b'{"prompt": "a", "model": "base", "model": "auto", "composition": {"weights": {"strange": "x"}}}'
    assert refused(post(twice))["param"] == "composition.weights.strange"
    assert refused(post(twice.replace(b'"x"', b"1")))["param"] == "model"
    inside = b'{"prompt": "a", "metadata": {"a": [{"b": 1, "b": 1}]}}'
    assert refused(post(inside))["message"] == "metadata.a.0.b is given twice. Leave one out"
    for model, whole in WHOLE.items():
        body, name = json.dumps(whole), next(iter(whole))
        error = refused(post(f"{body[:-1]}, {body[1:]}".encode(), model))
        assert (error["param"], error["message"]) == (name, f"{name} is given twice. Leave one out")


def test_bodies_are_utf8_whatever_they_begin_with() -> None:
    text = '{"prompt": "café"}'
    for encoding in ("utf-8", "utf-8-sig"):
        assert post(text.encode(encoding)).json()["read"]["prompt"] == "café"
    assert "byte 15 is 0xe9" in refused(post(text.encode("latin-1")))["message"]
    for encoding in ("utf-16", "utf-16-be", "utf-32-le"):
        error = refused(post(text.encode(encoding)))
        assert encoding.upper() in error["message"] and "not UTF-8" in error["message"]
    assert "not UTF-8" in refused(post(b'{"prompt": "\xed\xa0\x80"}'))["message"]


def test_what_is_compressed_or_no_json_is_refused_by_the_header() -> None:
    for encoding, body in (("gzip", gzip.compress(completion())), ("br", b"\x0b"), ("gzip, identity", completion())):
        assert f"Content-Encoding is '{encoding}'" in refused(post(body, Content_Encoding=encoding), 415)["message"]
    assert post(completion(), Content_Encoding="identity").status_code == 200
    # What a page of any origin may send without asking first.
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"):
        assert "Content-Type" in refused(post(completion(), Content_Type=kind), 415)["message"]
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/problem+json"):
        assert post(completion(), Content_Type=kind).status_code == 200


def fields_of(model: type[BaseModel], before: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every field of a model, and of those of the models in it."""
    for name, kind in get_type_hints(model).items():
        if name in model.model_fields:
            yield (*before, name)
            for part, places in models_in(kind):
                yield from fields_of(part, (*before, name, *places))


def models_in(kind: Any, places: tuple[int, ...] = ()) -> Iterator[tuple[type[BaseModel], tuple[int, ...]]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind, places
    for part in get_args(kind):
        yield from models_in(part, (*places, 0) if getattr(kind, "__origin__", None) is list else places)


def holding(body: Mapping[str, Any], path: tuple[str | int, ...], value: object) -> Any:
    """A body with a value at a path."""
    copy = json.loads(json.dumps(body))
    here = copy
    for part, following in pairwise(path):
        if isinstance(here, list):
            if not here:
                here.append({})
        elif not isinstance(here.get(part), (dict, list)):
            here[part] = [] if isinstance(following, int) else {}
        here = here[part]
    here[path[-1]] = value
    return copy


FIELDS = [(model, path) for model in WHOLE for path in fields_of(model)]
WRONG = ({"str": {"int": 5}}, [[{"list": 5}]], [True, "", {}], -5.5)


@pytest.mark.parametrize(
    ("model", "path"), FIELDS, ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else ""
)
def test_the_field_at_fault_is_named_whole(model: type[BaseModel], path: tuple[str | int, ...]) -> None:
    field, refusals = ".".join(map(str, path)), 0
    for value in WRONG:
        answer = post(json.dumps(holding(WHOLE[model], path, value)).encode(), model)
        if answer.status_code == 200:
            continue
        refusals += 1
        error = refused(answer)
        assert f"{error['param']}.".startswith(f"{field}."), error
        assert error["param"] in error["message"]
        # What comes behind the field leads to a part of the value.
        for part in error["param"].removeprefix(field).split(".")[1:]:
            value = value[int(part)] if isinstance(value, list) else value[part]
    assert refusals or path[-1] == "annotations"


def test_every_kind_of_field_is_among_those() -> None:
    named = {".".join(map(str, path)) for _, path in FIELDS}
    assert {"stream", "stream_options.include_usage", "messages.0.content.0.type", "composition.weights", "rows"} < named


@pytest.mark.parametrize(
    "name", ["str", "strange", "int", "list", "list[str]", "constrained-str", "function-after", "dict[str,any]", "0"]
)
def test_a_task_may_have_any_name(name: str) -> None:
    error = refused(post(completion(composition={"weights": {name: "x"}})))
    assert error["param"] == f"composition.weights.{name}"
    assert error["message"] == f"composition.weights.{name} is 'x'. Allowed: a valid number"
    error = refused(post(completion(**{"composition": {name: 5}})))
    assert error["param"] == f"composition.{name}"


@pytest.mark.parametrize(
    ("field", "value", "says"), [("stream", 5, "stream is 5"), ("stream", "maybe", "stream is 'maybe'")]
)
def test_the_value_and_what_is_allowed_are_said(field: str, value: object, says: str) -> None:
    error = refused(post(completion(**{field: value})))
    assert (error["param"], error["message"]) == (field, f"{says}. Allowed: a valid boolean")


def test_a_body_full_of_faults_is_refused_for_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Serving().body_kib * KIB - 1000
    faults: list[int] = []
    whole = serve.errors.validation_error
    monkeypatch.setattr(serve.errors, "validation_error", lambda found: (faults.append(len(found)), whole(found))[1])
    bodies: list[tuple[type[BaseModel], Any]] = [
        (CompletionRequest, {"prompt": [""] * (room // 4)}),
        (CompletionRequest, {"prompt": [[]] * (room // 4)}),
        (CompletionRequest, {"prompt": [-1] * (room // 4)}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * (room // 3)}),
        (CompletionRequest, {"prompt": "a", "composition": {"weights": {f"{n:x}": "x" for n in range(room // 15)}}}),
        (CompletionRequest, {"prompt": "a", "composition": {f"{n:x}": 1 for n in range(MAX_MEMBERS)}}),
        (ChatCompletionRequest, {"messages": [{"role": "x"}] * (room // 15)}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{"x": 1}] * (room // 11)}]}),
        (AdapterRequest, {"name": "a", "source": "a", "rows": [1] * (room // 3)}),
    ]
    for model, body in bodies:
        refused(post(json.dumps(body).encode(), model))
    assert max(faults) <= 2 * MAX_MEMBERS


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a", "user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["k", "str", "role"]), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = sorted({part for _, path in FIELDS for part in path if isinstance(part, str)})
NEARLY = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=5)
HEADER = st.binary(max_size=40).map(lambda value: value.translate(None, b"\r\n\0").strip())
KINDS = st.just(JSON.encode()) | HEADER
ENCODINGS = st.sampled_from([b"identity", b"gzip", b""]) | HEADER


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    model=st.sampled_from(list(PATHS)),
    body=st.binary()
    | NEARLY.map(lambda body: json.dumps(body).encode())
    | NEARLY.map(lambda body: json.dumps(body).encode("utf-16")),
    kind=KINDS,
    encoding=ENCODINGS,
)
@example(CompletionRequest, b"", b"", b"")
@example(RouteRequest, rb'{"input": "a", "\ud800": 1}', JSON.encode(), b"identity")
def test_any_bytes_are_taken_or_refused_in_openais_shape(
    model: type[BaseModel], body: bytes, kind: bytes, encoding: bytes
) -> None:
    status, answer = asyncio.run(raw(PATHS[model], body, [(b"content-type", kind), (b"content-encoding", encoding)]))
    assert status in (200, 400, 415), answer
    if status != 200:
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]


async def raw(path: str, body: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """What the application answers to bytes that no client's library lets through."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await API(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
