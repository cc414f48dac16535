from ray.serve import Application

from lorafleet.config import load_settings
from serve.app import assemble


def test_serve_lets_through_whatever_the_engines_refuse_themselves() -> None:
    settings = load_settings(generation={"rows": 8, "waiting": 1000}, serving={"generator": {"max_replicas": 3}})
    gateway = assemble(settings)._bound_deployment
    bound = [argument._bound_deployment for argument in gateway.init_args if isinstance(argument, Application)]
    (generator,) = (deployment for deployment in bound if deployment.name == "Generator")
    assert generator.max_ongoing_requests > 1008
    assert gateway.max_ongoing_requests > 3 * 1008


def test_bounds_that_are_wide_enough_stay() -> None:
    settings = load_settings(generation={"rows": 8, "waiting": 0}, serving={"gateway": {"max_ongoing_requests": 777}})
    assert assemble(settings)._bound_deployment.max_ongoing_requests == 777
