"""Read JSON bodies: UTF-8, not nested deeply, no name twice, and numbers that fit. What is not is refused by field."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from serve.errors import ApiError

MAX_LEVELS = 64
MAX_MEMBERS = 4096
"""Of one object: pydantic reports each unknown member, and the report is far larger than the body."""
MAX_NAME = 256
"""Characters: errors repeat a name, and look for those like it."""
MAX_BITS = 64
LARGE = 64 * 1024
"""Bytes from which a body is parsed off the event loop."""
FieldPath = tuple[Any, str | int] | None
"""The place of a value in the body: its parent's path and its own name. Only an error writes it out."""


class RepeatedName(dict[str, Any]):
    """An object that has a name twice, or a body with one in it. Models refuse it once their fields are in order."""

    name: str


class JsonRequest(Request):
    """A request whose body is parsed by `read_json`."""

    _parsed: Any = None

    async def parse(self) -> None:
        """Read the body; an empty one is left to FastAPI, which names the fields that are missing.

        Raises:
            ApiError: 400 or 415.
        """
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise ApiError(
                415,
                f"Content-Encoding is {encoding[:40]!r}, which is not supported. Send the body as it is",
                code="bad_encoding",
            )
        try:
            body = await self.body()
        except ClientDisconnect:
            raise HTTPException(400, "the client left before the body was whole") from None
        if not body:
            return
        kind = self.headers.get("content-type", "")
        if not _is_json(kind):
            found = f"Content-Type is {kind[:80]!r}" if kind else "Content-Type is missing"
            raise ApiError(415, f"{found}. Send JSON, with Content-Type: application/json", code="bad_content_type")
        self._parsed = await asyncio.to_thread(read_json, body) if len(body) > LARGE else read_json(body)

    async def json(self) -> Any:
        """The body as `parse` has read it."""
        return self._parsed


class JsonRoute(APIRoute):
    """A route whose body is JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, behind the reading of the body: what fails there has its own status."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handled(request: Request) -> Response:
            read = JsonRequest(request.scope, request.receive)
            await read.parse()
            return await handler(read)

        return handled


def read_json(body: bytes) -> Any:
    """The value of a body.

    Raises:
        ApiError: 400, with the field at fault.
    """
    kind = json.detect_encoding(body)
    if not kind.startswith("utf-8"):
        raise ApiError.bad_request(f"the body is {kind.upper()}, and not UTF-8. Send JSON as UTF-8", None)
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ApiError.bad_request(
            f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}. Send JSON as UTF-8", None
        ) from None
    value = _parsed(text)
    twice: list[str] = []
    for path, problem in _problems(value, twice):
        raise ApiError.bad_request(f"{_written(path) or 'the body'} {problem}", _written(path))
    if twice and isinstance(value, dict):
        value = RepeatedName(value)
        value.name = twice[-1]
    return value


def _parsed(text: str) -> Any:
    try:
        try:
            return json.loads(text, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise ApiError.bad_request(f"the body is not JSON: {error.msg} at {where}", None) from None
        except ValueError:
            # Python refuses integers of thousands of digits; as floats they are infinite, and have a field.
            return json.loads(text, object_pairs_hook=_object, parse_int=float)
    except RecursionError:
        raise ApiError.bad_request(f"the body is nested deeper than {MAX_LEVELS} levels. Send it flatter", None) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = RepeatedName(found)
    repeated.name = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return repeated


def _problems(body: Any, twice: list[str]) -> Iterator[tuple[FieldPath, str]]:
    left: list[tuple[Any, FieldPath, int]] = [(body, None, 0)]
    while left:
        value, path, level = left.pop()
        if isinstance(value, str):
            if not _encodes(value):
                yield path, "holds half of a surrogate pair. Send whole characters"
        elif isinstance(value, (dict, list)):
            if level == MAX_LEVELS:
                yield _top(path), f"is nested deeper than {MAX_LEVELS} levels. Send it flatter"
            elif isinstance(value, list):
                left.extend((part, (path, index), level + 1) for index, part in _suspects(value))
            elif not all(map(_encodes, value)):
                yield path, "holds half of a surrogate pair. Send whole characters"
            elif len(value) > MAX_MEMBERS:
                yield path, f"has {len(value)} members. Allowed: at most {MAX_MEMBERS}"
            elif any(len(name) > MAX_NAME for name in value):
                yield path, f"has a member with a name of more than {MAX_NAME} characters"
            else:
                left.extend((part, (path, name), level + 1) for name, part in value.items())
                if isinstance(value, RepeatedName):
                    twice.append(_written((path, value.name)) or "")
        elif not _fits(value):
            yield path, f"is a number out of range. Allowed: finite numbers, and integers of at most {MAX_BITS} bits"


def _suspects(values: list[Any]) -> Iterable[tuple[int, Any]]:
    """The parts of a list that may have a problem. A hundred thousand token ids or texts are looked at together."""
    kinds = set(map(type, values))
    if kinds == {int} and _fits(max(values)) and _fits(min(values)):
        return ()
    if kinds == {str} and _encodes("".join(values)):
        return ()
    return enumerate(values)


def _fits(value: float | None) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or value.bit_length() <= MAX_BITS


def _encodes(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a character that takes two escapes, as a client does that cuts a text inside of one.
        return False
    return True


def _top(path: FieldPath) -> FieldPath:
    while path is not None and path[0] is not None:
        path = path[0]
    return path


def _written(path: FieldPath) -> str | None:
    parts: list[str] = []
    while path is not None:
        path, part = path
        parts.append(str(part))
    return ".".join(reversed(parts)) or None


def _is_json(kind: str) -> bool:
    media = kind.partition(";")[0].strip().lower()
    return media == "application/json" or (media.startswith("application/") and media.endswith("+json"))
