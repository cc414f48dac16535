"""Asking the endpoint of this machine over HTTP."""

from collections.abc import Mapping
from typing import Annotated, Any

import httpx
import typer

from lorafleet.config import Settings
from lorafleet.errors import LoRAFleetError
from lorafleet.network import in_url, takes_proxy

KeyOption = Annotated[
    str | None, typer.Option("--key", envvar="LORAFLEET_KEY", show_envvar=True, help="An API key, where there are keys.")
]


def endpoint_url(settings: Settings) -> str:
    """The URL of the endpoint, as a program on this machine reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(settings.serving.host, settings.serving.host)
    return f"http://{in_url(host)}:{settings.serving.port}"


def call_endpoint(
    settings: Settings, method: str, path: str, key: str | None = None, body: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """What the endpoint answers; None where nothing listens.

    Raises:
        LoRAFleetError: it refuses, does not answer in time, or is not LoRAFleet.
    """
    url = endpoint_url(settings)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = settings.serving.request_timeout_seconds + 10
    try:
        reply = httpx.request(
            method, f"{url}{path}", headers=headers, json=body, timeout=timeout, trust_env=takes_proxy(url)
        )
    except httpx.ConnectError:
        return None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LoRAFleetError(f"the endpoint at {url} does not answer: {error}") from None
    try:
        answer: dict[str, Any] = reply.json()
        refusal = answer["error"]["message"] if reply.is_error else None
    except (ValueError, KeyError, TypeError):
        raise LoRAFleetError(
            f"what listens at {url} is not LoRAFleet (status {reply.status_code})", "Set serving.port to the endpoint's"
        ) from None
    if refusal is not None:
        raise LoRAFleetError(f"the endpoint refuses: {refusal}")
    return answer
