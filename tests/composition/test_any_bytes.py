"""Whatever lies in an adapter's folder: it is read, or refused with one AdapterError."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lorafleet.composition import Adapter, LowRank, check_number_format, load_adapter
from lorafleet.composition.files import CONFIG_BYTES, CONFIG_FILE, HEADER_BYTES, WEIGHTS_FILE
from lorafleet.composition.peft_format import LONGEST_NAME
from lorafleet.errors import AdapterError

import torch  # isort: skip

KEY = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
CONFIG = {"peft_type": "LORA", "lora_alpha": 8, "alpha_pattern": {"q_proj": 4}, "use_rslora": False}
WEIGHTS = save({KEY.format("A"): torch.ones(2, 4), KEY.format("B"): torch.ones(3, 2)})
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

numbers = st.one_of(st.floats(), st.integers(), st.just(10**400), st.booleans(), st.none())
values = st.recursive(
    st.one_of(numbers, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
fields = st.sampled_from([*CONFIG, "bias", "rank_pattern", "init_lora_weights", "use_dora", "base_model_name_or_path", "r"])
keys = st.one_of(st.sampled_from(["q_proj", "(.+)+!", "q_proj(", "^.*q_proj$", ""]), st.text(max_size=8))
patterns = st.dictionaries(keys, st.one_of(numbers, st.just(4)), max_size=3)
configs = st.dictionaries(fields, st.one_of(values, patterns), max_size=4).map(
    lambda changed: json.dumps(CONFIG | changed).encode()
)
formats = st.sampled_from(["F16", "BF16", "F32", "F64", "F8_E4M3", "F6_E2M3", "F4", "I8", "BOOL", "C64", "X"])
sizes = st.one_of(st.integers(0, 4), st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, -1]))
offsets = st.one_of(st.sampled_from([0, 16, 32, 56]), st.integers(-1, 2**64))
tensors = st.fixed_dictionaries(
    {"dtype": formats, "shape": st.lists(sizes, max_size=3), "data_offsets": st.lists(offsets, min_size=1, max_size=3)}
)
names = st.one_of(st.sampled_from([KEY.format("A"), KEY.format("B"), "lora_A.weight", "x.lora_A.default.weight"]), st.text())
headers = st.dictionaries(names, st.one_of(tensors, values), max_size=3).map(lambda header: json.dumps(header).encode())


def with_header(header: bytes, rest: bytes = bytes(56)) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def cut_and_changed(whole: bytes) -> st.SearchStrategy[bytes]:
    places = st.integers(0, len(whole) - 1)
    changes = st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)

    def change(changes: list[tuple[int, int]], end: int) -> bytes:
        changed = bytearray(whole)
        for place, byte in changes:
            changed[place] = byte
        return bytes(changed[: end + 1])

    return st.builds(change, changes, st.one_of(places, st.just(len(whole))))


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Adapter | None]:
    def read(config: bytes = json.dumps(CONFIG).encode(), weights: bytes = WEIGHTS) -> Adapter | None:
        (tmp_path / CONFIG_FILE).write_bytes(config)
        (tmp_path / WEIGHTS_FILE).write_bytes(weights)
        try:
            adapter = load_adapter(tmp_path, "odd")
            check_number_format(adapter, torch.float16)
        except AdapterError as error:
            message = str(error)
            assert message.startswith("adapter odd") and message.isprintable() and len(message) < 2 * LONGEST_NAME + 500
            return None
        return adapter

    return read


@many
@given(st.one_of(st.binary(), configs, cut_and_changed(json.dumps(CONFIG).encode())))
@example(b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}")
@example(json.dumps(CONFIG | {"lora_alpha": 10**400}).encode())
@example(json.dumps(CONFIG).replace("8", "8" * 5000).encode())
@example(json.dumps(CONFIG | {"lora_alpha": 1e308}).encode())
@example(json.dumps(CONFIG | {"lora_alpha": True}).encode())
@example(json.dumps(CONFIG | {"alpha_pattern": [["q_proj", 4]]}).encode())
@example(json.dumps(CONFIG | {"alpha_pattern": {"q_proj(": 4}}).encode())
@example(json.dumps(CONFIG | {"base_model_name_or_path": "\ud800"}).encode())
def test_any_configuration_is_read_or_refused(read, config):
    adapter = read(config=config)
    assert adapter is None or 0 < adapter.layers["model.layers.0.q_proj"].scale < 1e9


@many
@given(st.one_of(st.binary(), st.binary().map(with_header), headers.map(with_header), cut_and_changed(WEIGHTS)))
@example(
    with_header(json.dumps({KEY.format("A"): {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}).encode(), b"")
)
@example(with_header(json.dumps({"é\n.lora_A.weight": {"dtype": "F32", "shape": [14], "data_offsets": [0, 56]}}).encode()))
@example(
    with_header(json.dumps({"x" * 9999: {"dtype": "F32", "shape": [1] * 9999 + [14], "data_offsets": [0, 56]}}).encode())
)
def test_any_weights_are_read_or_refused(read, weights):
    adapter = read(weights=weights)
    assert adapter is None or all(isinstance(layer, LowRank) and layer.rank for layer in adapter.layers.values())


def test_files_that_are_too_large_are_refused_unread(read, tmp_path):
    """Sparse ones: a disk has room for them, and memory has not."""
    read()
    for file, size, header in ((CONFIG_FILE, 2**36, b"{"), (WEIGHTS_FILE, 2**36, (HEADER_BYTES + 1).to_bytes(8, "little"))):
        whole = (tmp_path / file).read_bytes()
        with (tmp_path / file).open("wb") as opened:
            opened.write(header)
            opened.truncate(size)
        tracemalloc.start()
        with pytest.raises(AdapterError, match=f"more than ({CONFIG_BYTES}|{HEADER_BYTES}) bytes"):
            load_adapter(tmp_path, "odd")
        assert tracemalloc.get_traced_memory()[1] < 4 * CONFIG_BYTES
        tracemalloc.stop()
        (tmp_path / file).write_bytes(whole)
