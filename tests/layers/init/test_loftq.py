"""LoftQ: an adapter that starts from what quantization lost, and is right on that quantized base only."""

from __future__ import annotations

import json

import peft
import pytest
import quantized
import tiny
import torch
from safetensors.torch import load_file
from tiny import logits
from torch import Tensor, nn

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint
from lorakit.errors import AdapterError, ConfigError, LorakitError
from lorakit.export.export import export
from lorakit.methods.lora import attach as continue_from
from lorakit.train.config import TrainConfig

TARGETS = ["q_proj", "down_proj"]


def config(**settings) -> lk.LoraConfig:
    return lk.LoraConfig(**{"rank": 4, "alpha": 8.0, "targets": TARGETS, "init": "loftq"} | settings)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    quantized.llama().save_pretrained(folder)
    return folder


def adapted(model: nn.Module):
    return {n.removesuffix(".lora_default"): m for n, m in model.named_modules() if n.endswith(".lora_default")}


def lost(weight: Tensor, kind: str) -> Tensor:
    """W - Q(W), by hand."""
    return weight.double() - (quantized.nf4_by_hand(weight) if kind == "nf4" else quantized.int8_by_hand(weight))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_starts_from_the_largest_part_of_the_quantization_error(kind, rslora):
    torch.manual_seed(0)
    weight = 0.1 * torch.randn(64, 128)
    linear = quantized.linear4(weight) if kind == "nf4" else quantized.linear8(weight)
    model = nn.Sequential(linear)
    lk.attach(model, config(targets=["0"], rslora=rslora), originals={"0.weight": weight})
    error = lost(weight, kind)
    U, S, Vt = torch.linalg.svd(error, full_matrices=False)
    found = lk.capture(model).updates["0"].delta().double()
    torch.testing.assert_close(found, U[:, :4] * S[:4] @ Vt[:4], atol=1e-6, rtol=1e-3)
    assert (error - found).norm() < 0.98 * error.norm()
    # PEFT's loop, for one iteration, has these singular vectors too.
    L = (U[:, :4] * S[:4].sqrt()) @ (S[:4].sqrt()[:, None] * Vt[:4])
    torch.testing.assert_close(found, L, atol=1e-6, rtol=1e-3)


def test_the_originals_are_found_where_the_base_was_quantized_while_loading(dense):
    model = quantized.in_4_bits(dense)
    lk.attach(model, config(rank=32, targets="all-linear"))
    lk.activate(model, None)
    base = logits(model)
    lk.activate(model, "default")
    original = logits(type(model).from_pretrained(dense).eval())
    assert (logits(model) - original).norm() < (base - original).norm()  # closer than the quantized base alone
    stored = load_file(dense / "model.safetensors")
    again = quantized.in_4_bits(dense)
    lk.attach(again, config(rank=32, targets="all-linear"), originals=stored)
    assert all(
        torch.equal(*pair)
        for name, update in adapted(model).items()
        for pair in zip(update.parameters(), adapted(again)[name].parameters(), strict=True)
    )


def test_modules_that_are_not_quantized_start_at_random(dense):
    model = quantized.in_4_bits(dense)
    lk.attach(model, config(targets=[*TARGETS, "lm_head"]))
    updates = adapted(model)
    assert not updates["lm_head"].B.any()
    assert all(update.B.any() for name, update in updates.items() if name != "lm_head")


def test_a_conv1d_that_became_a_linear_is_read_the_right_way_round(tmp_path):
    quantized.gpt2().save_pretrained(tmp_path)
    model = quantized.in_4_bits(tmp_path)
    lk.attach(model, config(targets=["attn.c_proj"]))  # a square one
    W = load_file(tmp_path / "model.safetensors")["transformer.h.0.attn.c_proj.weight"].T.contiguous()
    U, S, Vt = torch.linalg.svd(lost(W, "nf4"), full_matrices=False)
    found = lk.capture(model).updates["transformer.h.0.attn.c_proj"].delta().double()
    torch.testing.assert_close(found, U[:, :4] * S[:4] @ Vt[:4], atol=1e-6, rtol=1e-3)


def test_it_is_refused_on_the_unquantized_base(dense, tmp_path):
    model = quantized.in_4_bits(dense)
    lk.attach(model, config())
    lk.capture(model).save(tmp_path / "adapter")
    value = lk.Adapter.load(tmp_path / "adapter")
    plain = type(model).from_pretrained(dense)
    with pytest.raises(AdapterError, match=r"\(bitsandbytes, 4 bits\) lost.*this base's are not quantized"):
        lk.attach(plain, value)
    with pytest.raises(AdapterError, match="is not quantized"):
        merge_checkpoint(dense, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    lk.attach(plain, value, force=True)
    with pytest.raises(AdapterError, match="rounded to other values, such as those of model"):
        lk.attach(quantized.in_4_bits(dense, kind="fp4"), value)
    again = lk.attach(quantized.in_4_bits(dense), value)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """The same base in three ways of quantizing, and a LoftQ adapter of each."""
    root, values = tmp_path_factory.mktemp("packed"), {}
    for kind in ("nf4", "fp4", "int8"):
        model = lk.load_base(dense, quantize=kind, double=kind == "int8", dtype="fp32", device="cpu")
        model.save_pretrained(root / kind)
        values[kind] = lk.capture(lk.attach(model, config()))
    return root, values


def test_a_merge_is_refused_on_a_base_quantized_in_another_way(dense, packed, tmp_path):
    root, values = packed
    for kind, said in (
        ("int8", "is bitsandbytes, 8 bits"),
        ("fp4", "is rounded to other values, such as those of model"),
    ):
        with pytest.raises(AdapterError, match=said):
            merge_checkpoint(root / kind, values["nf4"], tmp_path / "out")
    for settings in ({}, {"requantize": "same", "keep_at_least": 0}):
        with pytest.raises(AdapterError, match=r"is not quantized\n.*without onto"):
            merge_checkpoint(root / "nf4", values["nf4"], tmp_path / "out", onto=dense, **settings)
    assert not (tmp_path / "out").exists()
    merge_checkpoint(root / "nf4", values["nf4"], tmp_path / "out")
    merge_checkpoint(root / "int8", values["nf4"], tmp_path / "forced", force_base=True)


@pytest.mark.parametrize("settings", [{}, {"method": "svd", "rank": 2}, {"method": "dare_ties", "density": 0.5}])
def test_a_sum_is_right_on_the_same_quantized_base_only(dense, packed, settings):
    root, values = packed
    own = values["nf4"]
    mixed = lk.combine([own, own], [0.5, 0.5], **settings)
    with pytest.raises(AdapterError, match="this base's are not quantized"):
        lk.attach(quantized.llama(), mixed)
    with pytest.raises(AdapterError, match="is not quantized"):
        merge_checkpoint(dense, mixed, root / "none")
    lk.attach(quantized.in_4_bits(dense), mixed)
    plain = tiny.randomise_factors(lk.attach(quantized.llama(), lk.LoraConfig(rank=2, targets=TARGETS)))
    assert lk.combine([lk.capture(plain), own], **settings).metadata["only_on_quantized"] == "bitsandbytes, 4 bits"
    for other, said in (("int8", "bitsandbytes, 4 bits, and bitsandbytes, 8 bits"), ("fp4", "to different values")):
        with pytest.raises(AdapterError, match=said):
            lk.combine([own, values[other]], **settings)


def test_a_run_that_continues_from_it_needs_the_same_base(dense, packed, tmp_path):
    _, values = packed
    values["nf4"].save(tmp_path / "first")
    run = TrainConfig(data="-", adapter=str(tmp_path / "first"), model=str(dense), quantize="nf4")
    with pytest.raises(AdapterError, match="this base's are not quantized"):
        continue_from(quantized.llama(), run, "default", "CAUSAL_LM")
    model = quantized.in_4_bits(dense)
    continue_from(model, run, "default", "CAUSAL_LM")
    assert lk.capture(model).metadata["only_on_quantized"] == "bitsandbytes, 4 bits"


@pytest.mark.parametrize("receiver", ["llama.cpp", "mlx"])
def test_programs_without_the_quantized_base_are_refused_and_others_noted(packed, receiver, tmp_path):
    _, values = packed
    with pytest.raises(AdapterError, match=r"lost of the base's weights \(LoftQ\)(.|\n)*lorakit merge"):
        export(values["nf4"], tmp_path / "out.gguf", receiver, fix=True)
    assert not any(tmp_path.iterdir())
    notes = export(values["nf4"], tmp_path / "out", "vllm", fix=True).notes
    assert "right on a base quantized as bitsandbytes, 4 bits only" in notes[0]


@pytest.mark.parametrize("iterations, bits", [(1, 4), (1, 8), (2, 4), (1, 2)])
def test_pefts_loftq_is_read_where_its_base_is_one_that_users_have(dense, tmp_path, iterations, bits):
    theirs = peft.get_peft_model(quantized.llama(), peft.LoraConfig(r=4, target_modules=TARGETS))
    theirs.save_pretrained(tmp_path)
    at = tmp_path / "adapter_config.json"
    values = json.loads(at.read_text()) | {
        "init_lora_weights": "loftq",
        "loftq_config": {"loftq_bits": bits, "loftq_iter": iterations},
    }
    at.write_text(json.dumps(values))
    if (iterations, bits) not in ((1, 4), (1, 8)):
        with pytest.raises(AdapterError, match="init_lora_weights is 'loftq'"):
            lk.Adapter.load(tmp_path)
        return
    value = lk.Adapter.load(tmp_path)
    with pytest.raises(AdapterError, match=f"quantization \\(bitsandbytes, {bits} bits\\)"):
        lk.attach(quantized.llama(), value)
    if bits == 4:
        lk.attach(quantized.in_4_bits(dense), value)


def test_without_anything_quantized_it_says_what_to_load():
    with pytest.raises(ConfigError, match=r"none of the modules to adapt is quantized\n.*load_base"):
        lk.attach(tiny.llama(), config(rank=2))


def test_without_the_originals_it_says_what_to_give(dense, tmp_path):
    model = quantized.in_4_bits(dense)
    model.config._name_or_path = ""
    with pytest.raises(ConfigError, match="the model does not say where they are"):
        lk.attach(model, config())
    model.config._name_or_path = "nobody/nothing"
    with pytest.raises(ConfigError, match="'nobody/nothing' is not here"):
        lk.attach(model, config())
    with pytest.raises(ConfigError, match=r"has no 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        lk.attach(model, config(), originals={})
    with pytest.raises(ConfigError, match="cannot be read from"):
        lk.attach(model, config(), originals=tmp_path)
    wrong = {f"{name}.weight": torch.zeros(3, 5) for name, _ in model.named_modules()}
    with pytest.raises(LorakitError, match=r"a weight of \[3, 5\] for 'model"):
        lk.attach(model, config(), originals=wrong)
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigError, match=r"originals=FOLDER"):
        lk.attach(again, config())
    assert not lk.adapters(model)
    assert not lk.adapters(again)


def test_originals_for_another_start_are_refused(dense):
    with pytest.raises(ConfigError, match="is for init='loftq'"):
        lk.attach(tiny.llama(), config(init="pissa", rank=2), originals=dense)
