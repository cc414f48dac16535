import asyncio

import pytest
import ray.serve.schema
import yaml
from ray.exceptions import TaskCancelledError
from tiny_language_model import tiny_model, tiny_tokenizer

import serve.app
from lorafleet.composition import Composition
from lorafleet.engine import Engine, GenerationRequest
from lorafleet.errors import SettingsError, UnknownAdapter
from serve.deploy import last_error
from serve.generator import chat_prompt, generate
from serve.hanging_up import HangingUp


def test_whoever_no_longer_waits_frees_the_row():
    engine = Engine(tiny_model(), tiny_tokenizer(adds_bos=False), rows=1, longest=2000)
    long = [GenerationRequest(text, max_tokens=1500) for text in ("one", "two")]

    async def hang_up() -> None:
        asked = asyncio.create_task(generate(engine, long))
        while not engine.running:
            await asyncio.sleep(0.001)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(hang_up())
    (after,) = asyncio.run(generate(engine, [GenerationRequest("three", max_tokens=3)]))
    assert len(after.tokens) <= 3
    assert (engine.running, engine.waiting) == (0, 0)
    engine.close()


def test_one_choice_that_is_refused_cancels_the_others():
    engine = Engine(tiny_model(), tiny_tokenizer(adds_bos=False), rows=1, longest=2000)
    unknown = GenerationRequest("four", Composition(weights={"nobody": 1}), max_tokens=3)
    with pytest.raises(UnknownAdapter):
        asyncio.run(generate(engine, [GenerationRequest("one", max_tokens=1500), unknown]))
    (after,) = asyncio.run(generate(engine, [GenerationRequest("three", max_tokens=3)]))
    assert len(after.tokens) <= 3
    engine.close()


def test_the_config_is_one_that_serve_takes_and_its_arguments_are_checked(tmp_path, monkeypatch):
    config = yaml.safe_load((serve.app.ROOT / "serve" / "config.yaml").read_text())
    schema = ray.serve.schema.ServeDeploySchema.model_validate(config)
    assert schema.applications[0].import_path == "serve.app:build"
    arguments = schema.applications[0].args

    monkeypatch.delenv("LORAFLEET_STATE", raising=False)
    application = serve.app.build({**arguments, "set": ["serving.gateway.max_replicas=3", "weighing.p=0.5"]})
    gateway = application._bound_deployment
    assert gateway._deployment_config.autoscaling_config.max_replicas == 3
    assert gateway.init_args[0].state == serve.app.ROOT / "state"
    assert gateway.init_args[2]._bound_deployment._deployment_config.user_config["p"] == 0.5
    monkeypatch.setenv("LORAFLEET_STATE", str(tmp_path))
    assert serve.app.build(arguments)._bound_deployment.init_args[0].state == tmp_path
    with pytest.raises(SettingsError, match=r"args\.stat"):
        serve.app.build({"stat": "x"})


def test_without_a_chat_template_messages_are_joined_plainly():
    assert chat_prompt(tiny_tokenizer(), [("system", "Be brief."), ("user", "Hi")]) == "Be brief.\n\nHi"


def test_why_a_replica_cannot_start_is_read_off_what_serve_quotes():
    quoted = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:lorafleet:Generator.initialize_and_get_metadata() (pid=1, ip=10.0.0.1)
  File "replica.py", line 1, in initialize
lorafleet.errors.ModelError: no folder for the model './nowhere'. Give a hub id, or an existing folder

The above exception was the direct cause of the following exception:
RuntimeError: Traceback (most recent call last):
  File "generator.py", line 52, in __init__
lorafleet.errors.ModelError: no folder for the model './nowhere'. Give a hub id, or an existing folder
"""
    assert last_error(quoted) == "no folder for the model './nowhere'. Give a hub id, or an existing folder"
    assert last_error("waiting for\n 1 GPU") == "waiting for 1 GPU"


def test_a_request_that_ray_calls_off_is_one_whose_client_left():
    told = []

    async def application(scope, receive, send):
        told.append(await receive())
        told.append(await receive())

    messages = iter([{"type": "http.request", "body": b"{}"}])

    async def receive():
        try:
            return next(messages)
        except StopIteration:
            raise TaskCancelledError from None

    asyncio.run(HangingUp(application)({"type": "http"}, receive, receive))
    assert told == [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]
