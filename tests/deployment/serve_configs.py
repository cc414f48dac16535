"""The Serve configs that are shipped, and what the builder makes of the same settings."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ray.serve import Application, Deployment

from serve.app import build

ROOT = Path(__file__).parents[2]
LIMITS = {
    "autoscaling_config",
    "max_ongoing_requests",
    "max_queued_requests",
    "backpressure_config",
    "health_check_period_s",
    "health_check_timeout_s",
    "graceful_shutdown_timeout_s",
    "max_surge_percent",
    "ray_actor_options",
}
"""What each deployment that scales has to say."""


def laptop() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())


def kubernetes() -> dict[str, Any]:
    service = yaml.safe_load((ROOT / "kubernetes" / "rayservice.yaml").read_text())
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def said(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a config says of each deployment."""
    return {deployment["name"]: deployment for deployment in config["applications"][0]["deployments"]}


def built(config: Mapping[str, Any]) -> dict[str, Deployment]:
    """The deployments that the builder makes of the config's arguments, by name."""

    def walk(application: Application) -> Iterator[Deployment]:
        deployment = application._bound_deployment
        yield deployment
        for argument in deployment.init_args:
            if isinstance(argument, Application):
                yield from walk(argument)

    return {deployment.name: deployment for deployment in walk(build(config["applications"][0]["args"]))}


def disagreements(config: Mapping[str, Any]) -> list[str]:
    """Where a config says of a deployment something else than the builder makes of its arguments."""
    found, made = [], built(config)
    for name, own in said(config).items():
        options = made[name]._deployment_config.model_dump(mode="json") | {"ray_actor_options": made[name].ray_actor_options}
        for key in own.keys() - {"name"}:
            found += _differences(f"{name}.{key}", own[key], options[key])
    return found


def _differences(path: str, value: Any, other: Any) -> list[str]:
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return [fault for key, inner in value.items() for fault in _differences(f"{path}.{key}", inner, other.get(key))]
    return [] if value == other else [f"{path} is {value!r}, by the settings {other!r}"]
