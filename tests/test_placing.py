"""Where the tasks of a real index lie, and the fleet whose weigher asks for that."""

from collections.abc import Iterator

import numpy as np
import pytest
from small_fleet import ROWS, fill, free_port, small_settings

from lorafleet.config import Settings
from lorafleet.errors import IndexMismatch, SettingsError
from lorafleet.fleet import Fleet
from lorafleet.placing import FILE, places_of
from lorafleet.retrieval import Encoder, Entry, open_for_writing, open_index, row_identifiers, server
from lorafleet.tasks import prompt_version
from lorafleet.weighing import BY_PLACE, Router

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A small fleet in a folder, with its Chroma server."""
    settings = small_settings(tmp_path_factory.mktemp("placing"), free_port())
    server.start(settings)
    fill(settings)
    yield settings
    server.stop(settings)


def test_places_are_learned_once_for_each_state_of_the_index(settings, monkeypatch):
    index = open_index(settings, prompt_version())
    encoder = Encoder(settings.models)
    places = places_of(index, settings.state)
    assert isinstance(places.router, Router)
    for task, vector in zip(places.prototypes.tasks, places.prototypes.vectors, strict=True):
        np.testing.assert_allclose(vector, encoder.encode(ROWS[task], 8).mean(axis=0), atol=1e-5)
    assert places_of(index, settings.state, places) is places
    with monkeypatch.context() as patched:
        patched.setattr("lorafleet.placing.learn_places", lambda rows, name: pytest.fail("they are kept"))
        assert places_of(index, settings.state).index == places.index

    texts = ["Whales sing in the sea."]
    entries = [Entry(name, "seas", text) for name, text in zip(row_identifiers("seas", texts), texts, strict=True)]
    writer = open_for_writing(settings, prompt_version())
    writer.write(entries, encoder.encode(texts, 8))
    grown = places_of(index, settings.state, places)
    assert grown.prototypes.tasks == ("cooking", "seas", "weather")
    assert grown.index != places.index
    writer.delete_task("seas")
    (settings.state / FILE).unlink()
    # A folder in its place is one that cannot be written to.
    (settings.state / FILE).mkdir()
    assert places_of(index, settings.state, grown).prototypes.tasks == ("cooking", "weather")
    (settings.state / FILE).rmdir()


@pytest.mark.parametrize("weigher", BY_PLACE)
def test_a_fleet_weighs_by_where_a_query_lies(settings, weigher):
    weighing = settings.weighing.model_copy(update={"weigher": weigher, "k": 2, "penalty": 0.0})
    fleet = Fleet(settings.model_copy(update={"weighing": weighing}))
    for task, query in (("weather", "Is there snow in January?"), ("cooking", "Fry the onions in butter.")):
        ((neighbours, weights),) = fleet.look_up([query])
        assert next(iter(weights)) == task
        assert sum(weights.values()) == pytest.approx(1)
        assert len(neighbours) == sum(map(len, ROWS.values()))
        assert fleet.route(query) == weights
        with pytest.raises(SettingsError, match=f"'{weigher}'.*look_up"):
            fleet.weigh(neighbours)


def test_an_index_without_rows_has_no_places(settings):
    index = open_index(settings, prompt_version())
    for task in ROWS:
        index.delete_task(task)
    with pytest.raises(IndexMismatch, match="empty"):
        places_of(index, settings.state)
