"""The application: how the five deployments are put together, and from which settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve import Application

from lorafleet.config import Scaling, Serving, Settings, load_settings
from lorafleet.errors import SettingsError
from lorafleet.paths import absolute, is_relative
from serve.gateway import Gateway, engines_take
from serve.generator import Generator
from serve.logs import logging_config
from serve.pool import Pool
from serve.retriever import Retriever
from serve.weigher import Weigher

APPLICATION = "lorafleet"
ROOT = Path(__file__).resolve().parent.parent
STATE_VARIABLE = "LORAFLEET_STATE"
SPARE_REQUESTS = 64
"""Those that an engine is about to refuse, and those that need none."""


class Arguments(BaseModel):
    """The `args` of the application in a Serve config.

    Attributes:
        config: a YAML file of settings, from the working directory or from the repository root; none for the defaults.
        state: the folder of index and adapters.
        overrides: `section.key=value`, under the name `set`.
    """

    model_config = ConfigDict(extra="forbid")

    config: Path | None = None
    state: Path | None = None
    overrides: list[str] = Field(default=[], alias="set")


def build(arguments: Mapping[str, Any]) -> Application:
    """The application that a Serve config describes (`import_path: serve.app:build`).

    Raises:
        SettingsError: an argument or a setting is unknown, or not allowed.
    """
    try:
        read = Arguments.model_validate(dict(arguments))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"bad argument args.{field}: {first['input']!r}", "Allowed: config, state, set") from None
    return assemble(_settings(read))


def assemble(settings: Settings) -> Application:
    """The application of settings whose `state` every node of the cluster can reach.

    A fleet that is deployed with a key file needs it from then on: a gateway that starts without it lets nobody in.
    """
    if os.path.lexists(settings.keys_file):
        guarded = settings.guard.model_copy(update={"keys_file": settings.keys_file})
        settings = settings.model_copy(update={"guard": guarded})
    serving, weighing = settings.serving, settings.weighing
    engine = settings.generation.rows + settings.generation.waiting
    engines = engines_take(settings)
    retriever = Retriever.options(
        **_options(serving.retriever, serving), user_config=weighing.model_dump(include={"neighbours", "weigher"})
    ).bind(settings)
    weigher = Weigher.options(**_options(serving.weigher, serving), user_config=weighing.model_dump())
    generator = Generator.options(
        **_options(wide_enough(serving.generator, engine), serving), user_config=settings.composing.model_dump()
    )
    pool = Pool.options(logging_config=logging_config(settings.logging, access=False)).bind(settings)
    application: Application = Gateway.options(**_options(wide_enough(serving.gateway, engines), serving)).bind(
        settings, retriever, weigher.bind(settings, retriever, pool), generator.bind(settings, pool), pool
    )
    return application


def wide_enough(scaling: Scaling, requests: int) -> Scaling:
    """A deployment that lets more through than the engines take: they refuse in OpenAI's shape, Serve in plain text."""
    return scaling.model_copy(update={"max_ongoing_requests": max(scaling.max_ongoing_requests, requests + SPARE_REQUESTS)})


def _options(scaling: Scaling, serving: Serving) -> dict[str, Any]:
    """The options of a deployment; one with a fixed number of replicas is autoscaled between equal bounds."""
    drain, surge = scaling.drain_seconds, scaling.surge_percent
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": max(scaling.min_replicas, scaling.max_replicas),
            "target_ongoing_requests": scaling.target_ongoing_requests,
            "upscale_delay_s": scaling.upscale_delay_seconds,
            "downscale_delay_s": scaling.downscale_delay_seconds,
        },
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "max_queued_requests": scaling.max_queued_requests,
        "health_check_period_s": scaling.health_period_seconds,
        "health_check_timeout_s": scaling.health_timeout_seconds,
        "graceful_shutdown_timeout_s": serving.request_timeout_seconds if drain is None else drain,
        "max_surge_percent": (0 if scaling.gpus else 100) if surge is None else surge,
        "ray_actor_options": {"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
    }


def _settings(arguments: Arguments) -> Settings:
    sections: dict[str, Any] = {}
    if arguments.state is not None and not (is_relative(arguments.state) and STATE_VARIABLE in os.environ):
        sections["state"] = arguments.state
    return load_settings(_config(arguments.config), arguments.overrides, relative_to=ROOT, **sections)


def _config(path: Path | None) -> Path | None:
    if path is None or (is_relative(path) and path.is_file()):
        return path
    return absolute(path, ROOT, "args.config")
