"""The endpoint held against its own OpenAPI document: requests that fit it, and such that nearly do."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.gateway import api

pytestmark = pytest.mark.integration

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 30
# The protocol is on trial here, and not how long the model can go on.
MOST_TOKENS, MOST_CHOICES = 2, 2
TIMEOUT = "X-Request-Timeout"


schema = schemathesis.openapi.from_dict(api.openapi())
# Methods that a path does not have are answered with 405, of which no document speaks.
schema.config.phases.coverage.unexpected_methods = set()


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_document_foresees(case, fleet):
    if isinstance(case.body, dict) and case.path.endswith("/completions"):
        case.body.setdefault("max_tokens", MOST_TOKENS)
        for field, most in {"max_tokens": MOST_TOKENS, "max_completion_tokens": MOST_TOKENS, "n": MOST_CHOICES}.items():
            value = case.body.get(field)
            if isinstance(value, int) and value > most:
                case.body[field] = most
    if a_deadline(case.headers.get(TIMEOUT)):
        # Whoever gives no time gets 504, and rightly so.
        case.headers[TIMEOUT] = "60"
    case.call_and_validate(base_url=fleet[0], checks=CHECKS, timeout=120)


def a_deadline(seconds: object) -> bool:
    """Whether a request's own deadline is one that the endpoint takes."""
    try:
        return 0 < float(str(seconds)) < float("inf")
    except ValueError:
        return False
