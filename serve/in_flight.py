"""The requests of this replica that are on their way, for whoever has to wait until those of before are over."""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.guard import paths_of

# A router takes a line's end behind a path for the end of the path.
COMPLETIONS = frozenset(f"/v1/{kind}{end}" for kind in ("completions", "chat/completions") for end in ("", "\n"))

_on_their_way: set["asyncio.Future[None]"] = set()


async def those_of_before_are_over() -> None:
    """Wait for the requests that are on their way now; those that come later do not matter."""
    if _on_their_way:
        await asyncio.wait(set(_on_their_way))


class InFlight:
    """ASGI middleware: counts the requests that a composition is made for, from their first byte to their last."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or COMPLETIONS.isdisjoint(paths_of(scope)):
            await self._app(scope, receive, send)
            return
        over = asyncio.get_running_loop().create_future()
        _on_their_way.add(over)
        try:
            await self._app(scope, receive, send)
        finally:
            _on_their_way.discard(over)
            over.set_result(None)
