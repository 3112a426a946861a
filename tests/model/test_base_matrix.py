"""Every way in which a language model's base may be quantized, in everything that an adapter does on it.

docs/quantized.md names the tests of this file in its table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import packed_checkpoints as checkpoints
import pytest
import quantized
import quantized_modules as modules
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.config import variants
from lorakit.errors import AdapterError, StateError, TargetError
from lorakit.layers.bases import base_of, parameter_count
from lorakit.layers.bases import quantized as quantized_modules

CONFIG = lk.LoraConfig(rank=4, alpha=8, targets="all-linear")


def unquantized() -> nn.Module:
    return quantized.llama()


def in_place(make: Callable[[Tensor, Tensor | None], nn.Module]) -> Callable[[Path], nn.Module]:
    """Replace the linears of the decoder layers."""

    def load(folder: Path) -> nn.Module:
        model = unquantized()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "layers." in name:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, make(module.weight.detach(), module.bias))
        return model

    return load


def packed(**how) -> Callable[[Path], nn.Module]:
    """lorakit's own reading of a checkpoint."""

    def load(folder: Path) -> nn.Module:
        checkpoints.save(folder, checkpoints.awq_config() if how.get("awq") else checkpoints.gptq_config(**how))
        return lk.load_base(folder, dtype="fp32", device="cpu")

    return load


def through_transformers(config: Callable[[], object]) -> Callable[[Path], nn.Module]:
    def load(folder: Path) -> nn.Module:
        how = config()
        unquantized().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32).eval()

    return load


def torchao_config() -> object:
    library = modules.installed("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(library.Int8WeightOnlyConfig(set_inductor_config=False))


def quanto_config() -> object:
    modules.installed("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def bitsandbytes(load) -> Callable[[Path], nn.Module]:
    def model(folder: Path) -> nn.Module:
        unquantized().save_pretrained(folder)
        return load(folder)

    return model


def in_8_bits(folder: Path) -> nn.Module:
    quantized.library()
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Base:
    """`load`: with files in this folder, which is empty. `saves`: whether `save_pretrained` and `from_pretrained` save
    and load it.
    """

    load: Callable[[Path], nn.Module]
    saves: bool = True


BASES = {
    "bitsandbytes nf4": Base(bitsandbytes(quantized.in_4_bits)),
    "bitsandbytes nf4, double": Base(bitsandbytes(lambda folder: quantized.in_4_bits(folder, double=True))),
    "bitsandbytes fp4": Base(bitsandbytes(lambda folder: quantized.in_4_bits(folder, kind="fp4"))),
    "bitsandbytes int8": Base(bitsandbytes(in_8_bits)),
    "GPTQ": Base(packed(sym=False)),
    "GPTQ, activation order": Base(packed(desc_act=True, sym=False)),
    "GPTQ, gptqmodel's switch": Base(in_place(modules.gptqmodel), saves=False),
    "AWQ": Base(packed(awq=True)),
    "torchao int8": Base(through_transformers(torchao_config)),
    "torchao 4 bits": Base(in_place(lambda W, b: modules.torchao(W, b, "intx4")), saves=False),
    "quanto int8": Base(through_transformers(quanto_config), saves=False),
    "HQQ 4 bits": Base(in_place(modules.hqq), saves=False),
    "compressed-tensors 4 bits": Base(in_place(modules.compressed), saves=False),
}


READ_DENSE = [{"init": "pissa"}] + [{"variant": "dora"}] * ("dora" in variants())


@pytest.fixture(params=BASES)
def base(request) -> Base:
    return BASES[request.param]


@pytest.fixture
def model(base, tmp_path) -> nn.Module:
    return base.load(tmp_path / "base")


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with dense weights."""
    dense = unquantized()
    packed = quantized_modules(model)
    assert len(packed) == 14
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            module, _, last = name.rpartition(".")
            own = packed.get(module)
            value = model.get_parameter(name) if own is None else base_of(own).dense(own)
            assert last in ("weight", "bias")
            parameter.copy_(value)
    return dense


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(**tiny.example(model)).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def near(ours: Tensor, theirs: Tensor, relative: float) -> bool:
    return bool((ours.double() - theirs.double()).norm() <= relative * theirs.double().norm())


@pytest.mark.parametrize("evaluated", [False, True], ids=["", "after an evaluation"])
def test_outputs_and_gradients(model, evaluated):
    """Those of the dequantized weights, also after an evaluation without gradients, in which some libraries' kernels
    change the weights for good.
    """
    dense = dequantized(model)
    for each in (model, dense):
        tiny.randomise_factors(lk.attach(each, CONFIG))
    if evaluated:
        with torch.no_grad():
            model.eval()(**tiny.example(model))
    inputs = tiny.example(model)
    assert near(model.train()(**inputs).logits, dense.train()(**inputs).logits, 1e-6)
    ours, theirs = gradients(model), gradients(dense)
    assert set(ours) == set(theirs) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(ours) == 28
    for name, gradient in theirs.items():
        assert near(ours[name], gradient, 1e-5), name


def test_saved_and_loaded_after_training_it_is_the_same_to_the_bit(base, model, tmp_path):
    before, picture = tiny.bits(model), tiny.picture(model)
    lk.attach(model, CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    inputs, losses = tiny.example(model), []
    for _ in range(15):
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    trained = tiny.logits(model.eval())
    lk.capture(model).save(tmp_path / "adapter")
    lk.detach(model)
    assert tiny.picture(model) == picture
    assert tiny.same_bits(tiny.bits(model), before)
    if base.saves:
        model.save_pretrained(tmp_path / "saved")
        if isinstance(getattr(model.config, "quantization_config", None), dict):
            again = lk.load_base(tmp_path / "saved", dtype="fp32", device="cpu")
        else:
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
        after = tiny.bits(again)
        assert tiny.same_bits({n: after[n] for n in before}, before)
    else:
        again = base.load(tmp_path / "again")
    lk.attach(again, lk.Adapter.load(tmp_path / "adapter"))
    assert torch.equal(tiny.logits(again), trained)


def test_an_adapter_goes_onto_the_unquantized_base_and_back_without_force(base, model, tmp_path):
    tiny.randomise_factors(lk.attach(model, CONFIG))
    lk.capture(model).save(tmp_path / "from quantized")
    lk.capture(tiny.randomise_factors(lk.attach(unquantized(), CONFIG))).save(tmp_path / "from dense")
    for dtype in (torch.float32, torch.bfloat16):
        lk.attach(quantized.llama(dtype=dtype), lk.Adapter.load(tmp_path / "from quantized"))
    lk.attach(model, lk.Adapter.load(tmp_path / "from dense"), name="second")
    stranger = quantized.llama()
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) * 0.02)
    with pytest.raises(AdapterError, match="trained on another base"):
        lk.attach(stranger, lk.Adapter.load(tmp_path / "from quantized"))


def test_rows_of_a_batch_with_adapters_of_their_own_and_generate(model):
    for seed, name in enumerate(("a", "b")):
        lk.attach(model, CONFIG.replace(rank=2 + seed), name=name, trainable=seed == 0)
    tiny.randomise_factors(model)
    ids = tiny.example(model)["input_ids"]
    rows = torch.cat([ids, ids[:1]])
    choices = ["a", "b", None]

    def alone(name, row):
        lk.activate(model, name)
        return model(input_ids=row[None]).logits[0]

    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            with lk.route(model, choices):
                mixed = model(input_ids=rows).logits
            for got, name, row in zip(mixed, choices, rows, strict=True):
                torch.testing.assert_close(got, alone(name, row), atol=1e-5, rtol=1e-5)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with lk.route(model, ["a", "b"]):
        answers = model.generate(ids, **settings)
    for row, name in enumerate(("a", "b")):
        lk.activate(model, name)
        alone_answer = model.generate(ids[row : row + 1], **settings)
        assert torch.equal(answers[row : row + 1], alone_answer)
    dense = dequantized(model)
    lk.attach(dense, lk.capture(model, "b"))
    assert torch.equal(dense.generate(ids[1:], **settings), answers[1:])


@pytest.mark.parametrize("settings", READ_DENSE, ids=lambda settings: next(iter(settings.values())))
def test_kinds_of_updates_that_read_the_dense_weight(model, settings):
    dense = dequantized(model)
    lk.attach(model, CONFIG.replace(**settings))
    assert near(tiny.logits(model), tiny.logits(dense), 1e-5)  # they start as the base
    tiny.randomise_factors(model, seed=3)
    lk.attach(dense, lk.capture(model))
    assert near(tiny.logits(model), tiny.logits(dense), 1e-5)
    assert not near(tiny.logits(model), tiny.logits(dequantized(model)), 1e-2)


def test_merging_in_place_is_refused_and_says_what_to_do(model):
    before = tiny.bits(model)
    tiny.randomise_factors(lk.attach(model, CONFIG))
    outputs = tiny.logits(model)
    with pytest.raises(StateError, match=r"is quantized(.|\n)*lorakit merge BASE ADAPTER OUT"):
        lk.merge(model)
    assert torch.equal(tiny.logits(model), outputs)
    assert tiny.same_bits(tiny.bits(model), before)


def test_parameters_are_counted_as_weights(model):
    said, dense = (lk.summary(lk.attach(each, CONFIG)) for each in (model, unquantized()))
    assert (said.trainable, said.total) == (dense.trainable, dense.total)
    assert [row.shape for row in said.rows] == [row.shape for row in dense.rows]
    assert said.unreached is None
    lk.detach(model)
    assert parameter_count(model) == sum(p.numel() for p in unquantized().parameters())


def test_a_quantized_weight_cannot_be_trained_in_full(model):
    before = tiny.picture(model)
    with pytest.raises(TargetError, match=r"'model.layers.0.mlp' is quantized(.|\n)*LoraConfig.save_modules"):
        lk.attach(model, lk.LoraConfig(targets=["q_proj"], save_modules=["mlp"]))
    assert tiny.picture(model) == before
    lk.attach(model, lk.LoraConfig(targets=["q_proj"], save_modules=["lm_head"]))  # which is not quantized
