"""Deadlines, and clients that do not wait: both are felt down to the engine."""

import json
import re
import time

import httpx
import openai
import pytest
from ray import serve

from serve.app import APPLICATION

pytestmark = pytest.mark.integration

# Six times as many answers as the engine has rows.
LONG = {"model": "base", "prompt": ["Tell me of the sea.", "Of the hills.", "Of the wind."], "n": 16, "max_tokens": 64}
SHORT = {"model": "base", "prompt": "Hi", "max_tokens": 1}


@pytest.fixture(scope="module")
def until_idle(http):
    """Wait until the engine has nothing to do; how many seconds that took."""
    generator = serve.get_deployment_handle("Generator", APPLICATION)

    def wait() -> float:
        start = time.perf_counter()
        while (load := generator.load.remote().result(timeout_s=60)).running or load.waiting:
            time.sleep(0.02)
        return time.perf_counter() - start

    wait()
    return wait


@pytest.fixture(scope="module")
def whole(http, until_idle) -> float:
    """The seconds that one row's whole answer takes here and now: what is let go has to be gone well before."""
    start = time.perf_counter()
    http.post("/v1/completions", json={**SHORT, "n": 8, "max_tokens": 64, "seed": 1}).raise_for_status()
    return time.perf_counter() - start


def test_a_client_that_leaves_a_stream_frees_its_rows_at_once(http, until_idle, whole):
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
        lines = (line for line in stream.iter_lines() if line)
        said = [json.loads(next(lines).removeprefix("data: ")) for _ in range(60)]
        assert any(choice["text"] for chunk in said for choice in chunk["choices"])

    assert until_idle() < whole
    assert http.post("/v1/completions", json=SHORT).status_code == 200


def test_a_client_that_hangs_up_on_a_whole_answer_frees_its_rows_at_once(http, until_idle, whole):
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=LONG, timeout=2)

    assert until_idle() < whole


def test_a_late_answer_is_504_and_a_late_stream_ends_with_an_error(fleet, http, until_idle, whole):
    late = http.post("/v1/completions", json=LONG, headers={"X-Request-Timeout": "1.5"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert until_idle() < whole

    answer = http.post("/v1/completions", json={**LONG, "stream": True}, headers={"X-Request-Timeout": "3"})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert json.loads(events[-1])["error"]["code"] == "timeout"
    assert "[DONE]" not in events
    assert until_idle() < whole

    client = openai.OpenAI(base_url=f"{fleet[0]}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="no answer in time"):
        list(client.completions.create(**LONG, stream=True, extra_headers={"X-Request-Timeout": "3"}))
    assert until_idle() < whole


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(http, seconds):
    answer = http.post("/v1/completions", json=SHORT, headers={"X-Request-Timeout": seconds})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Request-Timeout")


def test_every_answer_has_a_request_id(http):
    named = http.post("/v1/completions", json=SHORT, headers={"X-Request-Id": "mine-7"})
    refused = http.post("/v1/completions", json={"prompt": ""})
    with http.stream("POST", "/v1/completions", json={**SHORT, "stream": True}) as stream:
        streamed = stream.headers
    assert named.headers["X-Request-Id"] == "mine-7"
    made = [refused.headers["X-Request-Id"], streamed["X-Request-Id"]]
    assert len(set(made)) == 2
    assert all(re.fullmatch(r"[\w-]{16,}", one) for one in made)
