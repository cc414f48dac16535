"""The soak on a tiny model: hundreds of requests of every kind while adapters come, change and go."""

from benchmarks import soak as soaking
from benchmarks.soak import ALLOWED_GROWTH, soak, still_held, tiny_model, tiny_tokenizer
from lorafleet.composition import AdapterPool, Composition
from lorafleet.engine import Engine, GenerationRequest
from lorafleet.engine.slotted_cache import NOWHERE, SlottedCache


def test_a_soak_finds_no_difference_no_growth_and_nothing_held():
    report = soak(tiny_model, tiny_tokenizer(), requests=500)
    assert report.differences == []
    assert report.growth <= ALLOWED_GROWTH
    assert report.held == {"rows": 0, "slots": 0, "pages": 0}
    assert report.counts.total() == 500
    assert report.counts["answered"] > 300 and report.counts["cancelled"] > 20 and report.counts["refused"] > 20


def test_a_soak_finds_adapters_that_change_under_a_row(monkeypatch):
    """A pool that takes the newest adapter of a name, whatever a request saw."""
    lease = AdapterPool.lease

    def careless(self, recipe, wait=True):
        there = all(name in self for name in recipe.composition.weights)
        return lease(self, self.recipe(recipe.composition) if there else recipe, wait)

    monkeypatch.setattr(AdapterPool, "lease", careless)
    report = soak(tiny_model, tiny_tokenizer(), requests=80)
    assert report.differences and not report.fine


def test_a_soak_finds_rows_that_read_each_others_keys(monkeypatch):
    monkeypatch.setattr(SlottedCache, "reserve", lambda self, tokens, passing=False: NOWHERE if passing else 0)
    monkeypatch.setattr(SlottedCache, "release", lambda self, room: None)
    report = soak(tiny_model, tiny_tokenizer(), requests=40)
    assert report.differences and not report.fine


def test_a_soak_finds_pages_and_slots_that_are_not_given_back(monkeypatch):
    engine = Engine(tiny_model(), tiny_tokenizer(), rows=soaking.ROWS, longest=soaking.LONGEST)
    for name in soaking.NAMES[:2]:
        engine.pool.add(soaking.random_adapter(tiny_model(), name, 0, 16))
    asked = GenerationRequest("a", Composition("cat", dict.fromkeys(soaking.NAMES[:2], 1.0)), max_tokens=2)
    engine.generate([asked])
    monkeypatch.setattr(engine.pool, "release", lambda lease: None)
    engine.generate([asked])
    monkeypatch.undo()
    monkeypatch.setattr(engine._cache, "release", lambda room: None)
    engine.generate([GenerationRequest("a", max_tokens=2)])
    monkeypatch.undo()
    monkeypatch.setattr(soaking, "PATIENCE", 3)
    assert still_held(engine) == {"rows": 0, "slots": 1, "pages": 2}
    engine.close()
