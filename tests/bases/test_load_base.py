"""Bases that are quantized while they load: what is quantized, to which values, and clear errors for the rest."""

from __future__ import annotations

import copy
import json
import pickle

import packed_checkpoints
import pytest
import quantized
import tiny
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import lorakit as lk
from lorakit.bases import quantize
from lorakit.bases.load import load_model
from lorakit.bases.load_head import labelled, load_with_head
from lorakit.bases.own_linear import GptqLinear
from lorakit.bases.stored_weights import storage, storage_of
from lorakit.config import Quantization
from lorakit.errors import ConfigError, LorakitError, LorakitWarning
from lorakit.layers.bases import base_of
from lorakit.layers.bases import quantized as quantized_modules

LINEARS = 14  # of a model of two layers, without the output layer
CONFIG = lk.LoraConfig(rank=4, alpha=8, targets="all-linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    quantized.llama().save_pretrained(path)
    return path


def load(folder, **options):
    quantized.library()
    return lk.load_base(folder, **{"dtype": "fp32", "device": "cpu"} | options)


def dense_of(model) -> dict[str, torch.Tensor]:
    return {name: base_of(module).dense(module).double() for name, module in quantized_modules(model).items()}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_linears_but_the_output_layer_are_quantized_and_the_rest_is_as_given(folder, kind):
    model = load(folder, quantize=kind, dtype="bf16")
    packed = quantized_modules(model)
    assert len(packed) == LINEARS
    assert not any("lm_head" in name for name in packed)
    rest = {n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in packed}
    assert {p.dtype for p in rest.values()} == {torch.bfloat16}  # norms too
    original = quantized.llama().to(torch.bfloat16).state_dict()
    assert all(torch.equal(p, original[name]) for name, p in rest.items())
    assert not model.training


def test_the_values_are_those_of_the_papers(folder):
    original = quantized.llama().state_dict()
    for kind, by_hand in (("nf4", quantized.nf4_by_hand), ("int8", quantized.int8_by_hand)):
        for name, weight in dense_of(load(folder, quantize=kind, double=kind == "int8")).items():
            torch.testing.assert_close(weight, by_hand(original[f"{name}.weight"]), atol=1e-7, rtol=1e-6)


def test_double_quantization_rounds_the_scales_too_and_is_the_default(folder):
    double, plain = load(folder, quantize="nf4"), load(folder, quantize="nf4", double=False)
    module = double.model.layers[0].mlp.up_proj
    assert module.weight.quant_state.nested
    assert not plain.model.layers[0].mlp.up_proj.weight.quant_state.nested
    for ours, exact in zip(dense_of(double).values(), dense_of(plain).values(), strict=True):
        assert 0 < float((ours - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_the_precision_to_multiply_in_is_the_bases_unless_given(folder):
    def kinds(**options):
        return {m.compute_dtype for m in quantized_modules(load(folder, quantize="nf4", **options)).values()}

    assert kinds() == {torch.float32}
    assert kinds(dtype=torch.bfloat16) == {torch.bfloat16}
    assert kinds(compute_dtype=torch.float16) == {torch.float16}
    model = load(folder, quantize="nf4", compute_dtype="bf16")
    assert {m.compute_dtype for m in quantized_modules(model).values()} == {torch.bfloat16}
    assert model.model.layers[0].mlp.up_proj(torch.ones(1, 2, 64)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao-int8"])
def test_an_adapter_of_it_goes_onto_the_unquantized_base_without_force(folder, kind):
    if kind == "torchao-int8":
        pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    model = load(folder, quantize=kind)
    tiny.randomise_factors(lk.attach(model, CONFIG))
    adapter = lk.capture(model)
    dense = lk.attach(load(folder), adapter)
    assert lk.capture(dense).updates.keys() == adapter.updates.keys()
    assert model.name_or_path == dense.name_or_path == str(folder)  # where LoftQ finds the original weights


def test_torchao_has_the_same_rows_of_int8(folder):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'lorakit[torchao]'")
    model = lk.load_base(folder, quantize="torchao-int8", dtype="fp32", device="cpu")
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    packed = {n: w for n, w in weights.items() if type(w) is not nn.Parameter}
    assert len(packed) == LINEARS
    original = quantized.llama().state_dict()
    for name, weight in packed.items():
        W = original[f"{name}.weight"]
        error = (weight.dequantize() - W).abs()
        assert bool((error <= 0.51 * W.abs().amax(1, keepdim=True) / 127).all())


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_rows_that_are_not_whole_blocks_stay_and_a_warning_says_so(tmp_path, kind):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)
    dense = LlamaForCausalLM(config)
    dense.save_pretrained(tmp_path)
    if kind == "int8":
        assert len(quantized_modules(load(tmp_path, quantize=kind))) == LINEARS
        return
    with pytest.warns(LorakitWarning, match=r"2 of 14 linears stay in torch.float32(.|\n)*down_proj.*96 inputs"):
        model = load(tmp_path, quantize=kind)
    assert len(quantized_modules(model)) == LINEARS - 2
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, dense.model.layers[0].mlp.down_proj.weight)


def test_a_base_without_a_linear_to_quantize_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path)  # of width 16
    with pytest.raises(ConfigError, match=r"no linear that can be quantized to nf4 \(.*not whole blocks of 64"):
        load(tmp_path, quantize="nf4")


def test_gpt2_and_tied_weights(tmp_path):
    quantized.gpt2().save_pretrained(tmp_path)
    model = load(tmp_path, quantize="nf4")
    packed = quantized_modules(model)
    assert len(packed) == 8
    assert model.lm_head.weight is model.transformer.wte.weight
    original = quantized.gpt2().state_dict()
    for name, weight in dense_of(load(tmp_path, quantize="nf4", double=False)).items():
        torch.testing.assert_close(
            weight, quantized.nf4_by_hand(original[f"{name}.weight"].T.contiguous()), atol=1e-7, rtol=1e-6
        )


@pytest.mark.parametrize("kind, saved", [("nf4", False), ("nf4", True), ("int8", True), ("torchao-int8", False)])
def test_linears_that_transformers_does_not_quantize_are_known(tmp_path, kind, saved):
    if kind == "torchao-int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    quantized.t5().save_pretrained(tmp_path / "t5")
    model, how = load(tmp_path / "t5", quantize=kind, dtype="bf16"), storage(Quantization(quantize=kind))
    if saved:
        model.save_pretrained(tmp_path / "saved")
        model = load(tmp_path / "saved", dtype="bf16")
        how = storage_of(model.config)
    assert type(model.encoder.block[0].layer[1].DenseReluDense.wo) is nn.Linear  # as transformers has it
    assert quantize.linears_of(quantized.t5(), kind).kept["decoder.block.0.layer.2.DenseReluDense.wo"] == (
        "transformers does not quantize it"
    )
    assert quantize.stored_linears(quantized.t5(), how).keys() == quantized_modules(model).keys()


def test_a_classifiers_head_and_what_is_trained_in_full_stay(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    quantized.library()
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    how = Quantization(quantize="nf4")
    model = load_with_head(
        AutoModelForSequenceClassification,
        str(tmp_path),
        torch.float32,
        torch.device("cpu"),
        changes=labelled(["no", "yes"]),
        trained=["pooler.dense"],
        quantization=how,
    )
    packed = quantized_modules(model)
    assert len(packed) == 12
    assert not any("pooler" in name or "classifier" in name for name in packed)
    lk.attach(model, lk.LoraConfig(targets="attention", save_modules=["classifier"], task="SEQ_CLS"))


# ---- int8 evaluates as it trains ----


def test_int8_evaluates_with_the_function_that_it_trains_on(folder, caplog):
    model = load(folder, quantize="int8")
    dense = quantized.llama()
    for name, module in quantized_modules(model).items():
        dense.get_submodule(name).weight.data = base_of(module).dense(module).float()
    expected = tiny.logits(dense)
    torch.testing.assert_close(tiny.logits(model), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tiny.logits(model.train()), expected, atol=1e-6, rtol=1e-5)
    assert "cast" not in caplog.text  # what the other kernel says at each call
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny.logits(copied.eval()), tiny.logits(model.eval()))


def test_int8_that_the_user_loaded_evaluates_so_while_adapters_are_attached(folder):
    quantized.library()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"}).eval()
    activations_too = tiny.logits(model)
    lk.attach(model, CONFIG)
    ours = tiny.logits(model)
    exact = tiny.logits(load(folder, quantize="int8"))
    torch.testing.assert_close(ours, exact, atol=1e-6, rtol=1e-5)
    difference = float((activations_too - exact).norm() / exact.norm())
    assert 1e-4 < difference < 0.05
    lk.detach(model)
    assert torch.equal(tiny.logits(model), activations_too)
    loaded = load(folder, quantize="int8")
    lk.detach(lk.attach(loaded, CONFIG))
    torch.testing.assert_close(tiny.logits(loaded), exact, atol=0, rtol=0)  # load_base's keeps it


# ---- errors ----


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantize": "nf5"}, r"Quantization.quantize: expected 'nf4', 'fp4', 'int8' or 'torchao-int8' \(got 'nf5'\)"),
        ({"quantize": "int8", "double": False}, "double needs quantize: nf4 or quantize: fp4; omit it"),
        ({"compute_dtype": "bf16"}, "compute_dtype needs quantize: nf4 or quantize: fp4"),
        ({"quantize": "nf4", "compute_dtype": "int8"}, r"Quantization.compute_dtype: expected 'auto', 'bf16'"),
        ({"quantize": "NF4"}, r"\(got 'NF4'\); did you mean 'nf4'\?"),
        ({"double": False}, r"^double needs quantize: nf4"),
        (
            {"quantize": "nf4", "compute_dtype": torch.float64},
            r"Quantization.compute_dtype: expected .*\(got 'float64'",
        ),
        ({"device": "gpu"}, r"^device: there is no device 'gpu'; did you mean 'cuda'\?\n  expected cuda, xpu"),
        ({"device": "cdua:1"}, r"'cdua:1'; did you mean 'cuda'\?"),
        ({"device": "cuda:99"}, r"^device: cuda:99 cannot be used: .*\n  omit device for what is here"),
        ({"device": "cpu:1"}, r"^device: cpu:1 cannot be used: its number is at most 0"),
        ({"dtype": "bf17"}, r"unknown precision 'bf17'; did you mean 'bf16'\?"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        lk.load_base("/nowhere", **settings)


def test_a_base_that_is_quantized_already_says_what_it_is(folder, tmp_path):
    load(folder, quantize="nf4").save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"already: bitsandbytes nf4, scales quantized too\n  omit quantize: int8, or give the unquantized",
    ):
        load(tmp_path, quantize="int8")
    again = load(tmp_path)  # as it is
    for ours, saved in zip(dense_of(again).values(), dense_of(load(folder, quantize="nf4")).values(), strict=True):
        assert torch.equal(ours, saved)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("nf4", r"needs bitsandbytes, which is not installed\n  pip install 'lorakit\[quant\]'"),
        ("torchao-int8", r"needs torchao, which is not installed\n  pip install 'lorakit\[quant\]'"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(folder, monkeypatch, kind, message):
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(LorakitError, match=message):
        lk.load_base(folder, quantize=kind)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"quant_method": "hqq", "quant_config": {}}, r"HQQ, and hqq is not installed\n  pip install hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, r"quanto int8, .*\n  pip install optimum-quanto"),
        ({"quant_method": "compressed-tensors"}, r"\n  pip install compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"fp4, .*\n  pip install 'lorakit\[quant\]'"),
        ({"quant_method": "GPTQ"}, r"quant_method 'GPTQ', .* knows; did you mean 'gptq'\?\n  expected one of awq, "),
        ({"quant_method": "no such"}, r"quant_method 'no such', which neither lorakit nor transformers knows\n"),
        (packed_checkpoints.awq_config(bits="4"), "^quantization_config.bits is '4'"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_says_why(tmp_path, monkeypatch, how, message):
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    quantized.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(LorakitError, match=message):
        load_model(str(tmp_path), torch.float32, torch.device("cpu"))


# ---- GPTQ and AWQ ----


@pytest.mark.parametrize(
    "how", [packed_checkpoints.gptq_config(), packed_checkpoints.awq_config()], ids=["gptq", "awq"]
)
def test_gptq_and_awq_checkpoints_load_with_our_own_linears(tmp_path, how):
    folder, dense = packed_checkpoints.save(tmp_path, how)
    model = lk.load_base(folder, dtype="fp32", device="cpu")
    torch.testing.assert_close(tiny.logits(model), tiny.logits(dense.eval()), atol=1e-5, rtol=1e-5)
    name = {"gptq": "GPTQ", "awq": "AWQ"}[how["quant_method"]]
    with pytest.raises(ConfigError, match=f"is quantized already: {name}, 4 bits, groups of 32"):
        load(folder, quantize="nf4")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_t5_computes_in_its_own_dtype(tmp_path, dtype):
    folder, dense = packed_checkpoints.save(tmp_path, packed_checkpoints.gptq_config(), quantized.t5())
    model, seen = lk.load_base(folder, dtype=dtype, device="cpu"), {}
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            assert type(module) is GptqLinear
            module.register_forward_hook(lambda module, x, y, name=name: seen.update({name: (x[0].dtype, y.dtype)}))
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, dense.eval()))
    own = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert set(seen.values()) == {(own, own)}
    assert ours.dtype == own
    assert (ours.float() - theirs).norm() <= {"bf16": 3e-2, "fp16": 5e-3, "fp32": 1e-5}[dtype] * theirs.norm()


def test_a_classifier_on_a_gptq_base_has_its_labels(tmp_path):
    folder, _ = packed_checkpoints.save(tmp_path, packed_checkpoints.gptq_config())
    changes = labelled(["no", "so", "yes"])
    model = load_with_head(
        AutoModelForSequenceClassification, str(folder), torch.float32, torch.device("cpu"), changes=changes
    )
    assert model.config.id2label == {0: "no", 1: "so", 2: "yes"}
    assert model.score.weight.shape[0] == 3


def test_another_librarys_kernel_is_used_only_where_asked_for(folder, tmp_path, monkeypatch):
    checkpoint, _ = packed_checkpoints.save(tmp_path, packed_checkpoints.gptq_config())
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(LorakitError, match=r"gptqmodel is not installed\n  pip install gptqmodel optimum"):
        lk.load_base(checkpoint, kernel="gptqmodel")
    with pytest.raises(ConfigError, match=r"is for GPTQ and AWQ checkpoints, and .* is none\n  omit kernel"):
        lk.load_base(folder, kernel="gptqmodel")
    with pytest.raises(ConfigError, match=r"no kernel 'marlin'\n  expected None"):
        lk.load_base(checkpoint, kernel="marlin")


def test_damaged_packed_weights_keep_our_own_message(tmp_path):
    folder, _ = packed_checkpoints.save(tmp_path, packed_checkpoints.gptq_config())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bits"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LorakitError, match=r"^'model.layers.0.*4 bits for each of 128 inputs, expected 8"):
        lk.load_base(folder, dtype="fp32", device="cpu")


@pytest.mark.parametrize("setting, value", [("bits", None), ("group_size", "128")])
def test_a_damaged_setting_of_a_packed_checkpoint_is_named(tmp_path, setting, value):
    how = packed_checkpoints.gptq_config() | {setting: value}
    quantized.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(LorakitError, match=f"quantization_config.{setting} is {value!r}\n  expected a whole number"):
        lk.load_base(tmp_path, dtype="fp32", device="cpu")
