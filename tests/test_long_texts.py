"""A long text is read at its ends alone, and its tokens there are those of the whole text."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from long_writings import ARTICLE, counting, writing
from tiny_language_model import tiny_tokenizer

from lorafleet.config import Models
from lorafleet.long_texts import SPARE_TOKENS, beginning, read_ends
from lorafleet.models import load_tokenizer
from lorafleet.prompts import cut_middle, encode_prompt

SMOLLM2 = counting(load_tokenizer(Models()))


@pytest.mark.parametrize("script", ARTICLE)
def test_the_ends_of_a_long_text_have_the_tokens_of_the_whole(script):
    for seed, limit in enumerate((1, 24, 333, 2048)):
        text = writing(script, 45 * (limit + 2 * SPARE_TOKENS), seed)
        whole = encode_prompt(SMOLLM2, text, sys.maxsize)
        SMOLLM2.read.clear()
        assert encode_prompt(SMOLLM2, text, limit) == cut_middle(whole, limit)
        assert max(length for length, _ in SMOLLM2.read) < len(text) / 4, "its middle is not read"


pieces = st.one_of(
    st.tuples(
        st.sampled_from([" ", "\n", "x", "中", "=", "the ", "a, ", "\x01", "<|im_end|>", "ab1 "]), st.integers(1, 600)
    ),
    st.tuples(st.text(max_size=9), st.integers(1, 40)),
)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(pieces, max_size=8), limit=st.integers(1, 90))
def test_any_text_is_cut_as_if_it_were_read_whole(parts, limit):
    """By a tokenizer whose tokens are bytes, wherever the cuts are."""
    tokenizer = tiny_tokenizer()
    text = "".join(part * count for part, count in parts)
    assert encode_prompt(tokenizer, text, limit) == cut_middle(encode_prompt(tokenizer, text, sys.maxsize), limit)


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6, "你好世界" * 250_000, writing("english", 10**6), "=" * 10**6])
def test_a_megabyte_costs_what_a_prompt_that_fits_costs(text):
    SMOLLM2.read.clear()
    assert len(encode_prompt(SMOLLM2, text, 2048)) == 2048
    assert sum(length for length, _ in SMOLLM2.read) < 500_000


def test_texts_that_give_few_tokens_are_read_as_far_as_they_need():
    """As by a normalizer that leaves things out."""
    words = str.split

    def encode(text: str) -> list[int]:
        return [len(word) for word in words(text)]

    sparse = " ".join(f"{'x' * (number % 7 + 1)}{' ' * 900}" for number in range(1000))
    tokens, whole = read_ends(encode, sparse, 5, 7)
    assert not whole and (tokens[:5], tokens[-7:]) == (encode(sparse)[:5], encode(sparse)[-7:])
    assert read_ends(encode, " " * 10**6 + "x", 5, 7) == ([1], True)
    part = beginning(encode, sparse, 20)
    assert encode(part)[:20] == encode(sparse)[:20] and len(part) < len(sparse)
    assert beginning(encode, "x" * 10**6, 20) == "x" * 10**6
