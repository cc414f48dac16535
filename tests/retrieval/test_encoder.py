import numpy as np

from lorafleet.config import load_settings
from lorafleet.models import load_encoder
from lorafleet.retrieval import Encoder


def test_vectors_are_unit_length_in_the_order_of_the_texts_and_do_not_depend_on_the_batch():
    encoder = Encoder(load_settings().models)
    texts = ["A ball.", "The plan of the house is drawn before the first stone is laid. " * 8, "Tennis", "the cat sat"]

    together = encoder.encode(texts, batch=4)
    alone = np.concatenate([encoder.encode([text], batch=1) for text in texts])

    plain = load_encoder(load_settings().models).encode(texts, normalize_embeddings=True)

    np.testing.assert_allclose(together, plain, atol=1e-5)
    assert together.dtype == np.float32
    assert together.shape == (4, encoder.dimensions)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert encoder.encode([], batch=4).shape == (0, encoder.dimensions)
