"""Every error as an HTTP answer in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentResponse
from starlette.exceptions import HTTPException

from jobs.cluster import cause_of
from lorafleet.errors import (
    CompositionError,
    EngineFull,
    IndexMismatch,
    IndexUnavailable,
    LoRAFleetError,
    RequestError,
    UnknownAdapter,
)

logger = logging.getLogger("ray.serve")

BUSY_RETRY_SECONDS = 1
AWAY_RETRY_SECONDS = 5
INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
# Of pydantic's messages, what is around the values that are allowed.
WORDING = re.compile(
    r"^(\w+ should (be |have )?|Value error, )|, unable to .*$| to extract fields from$| after validation, not \d+$"
)


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: the HTTP status.
        message: for people: what is wrong, and the mend.
        kind: OpenAI's `type`.
        param: the field of the request that is at fault.
        code: for programs.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message, kind, param, code, retry_after)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    @classmethod
    def bad_request(cls, message: str, param: str | None) -> "ApiError":
        """400, with the field that is at fault."""
        return cls(400, message, param=param)

    def body(self) -> dict[str, Any]:
        """What the answer says, in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = None if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(self.body(), self.status, headers)


async def awaited(response: DeploymentResponse[Any]) -> Any:
    """The answer of another deployment; its error is raised as it was there, without what Ray wraps around it."""
    try:
        return await response
    except RayTaskError as error:
        raise cause_of(error) from None


def as_api_error(error: BaseException) -> ApiError:
    """The answer that an error asks for; one that nobody foresaw is 500."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError.bad_request(sentence(error), error.field)
        case CompositionError():
            return ApiError.bad_request(sentence(error), _composition_field(error.problem))
        case UnknownAdapter():
            return ApiError(404, sentence(error), param="composition.weights", code="adapter_not_found")
        case IndexUnavailable() | IndexMismatch():
            return ApiError(503, sentence(error), SERVER_ERROR, code="index_unavailable", retry_after=AWAY_RETRY_SECONDS)
        case BackPressureError() | EngineFull():
            message = "the endpoint has too many requests waiting. Try again in a moment"
            return ApiError(429, message, "rate_limit_error", code="overloaded", retry_after=BUSY_RETRY_SECONDS)
        case DeploymentUnavailableError() | ReplicaUnavailableError() | RayActorError():
            message = "a part of the endpoint is being restarted. Try again in a moment"
            return ApiError(503, message, SERVER_ERROR, code="unavailable", retry_after=AWAY_RETRY_SECONDS)
        case asyncio.TimeoutError():
            message = "no answer in time (serving.request_timeout_seconds, or X-Request-Timeout). Ask for fewer tokens"
            return ApiError(504, message, SERVER_ERROR, code="timeout")
        case LoRAFleetError():
            return ApiError(500, sentence(error), SERVER_ERROR)
        case _:
            return ApiError(500, "internal error; the endpoint's log has more", SERVER_ERROR)


def sentence(error: LoRAFleetError) -> str:
    """An error's own text: through a chain of deployments Ray puts its traceback in the place of `str`."""
    return LoRAFleetError.__str__(error)


def answer_errors(api: FastAPI) -> None:
    """Make an application answer every error in OpenAI's shape; FastAPI's own 422 becomes 400."""

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error.errors()).response()

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = ApiError(error.status_code, message, code=None).response()
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> JSONResponse:
        answer = as_api_error(error)
        if answer.status == 500:
            # As a literal: a path may hold line ends.
            logger.error("%s %r failed", request.method, request.url.path[:200], exc_info=error)
        return answer.response()

    # Of each kind by itself: what is handled as plain Exception is raised once more behind the answer.
    for kind in (
        ApiError,
        LoRAFleetError,
        BackPressureError,
        DeploymentUnavailableError,
        ReplicaUnavailableError,
        RayActorError,
        asyncio.TimeoutError,
        Exception,
    ):
        api.add_exception_handler(kind, failed)


def validation_error(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for the first field that pydantic found fault with."""
    # The models of requests have no plain unions (requests.by_shape), so that a path holds names and places alone.
    first = faults[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or None
    if field is None:
        return ApiError.bad_request("the body is not a JSON object. Send one, with Content-Type: application/json", None)
    if first["type"] == "missing":
        return ApiError.bad_request(f"{field} is missing", field)
    if first["type"] == "extra_forbidden":
        return ApiError.bad_request(f"unknown field {field}. Leave it out", field)
    message = WORDING.sub("", first["msg"])
    value = first.get("input")
    named = (
        f"{field} is {value!r}"
        if value is None or isinstance(value, (bool, int, float)) or _short(value)
        else f"{field} is wrong"
    )
    return ApiError.bad_request(f"{named}. Allowed: {message}", field)


def _short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 40


def _composition_field(problem: str) -> str:
    """The field that a composition's fault begins with ("density is 2"); the whole composition where it is another word."""
    first = problem.split(" ", 1)[0]
    return f"composition.{first}" if first.split(".")[0] in ("method", "weights", "density") else "composition"
