import asyncio
import threading

import pytest
import ray.serve.schema
import yaml
from tiny_language_model import tiny_model, tiny_tokenizer

import serve.app
from lorafleet.composition import Composition
from lorafleet.engine import Engine, Generation, GenerationRequest
from lorafleet.errors import RequestError, SettingsError, UnknownAdapter
from serve.batcher import Batcher
from serve.deploy import last_error
from serve.generator import chat_prompt, generate_each


def test_a_request_that_the_engine_refuses_fails_alone():
    engine = Engine(tiny_model(), tiny_tokenizer(adds_bos=False))
    fine = [GenerationRequest(text, max_tokens=3) for text in ("one", "two", "three")]
    unknown = GenerationRequest("four", Composition(weights={"nobody": 1}), max_tokens=3)
    empty = GenerationRequest("", max_tokens=3)

    answers = generate_each(engine, [fine[0], unknown, fine[1], empty, fine[2]])

    assert [type(answer) for answer in answers] == [Generation, UnknownAdapter, Generation, RequestError, Generation]
    assert [answers[place].tokens for place in (0, 2, 4)] == [answer.tokens for answer in engine.generate(fine)]


def test_what_arrives_while_the_engine_is_busy_is_one_batch():
    batches: list[list[int]] = []
    free = threading.Event()

    def run(asked: list[int]) -> list[int | Exception]:
        batches.append(list(asked))
        free.wait(10)
        return [ValueError("three") if number == 3 else 10 * number for number in asked]

    async def ask() -> list[object]:
        batcher = Batcher(run, size=4, wait_seconds=0.001)
        first = asyncio.create_task(batcher.ask(0))
        while not batches:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(batcher.ask(number)) for number in range(1, 7)]
        await asyncio.sleep(0.05)
        rest[0].cancel()
        free.set()
        answers = await asyncio.gather(first, *rest, return_exceptions=True)
        return [answer[0] if isinstance(answer, tuple) else type(answer) for answer in answers]

    answers = asyncio.run(ask())

    assert answers == [0, asyncio.CancelledError, 20, ValueError, 40, 50, 60]
    assert batches == [[0], [2, 3, 4], [5, 6]] or batches == [[0], [2, 3, 4, 5], [6]]


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
    assert gateway.init_args[2]._bound_deployment._deployment_config.user_config == {"p": 0.5}
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
