import numpy as np
import pytest

from lorafleet.config import load_settings
from lorafleet.models import load_encoder
from lorafleet.retrieval import Encoder

TEXTS = ["A ball.", "The plan of the house is drawn before the first stone is laid. " * 8, "Tennis", "the cat sat"]


@pytest.mark.parametrize(("dtype", "tolerance", "least_cosine"), [("float32", 1e-4, 0.9999999), ("bfloat16", 4e-3, 0.9998)])
def test_vectors_are_unit_length_in_the_order_of_the_texts_and_do_not_depend_on_the_batch(dtype, tolerance, least_cosine):
    models = load_settings(overrides=[f"models.encoder_dtype={dtype}"]).models
    encoder = Encoder(models)

    together = encoder.encode(TEXTS, batch=4)
    alone = np.concatenate([encoder.encode([text], batch=1) for text in TEXTS])
    plain = load_encoder(models).encode(TEXTS, normalize_embeddings=True)

    assert together.dtype == np.float32
    assert together.shape == (4, encoder.dimensions)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(together, alone, atol=tolerance)
    assert (together * plain).sum(axis=1).min() > least_cosine
    assert encoder.encode([], batch=4).shape == (0, encoder.dimensions)


def test_a_row_of_several_texts_has_the_mean_of_their_vectors():
    encoder = Encoder(load_settings(overrides=["models.encoder_dtype=float32"]).models)
    rows = [("Name the animal. A fox", "A fox"), ("Name the animal. An owl in the barn", "An owl in the barn")]
    embedded = encoder.encode_rows(rows, batch=4)
    sums = np.stack([encoder.encode(row, batch=2).sum(axis=0) for row in rows])
    np.testing.assert_allclose(embedded, sums / np.linalg.norm(sums, axis=1, keepdims=True), atol=1e-5)
    alone = encoder.encode_rows([(text,) for text in TEXTS], batch=4)
    np.testing.assert_array_equal(alone, encoder.encode(TEXTS, batch=4))


def test_an_encoder_that_puts_a_prompt_before_every_text_is_asked_so(tmp_path):
    models = load_settings(overrides=["models.encoder_dtype=float32"]).models
    prompted = load_encoder(models)
    prompted.prompts, prompted.default_prompt_name = {"question": "Somebody asks: "}, "question"
    prompted.save(str(tmp_path / "encoder"))
    encoder = Encoder(models.model_copy(update={"encoder": str(tmp_path / "encoder")}))
    found = encoder.encode(TEXTS, batch=2)
    np.testing.assert_allclose(found, prompted.encode(TEXTS, normalize_embeddings=True), atol=1e-4)
    assert (found * Encoder(models).encode(TEXTS, batch=2)).sum(axis=1).max() < 0.99
