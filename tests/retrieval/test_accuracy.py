"""Retrieval finds a row's own task, on real rows (a part of them: the figures over all rows are in the README)."""

import os
from pathlib import Path

import numpy as np
import pytest

from lorafleet.config import load_settings
from lorafleet.retrieval import Encoder, Entry, open_for_writing, row_identifiers
from lorafleet.tasks import load_catalogue, load_corpus, prompt_version
from lorafleet.weighing import task_shares

HUB_ROOT = os.environ.get("HUB_ROOT")


@pytest.mark.integration
@pytest.mark.skipif(not HUB_ROOT, reason="needs real rows: HUB_ROOT")
def test_the_own_task_is_found(every_core, index_settings):
    settings = index_settings()
    rows = load_settings(tasks={"hub_root": Path(str(HUB_ROOT)), "rows_per_task": 64}).tasks
    few = rows.model_copy(update={"rows_per_task": 15})
    catalogue, encoder = load_catalogue(rows), Encoder(settings.models)
    from lorafleet.retrieval import server

    server.start(settings)
    try:
        index = open_for_writing(settings, prompt_version())
        for task in catalogue.trained:
            keys = [example.key for example in load_corpus(task, "train", rows).examples]
            entries = [Entry(i, task.name, key) for i, key in zip(row_identifiers(task.name, keys), keys, strict=True)]
            index.write(entries, encoder.encode(keys, 32))
        found = []
        for task in catalogue.trained:
            queries = [example.key for example in load_corpus(task, "evaluation", few).examples]
            ranked = [list(task_shares(n)) for n in index.query(encoder.encode(queries, 32), 100)]
            found.append([np.mean([task.name in tasks[:k] for tasks in ranked]) for k in (1, 3)])
        first, among_three = 100 * np.mean(found, axis=0)
        assert first >= 85
        assert among_three >= 95
    finally:
        server.stop(settings)
