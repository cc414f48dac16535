"""Tuning the real encoder on a few rows: what it does to vectors, to texts of other forms, and to the encoder's files."""

from pathlib import Path

import numpy as np
import pytest

from lorafleet.config import Tuning, load_settings
from lorafleet.errors import TrainingError
from lorafleet.retrieval import Encoder
from lorafleet.retrieval.tuning import Rows, steps_of, tuned_encoder, whitening
from lorafleet.tasks import FORMS, load_catalogue, load_corpus, texts_in_forms

TASKS = ("commonsense_qa", "copa", "sst2", "wnli")


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Rows of four tasks of the sample pack, in all forms."""
    settings = load_settings().tasks
    catalogue = load_catalogue(settings)
    return {
        name: [
            texts_in_forms(catalogue[name], example, FORMS)
            for example in load_corpus(catalogue[name], "train", settings).examples[:24]
        ]
        for name in TASKS
    }


def tune(rows: Rows, folder: Path, **tuning) -> tuple[list[str], Encoder]:
    """Tune on all but the last eight rows of every task, save, and load it as the settings name it."""
    known = {task: of_task[:-8] for task, of_task in rows.items()}
    chosen = Tuning(**tuning)
    steps = tuned_encoder(load_settings().models, chosen, known, 32)
    notes = []
    while True:
        try:
            notes.append(next(steps))
        except StopIteration as end:
            end.value.save(str(folder), create_model_card=False)
            break
    assert len(notes) == steps_of(chosen, known)
    return notes, Encoder(load_settings(models={"encoder": str(folder)}).models)


def found(encoder: Encoder, rows: Rows) -> float:
    """How often the nearest row of an unknown bare text, among known rows with their instructions, is of its task."""
    known = [(task, texts[0]) for task, of_task in rows.items() for texts in of_task[:-8]]
    asked = [(task, texts[-1]) for task, of_task in rows.items() for texts in of_task[-8:]]
    similarities = encoder.encode([text for _, text in asked], 32) @ encoder.encode([text for _, text in known], 32).T
    nearest = similarities.argmax(axis=1)
    return float(np.mean([known[place][0] == task for place, (task, _) in zip(nearest, asked, strict=True)]))


def test_whitened_vectors_vary_alike_in_all_directions_within_the_tasks_and_their_means_have_the_mean_0():
    draws = np.random.default_rng(0)
    mixing = draws.normal(size=(6, 6))
    tasks = [(draws.normal(size=(count, 6)) @ mixing + shift).astype(np.float32) for count, shift in ((400, 3), (90, -1))]
    weight, bias = whitening(tasks, 1e-6)
    mapped = [vectors @ weight.T + bias for vectors in tasks]
    within = np.mean([np.cov(vectors.T, bias=True) for vectors in mapped], axis=0)
    np.testing.assert_allclose(within, np.eye(6), atol=1e-2)
    np.testing.assert_allclose(np.mean([vectors.mean(axis=0) for vectors in mapped], axis=0), 0, atol=1e-3)
    plain, _ = whitening(tasks, 1.0)
    np.testing.assert_allclose(plain, plain[0, 0] * np.eye(6), atol=1e-6)


def test_a_whitened_encoder_finds_the_task_of_more_bare_texts_and_is_written_whole(rows, tmp_path):
    plain = Encoder(load_settings().models)
    notes, tuned = tune(rows, tmp_path / "tuned", recipe="whiten", shrinkage=0.1)
    assert notes == list(rows)
    assert tuned.fingerprint != plain.fingerprint
    assert tuned.dimensions == plain.dimensions
    assert found(tuned, rows) > found(plain, rows)


def test_an_encoder_tuned_by_contrast_has_other_weights_and_tells_rows_apart(rows, tmp_path):
    plain = Encoder(load_settings().models)
    notes, tuned = tune(rows, tmp_path / "tuned", recipe="contrast", steps=12, max_tokens=32)
    losses = [float(note.removeprefix("loss ")) for note in notes]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert tuned.fingerprint != plain.fingerprint
    assert found(tuned, rows) >= found(plain, rows)


def test_one_task_or_one_row_is_refused(rows):
    for few in ({"copa": rows["copa"]}, {"copa": rows["copa"], "sst2": rows["sst2"][:1]}):
        with pytest.raises(TrainingError, match="cannot be tuned on"):
            next(tuned_encoder(load_settings().models, Tuning(), few, 32))
