import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from long_writings import ARTICLE, counting, writing
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from lorafleet.config import load_settings
from lorafleet.errors import ModelError
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


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load_settings(overrides=["models.encoder_dtype=float32"]).models)


def read_ids(encoder, text):
    return encoder._model.preprocess([text])["input_ids"].tolist()


pieces = st.one_of(
    st.tuples(
        st.sampled_from([" ", "\n", "x", "xy", "中", "!", "the ", "\x01", "\u0301", "\u3000", "\ufffd", "[SEP]", "ß ", "İ"]),
        st.integers(1, 5000),
    ),
    st.tuples(st.text(max_size=9), st.integers(1, 900)),
    st.tuples(st.sampled_from([writing(script, 3000) for script in ARTICLE]), st.integers(1, 3)),
)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(pieces, min_size=1, max_size=8))
def test_what_is_left_out_of_a_long_text_is_what_the_encoder_would_not_read(encoder, parts):
    text = "".join(part * count for part, count in parts)
    assert read_ids(encoder, encoder._needed(text)) == read_ids(encoder, text)


@pytest.mark.parametrize("text", [*(writing(script, 10**5) for script in ARTICLE), "x! " * 10**5, "!" * 10**6])
def test_a_long_text_has_its_vector_and_is_read_no_further_than_it_counts(encoder, text, monkeypatch):
    wanted = encoder.encode([text, "beside it"], batch=1)
    plain = load_encoder(load_settings().models).encode([text, "beside it"], normalize_embeddings=True)
    np.testing.assert_allclose(wanted, plain, atol=1e-4)

    fresh = Encoder(load_settings(overrides=["models.encoder_dtype=float32"]).models)
    counted, told = counting(fresh._tokenizer), []
    preprocess = fresh._model.preprocess
    monkeypatch.setattr(
        fresh._model, "preprocess", lambda texts, **how: told.extend(map(len, texts)) or preprocess(texts, **how)
    )
    np.testing.assert_array_equal(fresh.encode([text, "beside it"], batch=1), wanted)
    assert sum(told) + sum(length for length, _ in counted.read) < 30_000


@pytest.mark.parametrize(("weight", "length"), [(0.0, "0"), (float("nan"), "nan"), (1e38, "inf")])
def test_a_text_without_a_direction_is_refused(tmp_path, weight, length):
    models = load_settings(overrides=["models.encoder_dtype=float32"]).models
    plain = load_encoder(models)
    width = plain.get_embedding_dimension()
    dense = Dense(width, width, bias=False, activation_function=None, init_weight=torch.full((width, width), weight))
    SentenceTransformer(modules=[*list(plain)[:2], dense], device="cpu").save(str(tmp_path / "encoder"))
    encoder = Encoder(models.model_copy(update={"encoder": str(tmp_path / "encoder")}))
    for embed in (
        lambda: encoder.encode(["A ball.", "Tennis"], 2),
        lambda: encoder.encode_rows([("A ball.",), ("Tennis",)], 2),
    ):
        with pytest.raises(
            ModelError,
            match=rf"no vector for 2 of 2 texts: that of the text of index 0 has length {length}\. .*encoder_dtype",
        ):
            embed()
