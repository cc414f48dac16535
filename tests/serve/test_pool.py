"""Adapters come and go while requests are answered, replicas die, and the pool dies in the middle."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from small_fleet import ROWS, fill, footprint, free_port, save_adapter, small_settings
from typer.testing import CliRunner, Result

from lorafleet.cli import app
from lorafleet.config import Settings
from lorafleet.keys import add_key, remove_key
from lorafleet.retrieval import server
from serve.app import assemble

pytestmark = pytest.mark.integration

APPLICATION = "small"
SEAS = ["How deep is the ocean?", "Whales sing in the sea.", "The tide is high at noon."]
PATIENCE = 240


@pytest.fixture(scope="module")
def settings(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A small fleet with two generators, served beside whatever else this cluster serves."""
    two = {"min_replicas": 2, "max_replicas": 2}
    settings = small_settings(tmp_path_factory.mktemp("pool"), free_port(), port=cluster, generator=two, adapter_rank=16)
    server.start(settings)
    fill(settings)
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host="127.0.0.1", port=cluster))
    serve.run(assemble(settings), name=APPLICATION, route_prefix=f"/{APPLICATION}")
    yield settings
    serve.delete(APPLICATION)
    server.stop(settings)


@pytest.fixture(scope="module")
def http(settings: Settings) -> Iterator[httpx.Client]:
    url = f"http://127.0.0.1:{settings.serving.port}/{APPLICATION}"
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def source(settings: Settings) -> Path:
    """The folder of an adapter that is not in the pool yet."""
    folder = settings.adapter_roots[0] / "seas"
    return folder if folder.exists() else save_adapter(folder, seed=7)


def states(http: httpx.Client) -> dict[str, str]:
    return {adapter["name"]: adapter["state"] for adapter in http.get("/v1/adapters").raise_for_status().json()["data"]}


def ask(http: httpx.Client, model: str, prompt: str = "The sea", tokens: int = 8) -> httpx.Response:
    return http.post(
        "/v1/completions", json={"model": model, "prompt": prompt, "temperature": 0, "max_tokens": tokens, "stop": None}
    )


def text(http: httpx.Client, model: str, **wishes: object) -> str:
    return ask(http, model, **wishes).raise_for_status().json()["choices"][0]["text"]


def weights(http: httpx.Client, query: str, **wishes: object) -> dict[str, float]:
    return http.post("/v1/route", json={"input": query, "top_k": 3, **wishes}).raise_for_status().json()["weights"]


def add(http: httpx.Client, source: Path, name: str = "seas", **fields: object) -> httpx.Response:
    return http.post("/v1/adapters", json={"name": name, "source": str(source), **fields})


def kill(deployment: str) -> None:
    """Kill one replica of a deployment, without a word to Serve."""
    prefix = f"SERVE_REPLICA::{APPLICATION}#{deployment}#"
    name = next(
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["name"].startswith(prefix)
    )
    ray.kill(ray.get_actor(name, namespace="serve"))


def wait_for(true: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.02)


def test_an_adapter_comes_is_found_by_name_and_by_retrieval_and_goes(http, settings, source):
    before = footprint(settings)
    plain = text(http, "base")
    assert states(http) == dict.fromkeys(ROWS, "ready")
    assert "seas" not in weights(http, SEAS[0])
    assert "seas" not in weights(http, SEAS[0], weigher="prototypes")

    answer = add(http, source, rows=[SEAS[0], *({"text": row} for row in SEAS[1:])])

    assert answer.status_code == 201, answer.text
    seas = answer.json()
    assert {key: seas[key] for key in ("name", "task", "rank", "alpha", "rows", "origin", "state", "card")} == {
        "name": "seas",
        "task": "seas",
        "rank": 4,
        "alpha": 8,
        "rows": 3,
        "origin": "added",
        "state": "ready",
        "card": None,
    }
    assert seas["modules"] == ["down_proj", "q_proj", "v_proj"]
    assert states(http) == dict.fromkeys([*ROWS, "seas"], "ready")
    assert "seas" in {model["id"] for model in http.get("/v1/models").json()["data"]}
    # Often enough for both generators to be asked.
    assert len({text(http, "seas") for _ in range(8)} - {plain}) == 1
    assert next(iter(weights(http, SEAS[0]))) == "seas"
    # Places follow the index by themselves, some seconds behind.
    for weigher in ("prototypes", "routed"):
        wait_for(lambda weigher=weigher: next(iter(weights(http, SEAS[0], weigher=weigher))) == "seas")
    assert add(http, source).json()["error"]["code"] == "taken"

    gone = http.delete("/v1/adapters/seas")

    assert (gone.status_code, gone.json()["deleted"]) == (200, True)
    assert footprint(settings) == before
    assert ask(http, "seas").status_code == http.delete("/v1/adapters/seas").status_code == 404
    assert "seas" not in weights(http, SEAS[0])


def test_the_commands_do_the_same(http, settings, tmp_path, monkeypatch):
    """From folders that the endpoint may not read, and with a key once there is one."""
    before = footprint(settings)
    # This application is not at the root of its port.
    below = settings.serving.model_copy(update={"port": f"{settings.serving.port}/{APPLICATION}"})
    here = settings.model_copy(update={"serving": below})
    monkeypatch.setattr(import_module("lorafleet.cli.adapters"), "settings_from", lambda *given: here)
    folder, rows = save_adapter(tmp_path / "seas", seed=7), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in SEAS))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["adapters", *arguments])

    added = run("add", str(folder), "--rows", str(rows))
    assert added.stdout == "seas is in the pool: rank 4, 3 rows\n", added.exception
    assert list(settings.adapter_roots[0].glob(".cli-*")) == []
    assert next(iter(weights(http, SEAS[0]))) == "seas"
    use, admin = add_key(settings.keys_file, "use", "use"), add_key(settings.keys_file, "admin", "admin")
    try:
        assert "API key is missing" in str(run("--json").exception)
        listed = json.loads(run("--json", "--key", use).stdout)
        assert [adapter["name"] for adapter in listed] == ["cooking", "seas", "weather"]
        assert "role admin" in str(run("remove", "seas", "--key", use).exception)
        assert run("remove", "seas", "--key", admin).stdout == "seas is gone\n"
    finally:
        # A file that is deleted would close the endpoint.
        for name in ("use", "admin"):
            remove_key(settings.keys_file, name)
    assert footprint(settings) == before


@pytest.mark.drill
def test_a_generator_that_dies_meanwhile_changes_nothing(http, settings, source):
    """Adapters come and go under load while a replica is killed; the one that takes its place has the same pool."""
    failed: list[str] = []
    over = threading.Event()
    usual = text(http, "weather")

    def load() -> None:
        while not over.wait(0.05):
            answer = ask(http, "weather")
            # Serve may say that a replica has died; whoever tries again is answered.
            if answer.status_code not in (200, 429, 503) or (answer.is_success and usual not in answer.text):
                failed.append(answer.text)

    def retried(change: Callable[[], httpx.Response]) -> httpx.Response:
        answer = change()
        while answer.status_code in (409, 503) and answer.headers.get("Retry-After"):
            time.sleep(0.5)
            answer = change()
        return answer

    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            threads.submit(load)
        try:
            adding = threads.submit(add, http, source, rows=SEAS)
            wait_for(lambda: (settings.adapters / ".incoming-seas").exists() or adding.done())
            kill("Generator")
            assert adding.result(PATIENCE).status_code == 201
            assert next(iter(weights(http, SEAS[1]))) == "seas"
            wait_for(lambda: serve.status().applications[APPLICATION].status == "RUNNING")
            found = {text(http, "seas") for _ in range(12)}
            kill("Generator")
            removed = retried(lambda: http.delete("/v1/adapters/seas"))
        finally:
            over.set()
    assert not failed, failed[:3]
    assert len(found) == 1
    assert removed.status_code == 200, removed.text
    wait_for(lambda: serve.status().applications[APPLICATION].status == "RUNNING")
    assert {ask(http, "seas").status_code for _ in range(8)} == {404}
    assert states(http) == dict.fromkeys(ROWS, "ready")


@pytest.mark.drill
@pytest.mark.parametrize("moment", ["copied", "loading"])
def test_when_the_pool_dies_in_the_middle_of_an_add_it_is_whole_or_not_there(http, settings, source, moment):
    before = footprint(settings)
    with ThreadPoolExecutor(1) as threads:
        adding = threads.submit(add, http, source, rows=SEAS)
        if moment == "copied":
            wait_for(lambda: (settings.adapters / ".incoming-seas" / "adapter_model.safetensors").exists())
        else:
            wait_for(lambda: states(http).get("seas") == "loading")
        kill("Pool")
        assert adding.result(PATIENCE).status_code in (201, 503)
    usual = text(http, "weather")
    assert usual, "requests go on without the pool"
    wait_for(lambda: not (settings.adapters / ".change.json").exists())
    wait_for(lambda: set(states(http).values()) == {"ready"})

    if "seas" in states(http):
        assert next(iter(weights(http, SEAS[0]))) == "seas"
        assert {ask(http, "seas").status_code for _ in range(8)} == {200}
        assert http.delete("/v1/adapters/seas").status_code == 200
    else:
        assert ask(http, "seas").status_code == 404
    assert footprint(settings) == before
    # And the next one comes in as ever.
    assert add(http, source).status_code == 201
    assert http.delete("/v1/adapters/seas").status_code == 200
    assert text(http, "weather") == usual


def test_requests_in_flight_across_a_removal_are_answered_as_without_it(http, source):
    assert add(http, source).status_code == 201
    prompts = [f"Wave number {number}" for number in range(4)]
    wanted = [text(http, "seas", prompt=prompt, tokens=250) for prompt in prompts]
    all_begun = threading.Barrier(len(prompts) + 1)

    def streamed(prompt: str) -> str:
        body = {"model": "seas", "prompt": prompt, "temperature": 0, "max_tokens": 250, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            chunks = [json.loads(next(lines))]
            all_begun.wait(PATIENCE)
            chunks += [json.loads(line) for line in lines if line != "[DONE]"]
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])

    with ThreadPoolExecutor(len(prompts)) as threads:
        asked = [threads.submit(streamed, prompt) for prompt in prompts]
        all_begun.wait(PATIENCE)
        removed = http.delete("/v1/adapters/seas")
        found = [future.result(PATIENCE) for future in asked]
    assert removed.status_code == 200
    assert found == wanted


@pytest.mark.drill
def test_what_came_in_is_there_when_every_replica_is_new(http, settings, source):
    """Deployed again with other settings, the pool hands over to the next one, and all replicas are replaced."""
    assert add(http, source, rows=SEAS).status_code == 201
    before, answer = footprint(settings), text(http, "seas")
    composing = settings.composing.model_copy(update={"density": 0.7})

    serve.run(
        assemble(settings.model_copy(update={"composing": composing})), name=APPLICATION, route_prefix=f"/{APPLICATION}"
    )

    assert http.post("/v1/completions", json={"prompt": SEAS[0], "max_tokens": 1}).json()["composition"]["density"] == 0.7
    assert states(http) == dict.fromkeys([*ROWS, "seas"], "ready")
    assert footprint(settings) == before
    assert {text(http, "seas") for _ in range(8)} == {answer}
    assert next(iter(weights(http, SEAS[0]))) == "seas"
    assert http.delete("/v1/adapters/seas").status_code == 200
