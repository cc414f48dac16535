"""How the deployments log: Serve's own lines and the house's, each with request id, application, deployment and replica.

Serve hands the id of a request from deployment to deployment, so that one id finds everything that became of it.
"""

import logging

from ray.serve.schema import LoggingConfig

from lorafleet.config import Logging

SERVE = "ray.serve"
HOUSE = "lorafleet"


def logging_config(settings: Logging, access: bool = True) -> LoggingConfig:
    """What Serve makes of the settings.

    Args:
        access: False for a deployment that is asked every few seconds, and whose lines nobody would read.
    """
    return LoggingConfig(
        encoding=settings.encoding.upper(), log_level=settings.level, enable_access_log=settings.access and access
    )


def log_through_serve() -> None:
    """Have the library, which knows nothing of Serve, log where the deployment of this process does."""
    house = logging.getLogger(HOUSE)
    if not any(isinstance(handler, _ThroughServe) for handler in house.handlers):
        house.addHandler(_ThroughServe())


class _ThroughServe(logging.Handler):
    """Hands records on: Serve replaces its own handlers when its settings change."""

    def emit(self, record: logging.LogRecord) -> None:
        serve = logging.getLogger(SERVE)
        if serve.isEnabledFor(record.levelno):
            serve.handle(record)
