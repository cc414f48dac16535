"""The keys of alpha_pattern: what is taken matches as in PEFT, and no key takes exponential time."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorafleet.composition.patterns import MOST_PATTERNS, PatternError, Patterns

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 12)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.experts.7.down_proj")
]
characters = st.sampled_from(["q", "_", ".", r"\.", r"\d", r"\w", "[0-9]", "[^.]", "[a-kq]", "mlp", "layers"])
pieces = st.builds(
    "".join, st.tuples(characters, st.sampled_from(["", "", "", "*", "+", "?", "{1}", "{2,}", "{0,3}", "*?"]))
)
sequences = st.lists(pieces, min_size=1, max_size=4).map("".join)
groups = st.lists(sequences, min_size=1, max_size=3).map("|".join)
grouped = st.builds("".join, st.tuples(st.sampled_from(["(", "(?:"]), groups, st.sampled_from([")", ")?"])))
keys = st.lists(st.one_of(sequences, grouped, st.sampled_from(["^", "$", "|", "proj"])), min_size=1, max_size=4).map("".join)


@given(st.lists(keys, min_size=1, max_size=3, unique=True), st.sampled_from(NAMES))
@example(["self_attn.q_proj", "q_proj"], NAMES[0])
@example(["q", "^model.layers.0.self_attn.q_proj", "q_proj"], NAMES[0])
@example(["^layers.0.self_attn.q_proj"], NAMES[0])
@example([r".*layers\.\d+\.(self_attn|mlp)\.(q|gate)_proj"], NAMES[6])
@example([r"model.layers.1[0-9]?.*|x"], NAMES[8])
def test_keys_match_as_in_peft(found, name):
    key = get_pattern_key(found, name)
    assert Patterns(found).key_for(name) == (key if key in found else None)


@pytest.mark.parametrize(
    "key",
    [
        "(?=a)a",
        "(?<!a)b",
        r"(a)\1",
        "(?>a)",
        "a*+",
        "a**",
        "q_proj(",
        "q)",
        "[z-a]",
        "*",
        "(" * 200,
        ".*" + "a" * 300,
        r"(\w{0,900}){9}",
    ],
)
def test_other_keys_are_refused(key):
    with pytest.raises(PatternError):
        Patterns(["q_proj", key])


@pytest.mark.parametrize("key", ["(.+)+!", "(a|a)*b", "(a?){60}a{60}b", ".*" * 8 + "x", r"(\w*)*\d"])
def test_keys_that_take_exponential_time_elsewhere_come_to_an_end(key):
    """By `re` the first would take longer than the world has."""
    assert Patterns([key]).key_for("a" * 10_000) is None


def test_plain_names_of_all_modules_are_looked_up():
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2000)]
    patterns = Patterns(names)
    assert [patterns.key_for(name) for name in names] == names
    assert patterns.key_for("model.layers.0.self_attn.k_proj") is None


def test_too_many_keys_are_refused():
    Patterns([f"q{number}" for number in range(10 * MOST_PATTERNS)])
    with pytest.raises(PatternError, match=f"{MOST_PATTERNS + 1} keys with regular expressions"):
        Patterns([f"q{number}.*" for number in range(MOST_PATTERNS + 1)])
