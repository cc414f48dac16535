"""What cannot be composed is refused by name: the adapter, the field, its value, and the mend where there is one."""

import json

import pytest
import torch
from composition.adapters_in_memory import pool_of, random_adapter, relative_error
from conftest import tiny_llama
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lorafleet.composition import METHODS, Adapter, ComposedModel, Composition, LowRank, check_number_format, load_adapter
from lorafleet.errors import AdapterError, CompositionError, UnknownAdapter

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def saved(make_adapter):
    return make_adapter("plain")


def with_config(folder, **changed):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder


def with_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


@pytest.mark.filterwarnings("ignore:aLoRA is currently", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "adapter odd uses DoRA"),
        ({"bias": "lora_only"}, "adapter odd uses bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "adapter odd uses full copies of modules"),
        ({"trainable_token_indices": [3, 4]}, "adapter odd uses trained tokens"),
        ({"alora_invocation_tokens": [3, 4]}, "adapter odd uses activated LoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "adapter odd uses layer_replication"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "adapter odd holds .*embed_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa' .*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ],
    ids=lambda value: str(value).split("'")[1] if isinstance(value, dict) else "",
)
def test_other_kinds_of_lora_that_peft_saves_are_refused(make_adapter, config, named):
    with pytest.raises(AdapterError, match=named):
        load_adapter(make_adapter("odd", **config))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_pissa_adapter_answers_on_the_base_model_as_it_was(tmp_path):
    config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    model = get_peft_model(tiny_llama(), config)
    assert isinstance(model, PeftModel)
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    config.init_lora_weights = "pissa"
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path / "pissa", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    composed = ComposedModel(tiny_llama())
    composed.pool.add(load_adapter(tmp_path / "pissa"))
    tokens = torch.arange(3, 12)[None]
    with torch.inference_mode():
        model.eval().set_adapter("default")
        wanted = model(tokens).logits
        with composed.composed([Composition("cat", {"pissa": 1.0})], tokens.shape[1]):
            found = composed.model(tokens).logits
        assert relative_error(found, wanted) < 1e-5
        assert relative_error(tiny_llama()(tokens).logits, wanted) > 1e-2


def test_other_kinds_of_adapters_are_refused(tmp_path):
    model = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path / "scaled")
    with pytest.raises(AdapterError, match=r"adapter scaled is of kind 'IA3'\. Only LORA adapters can be composed"):
        load_adapter(tmp_path / "scaled")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"peft_type": None}, "is of kind None"),
        ({"lora_bias": True}, "uses a bias on B"),
        ({"use_qalora": True, "target_parameters": ["experts"]}, "uses target_parameters, QALoRA"),
        ({"arrow_config": {"top_k": 2}}, "uses Arrow"),
        ({"kasa_config": {"beta": 1}}, "uses KaSA"),
        ({"monteclora_config": {"num_samples": 2}}, "uses MonteCLoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "uses BD-LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"lora_alpha": 0}, "lora_alpha is 0 in .*adapter_config.json. It must be a number above 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"alpha_pattern": {"q_proj": -8}}, "alpha_pattern.q_proj is -8"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern.q_proj is '8'"),
        ({"alpha_pattern": [["q_proj", 8]]}, "alpha_pattern is .* It must be an object of module names, each with a number"),
        (
            {"alpha_pattern": {"(?=q)q_proj": 8}},
            r"alpha_pattern has the key '\(\?=q\)q_proj' .*invalid perl operator.*docs/pool.md",
        ),
        ({"rank_pattern": {"q_proj(": 8}}, "rank_pattern has the key .* missing \\)"),
        ({"rank_pattern": {"q_proj": 0.5}}, "rank_pattern.q_proj is 0.5 .* whole number above 0"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.* It must be a number above 0"),
        ({"use_rslora": "no"}, "use_rslora is 'no' .* It must be true or false"),
        ({"bias": ["x" * 9999]}, r"uses bias=\['xxx.{,100}\. Only"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_a_configuration_that_cannot_be_composed_is_refused(saved, changed, named):
    with pytest.raises(AdapterError, match=f"adapter plain.*{named}"):
        load_adapter(with_config(saved, **changed))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "mica"])
def test_a_start_that_leaves_the_base_model_alone_is_read(saved, start):
    assert load_adapter(with_config(saved, init_lora_weights=start)).rank == 4


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"{", "adapter_config.json is not JSON: "),
        (b"\xff\xfe", "adapter_config.json is not JSON: .*in UTF-8"),
        ("{}".encode("utf-16"), "adapter_config.json is not JSON: .*in UTF-8"),
        (b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}", "adapter_config.json is not JSON: recursion limit"),
        (b'{"lora_alpha": ' + b"9" * 9999 + b"}", "adapter_config.json is not JSON: number out of range"),
        (b" " * (1024 * 1024 + 1), "adapter_config.json has more than 1048576 bytes"),
        (b"[]", "adapter_config.json is not a JSON object"),
        (None, "cannot read .*adapter_config.json: No such file"),
    ],
)
def test_a_damaged_configuration_is_refused(saved, text, named):
    path = saved / "adapter_config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(AdapterError, match=f"adapter plain: .*{named}"):
        load_adapter(saved)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "not safetensors"])
def test_damaged_tensors_are_refused(saved, damage):
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut short": whole[: len(whole) // 2], "not safetensors": b"PK" + whole[2:]}[damage])
    with pytest.raises(AdapterError, match=r"adapter plain: cannot read .*adapter_model\.safetensors: "):
        load_adapter(saved)


def test_tensors_that_do_not_belong_together_are_refused(saved):
    a_key, b_key = KEY.format("A"), KEY.format("B")
    whole = load_file(saved / "adapter_model.safetensors")

    def refuses(named, **changed):
        tensors = {key: tensor for key, tensor in whole.items() if key not in (a_key, b_key)}
        tensors |= {KEY.format(half): tensor for half, tensor in changed.items()}
        save_file(tensors, saved / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=f"adapter plain: {named}"):
            load_adapter(saved)

    a, b = whole[a_key], whole[b_key]
    mismatch = r"lora_A and lora_B of model\.layers\.0\.self_attn\.q_proj do not belong together"
    refuses(mismatch, A=a)
    refuses(mismatch, B=b)
    refuses(mismatch, A=a[:3].clone(), B=b)
    refuses(mismatch, A=a[0].clone(), B=b)
    refuses(mismatch, A=a, B=b[0].clone())
    refuses(r".*q_proj\.lora_A\.weight is empty, its shape is \(0, 32\)", A=a[:0].clone(), B=b[:, :0].clone())
    for value in (float("nan"), float("inf")):
        refuses("model.*q_proj holds a value that is not finite", A=a, B=b.index_fill(0, torch.tensor(1), value))


def test_tensors_of_other_kinds_are_refused(saved):
    with_tensors(saved, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}))
    with pytest.raises(AdapterError, match=r"adapter plain holds base_model\.model\.lm_head\.weight"):
        load_adapter(saved)
    with_tensors(saved, lambda tensors: (tensors.clear(), tensors.update({"lora_A.weight": torch.zeros(2, 2)})))
    with pytest.raises(AdapterError, match="adapter plain"):
        load_adapter(saved)
    with_tensors(saved, dict.clear)
    with pytest.raises(AdapterError, match="adapter plain holds no layer"):
        load_adapter(saved)


@pytest.mark.parametrize(
    "number_format",
    ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int64", "bool", "complex64"],
)
def test_other_number_formats_are_refused_by_name(saved, number_format):
    kind = getattr(torch, number_format)
    with_tensors(saved, lambda tensors: tensors.update({KEY.format("B"): tensors[KEY.format("B")].to(kind)}))
    says = rf"q_proj\.lora_B\.weight is {number_format}\. Allowed: float16, bfloat16, float32, float64"
    with pytest.raises(AdapterError, match=says):
        load_adapter(saved)


@pytest.mark.parametrize("number_format", [torch.float16, torch.bfloat16, torch.float64])
def test_halves_of_two_number_formats_are_read(saved, number_format):
    with_tensors(saved, lambda tensors: tensors.update({KEY.format("A"): tensors[KEY.format("A")].to(number_format)}))
    layer = load_adapter(saved).layers["model.layers.0.self_attn.q_proj"]
    assert (layer.a.dtype, layer.b.dtype) == (number_format, torch.float32)


def renamed(tensors, old, new):
    for key in list(tensors):
        tensors[key.replace(old, new)] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: [tensors.update({key: torch.zeros(0)}) for key in tensors], "is empty.*ZeRO-3"),
        (lambda tensors: renamed(tensors, ".weight", ".default.weight"), "lora_A.default.weight.*save_pretrained"),
        (lambda tensors: renamed(tensors, "self_attn.q_proj", "lm_head"), "output head.*leave lm_head out"),
        (lambda tensors: renamed(tensors, "self_attn.q_proj", "embed_tokens"), "embeddings.*leave embed_tokens out"),
        (lambda tensors: tensors.update({"lm_head.base_layer.weight": torch.zeros(2)}), "output head"),
        (lambda tensors: tensors.update({KEY.format("A")[17:]: torch.zeros(4, 32)}), "holds lora_A of model.* twice"),
        (lambda tensors: tensors.update({"a\nb.lora_A.weight": torch.zeros(2)}), r"a\\nb.*no layer's name"),
        (lambda tensors: tensors.pop(KEY.format("B")), "lora_B is missing"),
    ],
)
def test_tensors_that_other_savers_leave_are_refused_with_the_reason(saved, change, says):
    with pytest.raises(AdapterError, match=f"adapter plain.*{says}"):
        load_adapter(with_tensors(saved, change))


def test_a_scale_by_patterns_is_that_of_peft(make_adapter):
    patterns = {"^model.layers.0.self_attn.q_proj": 3, r"layers\.1\..*(q|k)_proj": 5, "mlp.up_proj": 7}
    layers = load_adapter(make_adapter("odd", alpha=8, alpha_pattern=patterns)).layers
    named = {
        "layers.0.self_attn.q_proj": 3,
        "layers.1.self_attn.k_proj": 5,
        "layers.0.mlp.up_proj": 7,
        "layers.0.mlp.down_proj": 8,
    }
    assert {module: layers[f"model.{module}"].scale * 4 for module in named} == named


def test_weights_that_overflow_in_the_engines_number_format_are_refused():
    module = "model.layers.0.self_attn.q_proj"

    def adapter(value, scale=1.0, kind=torch.float32):
        halves = torch.full((2, 4), value, dtype=kind), torch.full((3, 2), 1.0)
        return Adapter("hot", {module: LowRank(*halves, scale)})

    for fits, number_format in ((adapter(65500.0), torch.float16), (adapter(3e38), torch.bfloat16)):
        check_number_format(fits, number_format)
    says = r"adapter hot: .*q_proj holds 1\.2e\+05 once it is scaled, and float16 ends at 6\.55e\+04\. Set models\.dtype"
    for hot in (adapter(60000.0, 4.0), adapter(120000.0), adapter(120000.0, kind=torch.float64)):
        with pytest.raises(AdapterError, match=says):
            check_number_format(hot, torch.float16)
    with pytest.raises(AdapterError, match="float32 ends"):
        check_number_format(adapter(1e300, kind=torch.float64), torch.float32)
    with pytest.raises(AdapterError, match="hot"):
        check_number_format(adapter(1.0, 1e300), torch.float32)


def test_an_adapter_of_another_model_is_refused():
    pool = ComposedModel(tiny_llama()).pool
    name = "model.layers.0.self_attn.k_proj"

    def refuses(named, **layers):
        with pytest.raises(AdapterError, match=named):
            pool.add(Adapter("foreign", {key.replace("__", "."): layer for key, layer in layers.items()}))
        assert "foreign" not in pool

    whole = LowRank(torch.zeros(2, 32), torch.zeros(16, 2), 1.0)
    pool.add(Adapter("own", {name: whole}))
    tall = LowRank(torch.zeros(2, 32), torch.zeros(32, 2), 1.0)
    refuses(rf"foreign: {name} is \(32, 32\), the base model has \(16, 32\)", **{name: tall})
    wide = LowRank(torch.zeros(2, 48), torch.zeros(16, 2), 1.0)
    refuses(rf"foreign: {name} is \(16, 48\), the base model has \(16, 32\)", **{name: wide})
    for absent in ("model.layers.2.self_attn.k_proj", "lm_head", "model.embed_tokens"):
        refuses(f"{absent} is .*, the base model has no such layer. Was it trained on another model?", **{absent: whole})


def test_a_composition_that_cannot_be_made_is_refused():
    pool = pool_of(random_adapter("four", rank=4), random_adapter("two", rank=2))
    both = {"four": 0.5, "two": 0.5}
    for method in METHODS:
        if METHODS[method].equal_ranks:
            refusal = f"method {method} needs adapters of one rank, these have four 4, two 2. Use cat"
            with pytest.raises(CompositionError, match=refusal):
                pool.recipe(Composition(method, both))
        else:
            pool.recipe(Composition(method, both))
    with pytest.raises(UnknownAdapter, match=r"no adapter named 'fuor'\. Did you mean four"):
        pool.recipe(Composition("cat", {"fuor": 1.0}))
    with pytest.raises(UnknownAdapter, match=r"Known: four, two"):
        pool["zebra"]
    with pytest.raises(CompositionError, match=r"method is 'slerp'\. Known: linear, cat"):
        pool.recipe(Composition("slerp", both))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_weights_must_be_finite(weight):
    with pytest.raises(CompositionError, match=rf"weights\.four is {weight}"):
        Composition("cat", {"two": 1.0, "four": weight})


@pytest.mark.parametrize("density", [0.0, -0.5, 1.01, float("nan")])
def test_the_density_is_above_0_and_at_most_1(density):
    with pytest.raises(CompositionError, match=f"density is {density}"):
        Composition("ties", {"four": 1.0}, density)
