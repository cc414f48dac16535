"""What Serve's HTTP proxy makes of requests that no client's library writes: on the endpoint's own port, byte by byte."""

import asyncio
import json
import socket
from importlib import import_module
from pathlib import Path

import pytest

import serve
from lorafleet.cli.service import RAY_ENVIRONMENT
from serve.proxy_headers import ProxyHeaders, middlewares

BODY = b'{"model": "base", "prompt": "a", "max_tokens": 1}'


def passed(*headers, kind="http"):
    """The headers that come through, and what is sent where none do."""
    reached, sent = [], []

    async def application(scope, receive, send):
        reached.extend(scope["headers"])

    async def send(message):
        sent.append(message)

    asyncio.run(ProxyHeaders(application)({"type": kind, "headers": list(headers)}, None, send))
    return reached, sent


@pytest.mark.parametrize("value", [b"\xff\xfe", "café".encode("latin-1"), b"", b"a b", b"a\tb", b"x" * 129, "é".encode()])
def test_an_id_that_is_none_is_refused_before_ray_reads_it(value):
    for name in (b"x-request-id", b"X-Request-Id"):
        reached, sent = passed((b"host", b"h"), (name, value))
        assert not reached and sent[0]["status"] == 400
        error = json.loads(sent[1]["body"])["error"]
        assert error["param"] == "X-Request-Id" and "visible ASCII" in error["message"]
        assert passed((name, value), kind="websocket") == ([], [{"type": "websocket.close", "code": 1008}])
    assert passed((b"x-request-id", b"abc"), (b"x-request-id", value))[0] == []


def test_headers_that_steer_ray_do_not_reach_it():
    kept = [
        (b"x-request-id", b"5f0c.A-b/1"),
        (b"x-request-timeout", b"5"),
        (b"traceparent", b"00-1"),
        (b"user-agent", b"\xff"),
    ]
    steering = [
        b"x-request-timeout-seconds",
        b"X-Request-Disconnect-Disabled",
        b"serve_multiplexed_model_id",
        b"x_session_id",
    ]
    dropped = [(name, value) for name in steering for value in (b"\xff\xfe", b"0", b"?1")]
    assert passed(*kept, *dropped, (b"tracestate", b"\xff")) == (kept, [])
    assert [middleware.cls for middleware in middlewares()] == [ProxyHeaders]


def test_every_way_to_start_a_cluster_has_its_proxies_check_headers():
    variable = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    module, name = RAY_ENVIRONMENT[variable].rsplit(".", 1)
    assert getattr(import_module(module), name) is middlewares
    for file in ("clusters/environment.sh", "kubernetes/rayservice.yaml"):
        text = (Path(serve.__file__).parent.parent / file).read_text()
        assert text.count(variable) == text.count(RAY_ENVIRONMENT[variable]) == text.count("RAY_SERVE_PROXY_USE_GRPC") > 0


def exchange(port, head, body=b""):
    """Status, headers and body of the answer to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    top, _, content = answer.partition(b"\r\n\r\n")
    return int(top.split(b" ", 2)[1]), top.lower(), content


@pytest.fixture(scope="session")
def ask(fleet):
    def ask(*headers, line=b"POST /v1/completions HTTP/1.1", body=BODY, host=b"127.0.0.1"):
        lines = [line, *([b"Host: " + host] if host else []), b"Content-Type: application/json", *headers]
        return exchange(fleet[1].serving.port, b"\r\n".join(lines) + b"\r\n", body)

    return ask


@pytest.mark.integration
@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"X-Request-Id: \xff\xfe", 400),
        (b"X-Request-Id: " + b"x" * 1000, 400),
        (b"X-Request-Id: mine", 200),
        (b"X-Request-Timeout-Seconds: \xff\xfe", 200),
        (b"X-Request-Timeout-Seconds: 0.000001", 200),
        (b"X-Request-Disconnect-Disabled: \xff", 200),
        (b"Serve_Multiplexed_Model_Id: \xff", 200),
        (b"X-Session-Id: \xff", 200),
        (b"Traceparent: \xff", 200),
        (b"X-Request-Timeout: \xff", 400),
        (b"User-Agent: \xff\xfe", 200),
        (b"Authorization: Bearer \xff", 200),
        (b"Cookie: " + b"x" * 60_000, 200),
        (b"Content-Encoding: gzip", 415),
        (b"Content-Encoding: \xff", 415),
        (b"Content-Type: text/plain", 200),
        (b"Expect: 100-continue", 200),
    ],
)
def test_any_bytes_in_a_header_are_taken_or_refused_as_json(ask, header, status):
    answered, top, content = ask(header)
    # Behind an answer to Expect comes the one that counts.
    if answered == 100:
        answered, content = int(content.split(b" ", 2)[1]), content.partition(b"\r\n\r\n")[2]
    assert answered == status, content
    assert ("error" in json.loads(content)) == (status != 200)
    if header == b"X-Request-Id: mine":
        assert b"x-request-id: mine" in top


@pytest.mark.integration
def test_bodies_are_refused_by_the_endpoint_as_by_its_parts(ask):
    assert ask(body=b'{"prompt":"a","metadata":' + b"[" * 900 + b"]" * 900 + b"}")[0] == 400
    assert json.loads(ask(body=b'{"prompt":"a","stream":5}')[2])["error"]["param"] == "stream"
    assert b"not UTF-8" in ask(body=b'{"prompt":"caf\xe9"}')[2]
    assert b"Content-Type is missing" in ask(line=b"POST /v1/completions HTTP/1.1\r\nContent-Type:")[2]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("line", "host", "headers", "status"),
    [
        # Nothing is there to be removed: who may would be told so.
        (b"DELETE /v1/adapters/none HTTP/1.1", b"localhost", (), 404),
        (b"DELETE /v1/adapters/none HTTP/1.1", b"evil.example", (), 403),
        (b"DELETE /v1/adapters/none HTTP/1.1", b"127.0.0.1\r\nHost: evil.example", (), 403),
        (b"DELETE /v1/adapters/none HTTP/1.1", b"localhost", (b"Origin: http://localhost:3000",), 403),
        (b"DELETE /v1/adapters/none HTTP/1.1", b"localhost", (b"Sec-Fetch-Site: cross-site",), 403),
        (b"DELETE /v1/adapters/none HTTP/1.1", b"localhost", (b"X-Forwarded-For: 127.0.0.1",), 403),
        (b"DELETE /v1/adapters/none HTTP/1.0", b"localhost", (), 403),
        (b"DELETE /v1/adapters/none HTTP/1.1", b"", (), 403),
        (b"DELETE http://evil.example/v1/adapters/none HTTP/1.1", b"evil.example", (), 403),
        (b"DELETE /v1/%61dapters/none HTTP/1.1", b"evil.example", (), 403),
        (b"DELETE /v1%2Fadapters%2Fnone HTTP/1.1", b"evil.example", (), 403),
        (b"DELETE //v1/adapters/none HTTP/1.1", b"evil.example", (), 404),
        (b"DELETE /x/../v1/adapters/none HTTP/1.1", b"evil.example", (), 404),
        (b"GET /v1/adapters HTTP/1.1", b"evil.example", (b"X-HTTP-Method-Override: DELETE",), 200),
        (b"OPTIONS /v1/adapters HTTP/1.1", b"evil.example", (b"Origin: http://evil.example",), 405),
        (b"TRACE /v1/adapters HTTP/1.1", b"evil.example", (), 403),
        (b"GET /v1/models/%0d%0aX-Evil:%201%ff HTTP/1.1", b"localhost", (), 404),
    ],
)
def test_who_changes_the_pool_is_on_this_machine(ask, line, host, headers, status):
    answered, top, content = ask(*headers, line=line, host=host, body=b"")
    assert answered == status, content
    assert b"x-evil" not in top and b"access-control" not in top
    json.loads(content)
