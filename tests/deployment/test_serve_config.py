"""The Serve configs: every limit is said, nothing is said that Serve does not know, and files and settings agree."""

from copy import deepcopy

import pytest
from deployment.closed import closed, faults
from deployment.serve_configs import LIMITS, built, disagreements, kubernetes, laptop, said
from ray.serve.schema import ServeDeploySchema

from lorafleet.config import load_settings
from serve.app import assemble
from serve.generator import Generator

CONFIGS = {"laptop": laptop, "kubernetes": kubernetes}
STRICT = closed(ServeDeploySchema.model_json_schema())


@pytest.fixture(autouse=True)
def without_the_environment(monkeypatch):
    monkeypatch.delenv("LORAFLEET_STATE", raising=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_limit_is_set_and_is_the_settings(name):
    config = CONFIGS[name]()
    ServeDeploySchema.model_validate(config)
    assert faults(config, STRICT) == []
    assert disagreements(config) == []
    assert said(config).keys() == built(config).keys()
    for deployment, own in said(config).items():
        assert deployment == "Pool" or own.keys() >= LIMITS
    settings = built(config)["Gateway"].init_args[0]
    assert config["http_options"]["request_timeout_s"] > settings.serving.request_timeout_seconds
    assert config["logging_config"]["encoding"].lower() == settings.logging.encoding


@pytest.mark.parametrize(
    ("deployment", "path"),
    [
        ("Generator", ("max_quued_requests",)),
        ("Generator", ("autoscaling_config", "upscale_delay")),
        ("Gateway", ("ray_actor_options", "num_gpu")),
        ("Weigher", ("backpressure_config", "retry_after")),
    ],
)
def test_a_slip_of_the_pen_is_found(deployment, path):
    config = laptop()
    place = said(config)[deployment]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 1
    assert any(path[-1] in fault or "not valid under any" in fault for fault in faults(config, STRICT))


def test_a_limit_that_is_not_the_settings_is_found():
    config = laptop()
    said(config)["Generator"]["autoscaling_config"]["max_replicas"] = 2
    assert disagreements(config) == ["Generator.autoscaling_config.max_replicas is 2, by the settings 1"]


def test_what_a_user_config_does_not_say_stays_as_the_settings_have_it():
    generator = object.__new__(Generator.func_or_class)
    generator._settings = load_settings(composing={"method": "cat", "density": 0.5, "majority_sign": "total"})
    generator.reconfigure({"method": "ties"})
    composing = generator._settings.composing
    assert (composing.method, composing.density, composing.majority_sign) == ("ties", 0.5, "total")


def test_the_configs_differ_in_where_they_run_alone():
    here, there = laptop(), kubernetes()
    for config in (here, there):
        application = config["applications"][0]
        del (
            config["proxy_location"],
            config["http_options"]["host"],
            config["logging_config"]["encoding"],
            application["args"],
        )
        for deployment in application["deployments"]:
            deployment.pop("ray_actor_options", None)
            deployment.get("logging_config", {}).pop("encoding", None)
            autoscaling = deployment.get("autoscaling_config", {})
            autoscaling.pop("max_replicas", None)
            autoscaling.pop("target_ongoing_requests", None)
        # They follow from the settings, which `disagreements` compares.
        for name in ("max_ongoing_requests", "max_surge_percent"):
            said(config)["Generator"].pop(name), said(config)["Gateway"].pop(name)
    assert here == there


def test_delays_draining_and_scaling_to_zero_are_settings():
    scaling = {"min_replicas": 0, "max_replicas": 3, "upscale_delay_seconds": 1, "downscale_delay_seconds": 2, "gpus": 0.5}
    settings = load_settings(serving={"request_timeout_seconds": 300, "generator": scaling, "weigher": {"drain_seconds": 7}})
    gateway = assemble(settings)._bound_deployment
    weigher, generator = (gateway.init_args[place]._bound_deployment for place in (2, 3))
    options = generator._deployment_config
    bounds = options.autoscaling_config
    assert (bounds.min_replicas, bounds.max_replicas, bounds.upscale_delay_s, bounds.downscale_delay_s) == (0, 3, 1, 2)
    assert (options.graceful_shutdown_timeout_s, options.max_surge_percent) == (300, 0), "no second GPU is asked for"
    assert weigher._deployment_config.graceful_shutdown_timeout_s == 7
    assert deepcopy(gateway._deployment_config).max_surge_percent == 100
