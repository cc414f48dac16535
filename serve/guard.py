"""Who may ask for what: API keys, before anything of a request is read but its head."""

import logging
import re
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorafleet.config import Settings
from lorafleet.errors import KeyFileError
from lorafleet.keys import StoredKey, read_keys, role_of
from lorafleet.network import is_loopback
from serve.errors import AWAY_RETRY_SECONDS, SERVER_ERROR, ApiError, sentence

logger = logging.getLogger("ray.serve")

API = "/v1/"
POOL = "/v1/adapters"
READING = ("GET", "HEAD", "OPTIONS")
# A proxy before the endpoint names whom it speaks for, or itself; then nobody is on this machine for all we know.
FORWARDED = re.compile(
    r"forwarded|via|x-forwarded(-.*)?|(.*-)?(real|client|connecting)-ip|cf-ray|x-envoy-.*|x-amzn-.*|x-request-start"
)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:\d{1,5})?", re.IGNORECASE)
# Hashing it takes its time, for every key that there is.
LONGEST_KEY = 256


class Access:
    """What the keys in a file allow. The file may change at any time.

    A file that is configured, or that has held keys, is required: without it, nobody is let in.

    Args:
        settings: their `keys_file`, and the section `guard`.
    """

    def __init__(self, settings: Settings) -> None:
        self._file, self._open_admin = settings.keys_file, settings.guard.open_admin
        self._configured = settings.guard.keys_file is not None
        self._stamp: tuple[int, ...] | None = None
        self._keys: tuple[StoredKey, ...] = ()

    def check(self, scope: Scope) -> None:
        """Refuse who may not do this.

        Raises:
            ApiError: 401 without a key that is known, 403 for one that does not allow it, 503 where the file is damaged or
                missing.
        """
        paths, headers = paths_of(scope), Headers(scope=scope)
        if not any(path.startswith(API) for path in paths):
            return
        changes = any(path.startswith(POOL) for path in paths) and scope["method"] not in READING
        keys = self._read()
        if not keys:
            if changes and not (self._open_admin or on_this_machine(scope, headers)):
                raise forbidden(
                    "without API keys, the pool is changed from the endpoint's own machine alone. "
                    "Make a key there: lorafleet keys add NAME --role admin"
                )
            return
        role = role_of(_presented(headers), keys)
        if role is None:
            raise ApiError(
                401,
                "the API key is missing or not known. Send one as Authorization: Bearer KEY (lorafleet keys add makes one)",
                code="invalid_api_key",
            )
        if changes and role != "admin":
            raise forbidden("this API key may ask, and not change the pool. Use one of the role admin")

    def _read(self) -> tuple[StoredKey, ...]:
        try:
            stamp = _stamp(self._file)
            if stamp is None or stamp != self._stamp:
                self._keys = read_keys(self._file, required=self._configured or bool(self._keys))
                self._stamp = stamp
        except KeyFileError as error:
            # Not open to all because of a slip of the pen, or of a folder that is not mounted.
            logger.error("%s", error)
            raise ApiError(
                503, sentence(error), SERVER_ERROR, code="keys_unreadable", retry_after=AWAY_RETRY_SECONDS
            ) from None
        return self._keys


class KeyGuard:
    """ASGI middleware: lets a request pass, or answers it itself without reading its body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it on."""
        if scope["type"] == "http":
            try:
                _guarding().check(scope)
            except ApiError as error:
                response = error.response()
                if error.status == 401:
                    response.headers["WWW-Authenticate"] = 'Bearer realm="LoRAFleet"'
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


_access: Access | None = None


def guard_by(settings: Settings) -> None:
    """Have this process guarded: the application is made before there are settings."""
    global _access
    _access = Access(settings)


def _guarding() -> Access:
    if _access is None:
        raise ApiError(503, "the endpoint starts", SERVER_ERROR, code="unavailable", retry_after=AWAY_RETRY_SECONDS)
    return _access


def forbidden(message: str) -> ApiError:
    """403."""
    return ApiError(403, message, code="not_allowed")


def paths_of(scope: Scope) -> tuple[str, str]:
    """A request's path, and what is behind the root: a router may go by either, where the root ends within a name."""
    path = scope["path"]
    return path, path.removeprefix(scope.get("root_path", ""))


def on_this_machine(scope: Scope, headers: Headers) -> bool:
    """Whether a request comes over the loopback interface, from this machine itself, to a name of it.

    A page from elsewhere in a browser here comes over it too, but under a host name of its own, or with its origin. A proxy
    here that says nothing of its clients cannot be told from one of them; but nginx, as it comes, speaks HTTP/1.0.
    """
    client, hosts = scope.get("client"), headers.getlist("host")
    return (
        client is not None
        and is_loopback(client[0])
        and len(hosts) == 1
        and _named_loopback(hosts[0])
        and scope.get("http_version") != "1.0"
        and not any(map(FORWARDED.fullmatch, headers))
        and _same_origin(headers, hosts[0])
    )


def _named_loopback(host: str) -> bool:
    found = HOST.fullmatch(host)
    return found is not None and is_loopback(found[1].strip("[]").removesuffix(".").lower())


def _same_origin(headers: Headers, host: str) -> bool:
    """Whether a request is no browser's, or its page is of this host: browsers say so, and pages cannot change it."""
    sites = headers.getlist("sec-fetch-site")
    origins = [origin.rpartition("://")[2].lower() for origin in headers.getlist("origin")]
    return set(sites) <= {"same-origin", "none"} and set(origins) <= {host.lower()}


def _presented(headers: Headers) -> str:
    """The key of a request; none where it has several, of which a proxy may have looked at another one."""
    given = headers.getlist("authorization")
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return key.strip(" ") if scheme.lower() == "bearer" and len(key) <= LONGEST_KEY else ""


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Another one when the file is another; None where there is none, or it cannot be looked at."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
