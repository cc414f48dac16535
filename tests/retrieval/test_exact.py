"""The exact index against distances computed one by one."""

import numpy as np
import pytest

from lorafleet.retrieval import ExactIndex


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_finds_what_comparing_one_by_one_finds():
    draws = np.random.default_rng(0)
    rows = {task: unit(draws.normal(size=(count, 8))) for task, count in (("a", 40), ("b", 7), ("c", 13))}
    texts = {task: [f"{task}{number}" for number in range(len(vectors))] for task, vectors in rows.items()}
    queries = unit(draws.normal(size=(300, 8)))
    index = ExactIndex(texts, rows)
    assert index.counts() == {"a": 40, "b": 7, "c": 13}
    for allowed, asked in (("abc", {}), ("bc", {"without": "a"}), ("ab", {"tasks": ["a", "b"]}), ("b", {"tasks": ["b"]})):
        everything = [(task, text, vector) for task in allowed for text, vector in zip(texts[task], rows[task], strict=True)]
        found = index.query(queries, 10, **asked)
        for query, near in zip(queries, found, strict=True):
            wanted = sorted(everything, key=lambda row, query=query: -float(row[2] @ query))[:10]
            assert [(one.task, one.text) for one in near] == [row[:2] for row in wanted]
            assert [one.similarity for one in near] == pytest.approx([float(row[2] @ query) for row in wanted], abs=1e-6)


def test_texts_and_embeddings_have_to_match():
    with pytest.raises(ValueError, match="2 rows with 1 embeddings"):
        ExactIndex({"a": ["x", "y"]}, {"a": unit(np.ones((1, 4)))})
