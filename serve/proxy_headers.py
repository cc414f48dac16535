"""ASGI middleware for Serve's HTTP proxy: request headers that Ray itself reads are checked before it reads them.

Ray decodes these as UTF-8. One that is not fails in the proxy, with a 500 in plain text, and with some of them the request's
body stays in the proxy's memory for good. Others let any client turn off the proxy's timeout, or its watch for clients that
hang up. The proxy loads this by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.
"""

import re

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

REQUEST_ID = b"x-request-id"
# It stands in every log line of its request.
ALLOWED_ID = re.compile(rb"[\x21-\x7e]{1,128}")
REFUSAL = "X-Request-Id is not an id. Allowed: 1 to 128 visible ASCII characters; leave it out, and the answer has a new one"
STEERING = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
        b"x-session-id",
    }
)
TRACING = frozenset({b"traceparent", b"tracestate"})


class ProxyHeaders:
    """Drops headers that steer Ray, and refuses a request whose X-Request-Id is no id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it on."""
        if scope["type"] in ("http", "websocket"):
            headers = [(name, value) for name, value in scope["headers"] if _passes(name, value)]
            if not _has_good_id(headers):
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                    return
                error = {"message": REFUSAL, "type": "invalid_request_error", "param": "X-Request-Id", "code": None}
                await JSONResponse({"error": error}, 400)(scope, receive, send)
                return
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """The middlewares of Serve's HTTP proxy."""
    return [Middleware(ProxyHeaders)]


def _passes(name: bytes, value: bytes) -> bool:
    # Ray takes - and _ as the same, and so does what stands before it.
    plain = name.lower().replace(b"_", b"-")
    return plain not in STEERING and not (plain in TRACING and not value.isascii())


def _has_good_id(headers: list[tuple[bytes, bytes]]) -> bool:
    return all(ALLOWED_ID.fullmatch(value) for name, value in headers if name.lower() == REQUEST_ID)
