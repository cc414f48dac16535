"""The adapters of the pool, as /v1/adapters says them."""

from dataclasses import asdict

from lorafleet.adapters import AdapterShape, StoredAdapter, adapter_shape
from lorafleet.errors import AdapterError
from serve.follower import Published
from serve.protocol import AdapterList, AdapterState, ListedAdapter

UNREADABLE = AdapterShape(0, 0.0, (), "")


def listed(published: Published) -> AdapterList:
    """Every adapter of the pool, also one that comes in or goes."""
    shown = {adapter.name for adapter in published.shown.adapters.values()}
    adapters = {adapter.name: adapter for adapter in published.loaded.adapters.values()}

    def state(name: str) -> AdapterState:
        return "removing" if name in published.removing else "ready" if name in shown else "loading"

    return AdapterList(data=[listed_adapter(adapter, state(name)) for name, adapter in sorted(adapters.items())])


def listed_adapter(adapter: StoredAdapter, state: AdapterState = "ready") -> ListedAdapter:
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
        card=asdict(adapter.card) if adapter.card else None,
    )
