"""The Ray cluster that a job runs on."""

import logging
import os

import ray

from lorafleet.errors import LoRAFleetError
from lorafleet.network import bypass_proxies
from lorafleet.ray_token import auth_mode, make_token

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # Else Ray Data asks a Prometheus every ten seconds from a thread that never ends. Whatever such a thread lets go of
    # while the job leaves Ray ends the job with exit code 1, however well it went.
    "RAY_DATA_USAGE_DISABLED": "1",
}
"""What a job has unless somebody has set it otherwise."""


def connect(start: bool = True) -> None:
    """Join the cluster that runs here (or at RAY_ADDRESS), or start one on this machine for the length of the job.

    Args:
        start: False only joins one: what is to outlive this process needs a cluster that does.

    Raises:
        LoRAFleetError: there is no cluster, or none can be started.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    bypass_proxies()
    if ray.is_initialized():
        return
    if start and os.environ.get("RAY_ADDRESS", "local") == "local" and auth_mode() == "token":
        # A cluster that Ray starts here would write its token for all to read.
        make_token()
    try:
        address = None if start else os.environ.get("RAY_ADDRESS", "auto")
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError) as error:
        raise LoRAFleetError(
            f"cannot join the Ray cluster: {error}", "Check RAY_ADDRESS, or start one with 'lorafleet up'"
        ) from None


def cause_in_one_line(error: BaseException) -> str:
    """Summarise a failure of Ray's work in one line: the worker's own error, without the hints that Ray adds."""
    cause = cause_of(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if getattr(cause, "actor_init_failed", False) and lines:
        # Ray quotes the traceback of the actor's constructor.
        return lines[-1]
    if isinstance(cause, (LoRAFleetError, ray.exceptions.RayError)) and lines:
        return lines[0]
    return ": ".join([type(cause).__name__, *lines[:1]])


def cause_of(error: BaseException) -> BaseException:
    """The error that a Ray worker met, dug out of what Ray wraps around it."""
    seen: BaseException = error
    while True:
        inner = getattr(seen, "cause", None) or seen.__cause__
        if not isinstance(inner, BaseException) or inner is seen:
            return seen
        # What Ray raises for an error of ours is of both kinds, and its text is the worker's whole traceback.
        if isinstance(seen, LoRAFleetError) and not isinstance(seen, ray.exceptions.RayError):
            return seen
        seen = inner
