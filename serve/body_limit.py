"""Requests with too large a body are refused before anything reads them."""

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafleet.config import Serving, Settings

KIB = 1024

_kib = Serving().body_kib


def limit_by(settings: Settings) -> None:
    """Have this process keep to the bound of the settings: the application is made before there are any."""
    global _kib
    _kib = settings.serving.body_kib


class BodyLimit:
    """ASGI middleware: 413 for a body of more than `serving.body_kib`, by its header or as it comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its bytes."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > _kib * KIB:
                raise HTTPException(413, f"the body is larger than {_kib} KiB (serving.body_kib). Send less at once")
            return message

        await self._app(scope, counted, send)
