"""Logs: a line of JSON for each record, from Serve and from the library, that says whose request it was and where."""

import json
import logging

import pytest
import ray.serve.context
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger

from lorafleet.config import load_settings
from serve.logs import log_through_serve, logging_config


@pytest.fixture
def replica(tmp_path, monkeypatch):
    """A way to log as a replica does, where its settings say; afterwards the loggers are as they were."""
    loggers = [logging.getLogger(name) for name in ("ray.serve", "lorafleet")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    # Redirecting this process's output is nothing that a test should do.
    monkeypatch.setattr("ray.serve._private.logging_utils.RAY_SERVE_LOG_TO_STDERR", True)

    def start(**settings) -> list[str]:
        configure_component_logger(
            component_name="lorafleet_Generator",
            component_id="abc123",
            component_type=ServeComponentType.REPLICA,
            logging_config=logging_config(load_settings(logging=settings).logging).model_copy(
                update={"logs_dir": str(tmp_path)}
            ),
            max_bytes=1 << 20,
            backup_count=1,
        )
        log_through_serve()
        # Twice, as a replica that is set up anew: each record is still written once.
        log_through_serve()
        logging.getLogger("lorafleet.engine.engine").warning("a step of the engine failed")
        logging.getLogger("ray.serve").info("adapter %s came in", "seas")
        logging.getLogger("lorafleet.engine.engine").debug("not wanted")
        (file,) = tmp_path.iterdir()
        return file.read_text().splitlines()

    token = ray.serve.context._serve_request_context.set(
        ray.serve.context._RequestContext(route="/v1/completions", request_id="request-7", app_name="lorafleet")
    )
    yield start
    ray.serve.context._serve_request_context.reset(token)
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_json_lines_carry_request_application_deployment_and_replica(replica):
    records = [json.loads(line) for line in replica(encoding="json")]
    assert [record["message"] for record in records] == ["a step of the engine failed", "adapter seas came in"]
    for record in records:
        assert (record["request_id"], record["route"], record["application"]) == (
            "request-7",
            "/v1/completions",
            "lorafleet",
        )
        assert (record["deployment"], record["replica"]) == ("lorafleet_Generator", "abc123")
    assert [record["levelname"] for record in records] == ["WARNING", "INFO"]


def test_text_is_the_default_and_the_level_holds_for_the_library_too(replica):
    (line,) = replica(level="WARNING")
    assert line.startswith("WARNING") and "request-7" in line and line.endswith("a step of the engine failed")
