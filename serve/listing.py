"""The adapters of the pool, as /v1/adapters says them."""

from collections.abc import Mapping
from dataclasses import asdict

from lorafleet.adapters import AdapterShape, StoredAdapter, adapter_shape
from lorafleet.errors import AdapterError
from serve.follower import Published
from serve.protocol.responses import AdapterList, AdapterState, ListedAdapter

UNREADABLE = AdapterShape(0, 0.0, (), "")


def listed(published: Published, left_out: Mapping[str, str]) -> AdapterList:
    """Every adapter of the pool, also one that comes in or goes.

    Args:
        left_out: those that a generator cannot load, by task, with the reason.
    """
    shown = {adapter.name for adapter in published.shown.adapters.values()}
    adapters = {adapter.name: adapter for adapter in published.loaded.adapters.values()}

    def state(adapter: StoredAdapter) -> AdapterState:
        if adapter.name in published.removing:
            return "removing"
        return "loading" if adapter.name not in shown else "failed" if adapter.task in left_out else "ready"

    return AdapterList(
        data=[listed_adapter(adapter, state(adapter), left_out.get(adapter.task)) for _, adapter in sorted(adapters.items())]
    )


def listed_adapter(adapter: StoredAdapter, state: AdapterState = "ready", error: str | None = None) -> ListedAdapter:
    """One of them; a folder that has gone meanwhile is told without what its files would say."""
    try:
        shape = adapter_shape(adapter)
    except AdapterError:
        shape = UNREADABLE
    return ListedAdapter(
        name=adapter.name,
        task=adapter.task,
        family=adapter.family,
        rank=shape.rank,
        alpha=shape.alpha,
        modules=list(shape.modules),
        rows=adapter.rows,
        base=shape.base,
        created=adapter.created,
        origin=adapter.origin,
        state=state,
        error=error,
        card=asdict(adapter.card) if adapter.card else None,
    )
