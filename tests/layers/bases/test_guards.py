"""What libraries' modules do behind one's back, and what lorakit does about it: switches that are held while adapters
are attached, weights that were switched already, inputs that are quantized too, classes that cannot be swapped simply.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import quantized_modules as modules
import tiny
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import StateError, TargetError
from lorakit.layers.bases import base_of
from lorakit.layers.layer import adapted_class, mixin_and_base
from lorakit.layers.linear import LinearLayer

W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 0.05
BIAS = torch.randn(32, generator=torch.Generator().manual_seed(1))
CONFIG = lk.LoraConfig(rank=2, targets=["0"])


def x(**options) -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).requires_grad_(**options)


def test_the_switch_of_gptqmodel_is_held_while_adapters_are_attached():
    """Also that of modules without adapter, which gradients pass through."""
    model = nn.Sequential(modules.gptqmodel(W, BIAS), nn.Linear(32, 64), modules.gptqmodel(W, None))
    before = tiny.picture(model)
    lk.attach(model, CONFIG)
    assert [model[at].linear_mode for at in (0, 2)] == ["train", "train"]
    lk.attach(model, CONFIG, name="second")
    lk.detach(model, "second")
    assert [model[at].linear_mode for at in (0, 2)] == ["train", "train"]
    lk.detach(model)
    assert [model[at].linear_mode for at in (0, 2)] == [None, None]
    assert tiny.picture(model) == before


def test_a_mode_that_was_chosen_before_stays():
    module = modules.gptqmodel(W, BIAS)
    module.linear_mode = "train"
    lk.detach(lk.attach(nn.Sequential(module), CONFIG))
    assert module.linear_mode == "train"


def test_a_weight_that_gptqmodel_has_repacked_is_refused():
    """Without the guard its gradients are wrong, and nothing says so."""
    module = modules.gptqmodel(W, BIAS)
    with torch.no_grad():
        module(x(requires_grad=False))
    assert module.linear_mode == "inference"
    assert not module(x()).requires_grad
    model = nn.Sequential(module)
    for trainable in (True, False):
        with pytest.raises(StateError, match=r"'0' was repacked by gptqmodel(.|\n)*load the base again"):
            lk.attach(model, CONFIG, trainable=trainable)
    assert type(module) is modules.TorchAtenLinear


@pytest.mark.parametrize(
    "make",
    [lambda: modules.torchao(W, BIAS, "int8, activations too"), lambda: modules.quanto(W, BIAS, activations="qint8")],
    ids=["torchao", "quanto"],
)
def test_modules_that_quantize_their_input_are_not_trained_through(make):
    model = nn.Sequential(make())
    with pytest.raises(StateError, match=r"'0' quantizes its input as well(.|\n)*passes no gradients"):
        lk.attach(model, CONFIG)
    adapter = lk.capture(tiny.randomise_factors(lk.attach(nn.Sequential(modules.plain(W, BIAS)), CONFIG)))
    with torch.no_grad():
        before = model(x(requires_grad=False))
    lk.attach(model, adapter)  # frozen
    with torch.no_grad():
        after = model(x(requires_grad=False))
    assert not torch.equal(before, after)


def test_a_class_on_top_of_abc_is_swapped_and_given_back():
    module = modules.quanto(W, BIAS)
    cls = type(module)
    with pytest.raises(TypeError, match="layout"):  # what it would be without a bridge
        module.__class__ = type("Plain", (LinearLayer, cls), {})
    model = lk.attach(nn.Sequential(module), CONFIG)
    assert isinstance(module, cls)
    assert mixin_and_base(type(module)) == (LinearLayer, cls)
    assert type(module) is adapted_class(LinearLayer, cls)
    lk.detach(model)
    assert type(module) is cls


def test_before_freeze_quantos_weight_is_an_ordinary_one():
    library = modules.installed("optimum.quanto")
    model = nn.Sequential(modules.plain(W, BIAS))
    library.quantize(model, weights=library.qint8)
    assert base_of(model[0]).quantization is None
    tiny.randomise_factors(lk.attach(model, CONFIG))
    before = model(x())
    lk.merge(model)
    torch.testing.assert_close(model(x()), before, atol=0.1, rtol=0.1)  # it rounds what it is given
    lk.unmerge(model)
    assert torch.equal(model(x()), before)


def test_compressed_weights_are_read_before_the_first_forward_decompresses_them():
    """The library's hook then replaces the parameters' dictionary of every module, adapters' too."""
    modules.installed("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

    module = modules.compressed(W, BIAS, decompress=False)
    assert "weight" not in module._parameters
    dense = base_of(module).dense(module)
    assert (dense - W).abs().max() < 0.1 * W.abs().max()
    model = nn.Sequential(module)
    config = QuantizationConfig(config_groups={"group": module.quantization_scheme})
    ModelCompressor(quantization_config=config).add_decompress_hook(model)
    tiny.randomise_factors(lk.attach(model, CONFIG))
    factors = [p for p in model.parameters() if p.requires_grad]
    y = model(x())
    assert "weight" in module._parameters
    assert torch.equal(base_of(module).dense(module), dense)
    A, B = factors
    torch.testing.assert_close(y, x() @ (dense + module.lora_default.scale * B @ A).T + BIAS, atol=1e-5, rtol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in factors)  # those that an optimizer holds
    lk.attach(nn.Sequential(modules.plain(W, BIAS)), lk.capture(model))


@pytest.mark.parametrize("targets", ["all-linear", ["0"]])
def test_a_quantized_linear_of_an_unknown_library_is_named_with_what_to_do(targets):
    model = nn.Sequential(modules.StrangeQuantLinear(W, BIAS), nn.Linear(32, 8))
    message = r"'0' is a \S*StrangeQuantLinear, a linear with packed weights that lorakit cannot read\n  load the unq"
    with pytest.raises(TargetError, match=message):
        lk.attach(model, CONFIG.replace(targets=targets))
    assert type(model[0]) is modules.StrangeQuantLinear
    lk.attach(model, CONFIG.replace(targets=["1"]))  # which are named can be adapted


def test_kernels_that_rearrange_the_weight_are_unknown():
    """Only those classes of gptqmodel are read that keep the layout of the files."""
    module = modules.gptqmodel(W, BIAS)
    module.__class__ = type("MarlinLinear", (nn.Module,), {"forward": modules.TorchAtenLinear.forward})
    with pytest.raises(TargetError, match="MarlinLinear, a linear with packed weights that lorakit cannot read"):
        lk.attach(nn.Sequential(module), CONFIG)


def test_no_library_is_imported_unasked():
    """Neither by attaching, merging and so on, nor by lorakit's own packed linears."""
    code = (
        "import json, sys, torch, lorakit as lk\n"
        "from lorakit.bases.own_linear import AwqLinear\n"
        "from lorakit.ops.quantized import awq\n"
        "packed = AwqLinear(awq.quantized(torch.randn(8, 32), awq.Settings(32)), awq.Settings(32))\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 32), packed, torch.nn.Linear(8, 4))\n"
        "lk.attach(m, lk.LoraConfig(rank=2, targets='all-linear'))\n"
        "m(torch.randn(2, 4)).sum().backward()\n"
        "lk.summary(m); lk.detach(m)\n"
        "lk.attach(m, lk.LoraConfig(rank=2, targets=['0'])); lk.merge(m); lk.unmerge(m); lk.detach(m)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    libraries = {"torchao", "optimum", "hqq", "compressed_tensors", "gptqmodel", "awq", "bitsandbytes"}
    assert not libraries & set(json.loads(done.stdout))


def test_a_dora_on_8_bit_floats_starts_from_the_norms_of_its_weight_with_scales():
    modules.installed("compressed_tensors")
    model = nn.Sequential(modules.compressed(W, BIAS, 8, "float", decompress=False))
    lk.attach(model, lk.LoraConfig(rank=2, variant="dora", targets=["0"]))
    magnitude = model[0].lora_default.magnitude.detach().flatten()
    torch.testing.assert_close(magnitude, W.norm(dim=1), rtol=0.05, atol=0)
