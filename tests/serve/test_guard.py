"""The guard before the endpoint: who is let through, who is told what, and that nobody's body is read before."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request

from lorafleet.config import load_settings
from lorafleet.keys import add_key, remove_key
from serve import guard
from serve.app import assemble
from serve.body_limit import KIB, BodyLimit, limit_by
from serve.errors import answer_errors
from serve.gateway import api as endpoint


def asgi(path, method, headers):
    """A request as no client's library writes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }


async def answered(api, scope):
    """The status of an answer."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await api(scope, receive, send)
    return sent[0]["status"]


@pytest.fixture
def settings(tmp_path):
    return load_settings(state=tmp_path)


@pytest.fixture
def ask(settings, monkeypatch):
    """Ask an application that is guarded as the endpoint is; says status and body, or the body's error code."""
    monkeypatch.setattr(guard, "_access", None)
    guard.guard_by(settings)
    api = FastAPI()
    api.add_middleware(BodyLimit)
    api.add_middleware(guard.KeyGuard)
    answer_errors(api)

    @api.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def reached(path: str, request: Request) -> int:
        return len(await request.body())

    def ask(method, path, key=None, client="127.0.0.1", headers=None, content=b"", host="localhost:8000"):
        async def asked() -> httpx.Response:
            transport = httpx.ASGITransport(api, client=(client, 5000))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as http:
                bearer = [("Authorization", f"Bearer {key}")] if key else []
                given = list(headers.items()) if isinstance(headers, dict) else headers or []
                return await http.request(method, path, headers=[*bearer, *given], content=content)

        return asyncio.run(asked())

    return ask


def test_the_endpoint_is_guarded_as_the_tests_here_are():
    order = [middleware.cls for middleware in endpoint.user_middleware]
    assert order.index(guard.KeyGuard) < order.index(BodyLimit)
    # What is not below /v1/ is open: nothing there may do more than look.
    documented = endpoint.openapi()["paths"]
    elsewhere = {method.upper() for path in documented if not path.startswith(guard.API) for method in documented[path]}
    assert {"/healthz", "/v1/adapters"} < set(documented) and elsewhere == {"GET"}


def test_with_keys_only_they_open_and_only_admin_changes_the_pool(ask, settings):
    use, admin = add_key(settings.keys_file, "a", "use"), add_key(settings.keys_file, "b", "admin")

    for path in ("/", "/healthz", "/readyz"):
        assert ask("GET", path).status_code == 200
    for key in (None, "lf-wrong", use[:-1]):
        refused = ask("POST", "/v1/completions", key)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"].startswith("Bearer")
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
        assert str(key) not in refused.text
    assert ask("GET", "/v1/models", headers={"Authorization": f"Basic {use}"}).status_code == 401
    assert [ask("POST", "/v1/completions", key).status_code for key in (use, admin)] == [200, 200]
    assert [ask("GET", "/v1/adapters", key).status_code for key in (use, admin)] == [200, 200]
    for method, path in (("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/x")):
        assert [ask(method, path, key).status_code for key in (None, use, admin)] == [401, 403, 200]


def test_changes_of_the_file_count_at_once_and_a_damaged_one_opens_nothing(ask, settings):
    assert ask("GET", "/v1/models").status_code == 200
    key = add_key(settings.keys_file, "a", "use")
    assert [ask("GET", "/v1/models", given).status_code for given in (None, key)] == [401, 200]
    newer = add_key(settings.keys_file, "b", "use")
    remove_key(settings.keys_file, "a")
    assert [ask("GET", "/v1/models", given).status_code for given in (key, newer)] == [401, 200]
    kept = settings.keys_file.read_text()
    settings.keys_file.write_text("{")
    assert [ask("GET", "/v1/models", given).status_code for given in (None, newer)] == [503, 503]
    settings.keys_file.write_text(kept)
    assert ask("GET", "/v1/models", newer).status_code == 200


@pytest.mark.parametrize("configured", [True, False])
def test_a_key_file_that_vanishes_shuts_the_endpoint_until_it_is_back(ask, settings, configured, tmp_path):
    if configured:
        settings = load_settings(state=tmp_path, guard={"keys_file": tmp_path / "mounted" / "keys.json"})
        guard.guard_by(settings)
        assert ask("POST", "/v1/completions").status_code == 503, "it was never there"
    key = add_key(settings.keys_file, "a", "admin")
    assert ask("POST", "/v1/completions", key).status_code == 200
    away = settings.keys_file.rename(tmp_path / "away")
    for given in (None, key, "lf-wrong"):
        closed = ask("DELETE", "/v1/adapters/x", given)
        assert (closed.status_code, closed.json()["error"]["code"]) == (503, "keys_unreadable")
        assert f"the key file {settings.keys_file} does not exist. Restore it" in closed.json()["error"]["message"]
    assert ask("GET", "/healthz").status_code == 200
    away.rename(settings.keys_file)
    assert [ask("POST", "/v1/completions", given).status_code for given in (None, key)] == [401, 200]
    remove_key(settings.keys_file, "a")
    assert ask("POST", "/v1/completions").status_code == 200, "the last key was taken away on purpose"


def test_a_fleet_deployed_with_a_key_file_needs_it_when_a_gateway_is_replaced(ask, settings):
    assert deployed_settings(settings).guard.keys_file is None
    add_key(settings.keys_file, "a", "use")
    deployed = deployed_settings(settings)
    settings.keys_file.unlink()
    guard.guard_by(deployed)
    assert ask("POST", "/v1/completions").status_code == 503


def deployed_settings(settings):
    """The settings that a gateway starts with."""
    return assemble(settings)._bound_deployment.init_args[0]


def test_a_key_file_that_cannot_be_looked_at_opens_nothing(ask, settings, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for unreadable in ("file/keys.json", "circle"):
        guard.guard_by(
            settings.model_copy(update={"guard": settings.guard.model_copy(update={"keys_file": tmp_path / unreadable})})
        )
        assert ask("GET", "/v1/models").status_code == 503


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({}, 200),
        ({"client": "::1", "host": "[::1]:8000"}, 200),
        ({"client": "10.0.0.7"}, 403),
        # A page in a browser of this machine, whose name was made to point here.
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"headers": {"Host": "0.0.0.0:8000"}}, 403),
        ({"headers": {"Host": "me@127.0.0.1:8000"}}, 403),
        ({"headers": {"Host": "127.0.0.1:8000#.evil.example"}}, 403),
        ({"headers": {"Host": ""}}, 403),
        ({"headers": [("Host", "localhost"), ("Host", "evil.example")]}, 403),
        ({"headers": {"Host": "LocalHost.:8000"}}, 200),
        ({"headers": {"Host": "127.9.9.9"}}, 200),
        # A socket for both kinds of addresses shows IPv4 clients so.
        ({"client": "::ffff:127.0.0.1", "headers": {"Host": "[::ffff:127.0.0.1]:8000"}}, 200),
        ({"client": "::ffff:10.0.0.7"}, 403),
        # A page of this endpoint, of another program here, of a file, of elsewhere.
        ({"headers": {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}}, 200),
        ({"headers": {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}}, 403),
        ({"headers": {"Origin": "http://localhost:3000"}}, 403),
        ({"headers": {"Origin": "null"}}, 403),
        ({"headers": {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}}, 403),
        ({"headers": [("Origin", "http://localhost:8000"), ("Origin", "https://evil.example")]}, 403),
        ({"headers": {"Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}}, 403),
        *(
            ({"headers": {name: "10.0.0.7"}}, 403)
            for name in (
                "X-Forwarded-For",
                "X-Forwarded-Host",
                "Forwarded",
                "Via",
                "X-Real-IP",
                "CF-Connecting-IP",
                "True-Client-IP",
            )
        ),
    ],
)
def test_without_keys_the_pool_is_changed_from_this_machine_alone(ask, asked, status):
    assert ask("POST", "/v1/adapters", **asked).status_code == status
    assert ask("POST", "/v1/completions", **asked).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/adapters",
        "/v1/adapters/x",
        "//v1/adapters",
        "/v1//adapters",
        "/v1/./adapters",
        "/x/../v1/adapters",
        "/V1/adapters",
        "/v1;x/adapters",
        "/v1/adapters;x",
        "/v1/adapters/",
        "/v1/adapters\n",
        "/v1/adapters\0",
        "\\v1\\adapters",
        "/v1\\adapters",
        "v1/adapters",
        "",
        "*",
        "http://localhost:8000/v1/adapters",
        "/fleet/v1/adapters",
        "/fleet/fleet/v1/adapters",
        "/fleetv1/adapters",
        "/v1/adapters/../adapters/x",
        "/v1/adapters/a/b",
    ],
)
@pytest.mark.parametrize("root", ["", "/fleet", "/v1", "/"])
def test_no_spelling_of_a_path_or_method_gets_to_the_pool_past_the_guard(settings, path, root):
    reached = []
    api = FastAPI()
    api.add_middleware(guard.KeyGuard)

    @api.post("/v1/adapters")
    @api.delete("/v1/adapters/{name}")
    async def change(name: str = "") -> None:
        reached.append(name)

    guard.guard_by(settings)
    for method in ("POST", "DELETE", "PUT", "TRACE", "BREW", "post", "GET", "HEAD", "OPTIONS"):
        for headers in ([], [(b"x-http-method-override", b"DELETE")], [(b"host", b"10.0.0.1")]):
            scope = asgi(path, method, headers) | {"root_path": root, "client": ("10.0.0.7", 1)}
            status = asyncio.run(answered(api, scope))
            assert 300 <= status < 500
    assert not reached
    # They are there to be reached.
    assert asyncio.run(answered(api, asgi("/v1/adapters", "POST", [(b"host", b"localhost")]))) == 200
    assert reached == [""]


def test_a_proxy_on_this_machine_that_speaks_http_1_0_is_no_client_here(settings):
    guard.guard_by(settings)
    api = FastAPI()
    api.add_middleware(guard.KeyGuard)
    api.post("/v1/adapters")(lambda: None)
    scope = asgi("/v1/adapters", "POST", [(b"host", b"127.0.0.1:8000")])
    assert [asyncio.run(answered(api, scope | {"http_version": version})) for version in ("1.1", "1.0")] == [200, 403]


def test_a_websocket_gets_nowhere():
    async def refused():
        sent = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message["type"])

        await endpoint({**asgi("/v1/adapters", "GET", []), "type": "websocket", "scheme": "ws"}, receive, send)
        return sent

    assert asyncio.run(refused()) == ["websocket.close"]


def test_odd_authorization_headers_open_nothing(ask, settings, monkeypatch):
    key = add_key(settings.keys_file, "a", "use")
    hashed = []
    looked_up = guard.role_of
    monkeypatch.setattr(guard, "role_of", lambda given, keys: (hashed.append(len(given)), looked_up(given, keys))[1])

    def status(*values):
        return ask("GET", "/v1/models", headers=[("Authorization", value) for value in values]).status_code

    assert status(f"Bearer {key}") == status(f"bearer   {key} ") == 200
    odd = ["", "Bearer", "Bearer ", f"Bearer\t{key}", f"Basic {key}", key, f"Bearer {key}, Bearer {key}", f"Bearer {key}x"]
    odd += [b"Bearer \xff\xfe", f"Bearer {key}\xa0".encode("latin-1"), b"Bearer \xed\xa0\x80", "Bearer " + "x" * 1_000_000]
    assert {value if isinstance(value, bytes) else value[:30]: status(value) for value in odd if status(value) != 401} == {}
    assert status(f"Bearer {key}", f"Bearer {key}") == status("Bearer x", f"Bearer {key}") == 401
    assert max(hashed) <= guard.LONGEST_KEY


def test_open_admin_lets_all_change_the_pool_while_there_are_no_keys(ask, settings, monkeypatch):
    guard.guard_by(settings.model_copy(update={"guard": settings.guard.model_copy(update={"open_admin": True})}))
    assert ask("POST", "/v1/adapters", client="10.0.0.7").status_code == 200
    add_key(settings.keys_file, "a", "use")
    assert ask("POST", "/v1/adapters", client="10.0.0.7").status_code == 401


def test_the_body_of_whoever_has_no_key_is_not_read(ask, settings):
    read = []
    limit_by(settings)

    async def body():
        for _ in range(2 * settings.serving.body_kib * KIB // 65536):
            read.append(1)
            yield b"x" * 65536

    key = add_key(settings.keys_file, "a", "use")
    assert ask("POST", "/v1/completions", content=body()).status_code == 401
    unread = len(read)
    assert ask("POST", "/v1/completions", key, content=body()).status_code == 413
    assert unread == 0 < len(read)
