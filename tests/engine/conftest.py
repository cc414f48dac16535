"""Engines on tiny models, which are closed behind a test and must have given everything back."""

from collections.abc import Callable, Iterable, Iterator

import pytest
from engine.families import NEVER, build
from tiny_language_model import tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafleet.composition import Adapter
from lorafleet.engine import Engine


def holds_nothing(engine: Engine) -> bool:
    """Whether no row, no slot of the cache and no page of an adapter is taken."""
    free = len(engine._cache._free) == engine._cache._slots
    users = sum(resident.users for resident in engine.pool._resident.values())
    taken = sum(len(resident.pages) for resident in engine.pool._resident.values())
    return free and not engine.running and not users and engine.pool.pages.free + taken == engine.pool.pages.count


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Make an engine with adapters in its pool, on a tiny Llama that never ends an answer, or on another model."""
    engines = []

    def make(
        model: PreTrainedModel | None = None,
        adapters: Iterable[Adapter] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings,
    ) -> Engine:
        engine = Engine(model or build("llama", eos_token_id=NEVER), tokenizer or tiny_tokenizer(), **settings)
        for adapter in adapters:
            engine.pool.add(adapter)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
        assert holds_nothing(engine)
