"""lorakit's own linears with packed weights, against the dense weight and autograd."""

from __future__ import annotations

import copy

import packed_checkpoints as checkpoints
import pytest
import quantized_modules as modules
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from lorakit.bases.own_linear import settings_of
from lorakit.errors import LorakitError

LAYOUTS = {
    "gptq": checkpoints.gptq_config(),
    "gptq 3 bits, activation order": checkpoints.gptq_config(bits=3, desc_act=True, sym=False),
    "awq": checkpoints.awq_config(),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=LAYOUTS)
def linear(request):
    return modules.packed(randn(32, 64) * 0.05, randn(32, seed=1), LAYOUTS[request.param])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_the_inputs_gradient(linear, dtype):
    W, b = linear.dequantized().double(), linear.bias.double()
    x = randn(2, 5, 64, seed=2).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    g = randn(2, 5, 32, seed=3)
    y, exact = linear(x), F.linear(wide, W, b)
    assert y.dtype == dtype
    (y.double() * g).sum().backward()
    (exact * g).sum().backward()
    assert x.grad.dtype == dtype
    near = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for ours, theirs in ((y, exact), (x.grad, wide.grad)):
        assert (ours.double() - theirs).norm() <= near * theirs.norm()


def test_the_weight_that_models_look_at_has_the_models_dtype(linear):
    assert linear.weight.dtype == torch.float16  # the scales'
    made = linear.bfloat16()
    assert (made.weight.dtype, made.scales.dtype) == (torch.bfloat16, torch.float16)
    assert torch.equal(made.weight, made.dequantized().bfloat16())
    assert copy.deepcopy(made).float().weight.dtype == torch.float32
    assert made.to("meta").weight.dtype == torch.bfloat16


def test_gradients_of_gradients(linear):
    assert gradcheck(linear, randn(2, 64).double().requires_grad_(), eps=1e-3, atol=1e-4)
    x = randn(2, 64).requires_grad_()
    (slope,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    slope.sum().backward()
    W = linear.dequantized()
    torch.testing.assert_close(x.grad, (2 * W.T @ W).sum(0).expand(2, -1), atol=1e-4, rtol=1e-4)


def test_under_autocast_it_computes_in_the_lower_precision(linear):
    x = randn(3, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), linear(x.detach()), atol=5e-2, rtol=2e-2)


def test_no_dense_weight_is_kept_between_forward_and_backward(linear):
    """Only the packed tensors are, which the module has anyway."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(randn(7, 64).requires_grad_())
    own = {tensor.data_ptr() for tensor in linear.packed().values()}
    assert {tensor.data_ptr() for tensor in kept} == own


def test_converting_the_model_leaves_the_packed_tensors(linear):
    before = {name: tensor.clone() for name, tensor in linear.packed().items()}
    for convert in (lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float32)):
        convert(linear)
        for name, tensor in linear.packed().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert linear.to("meta").scales.is_meta


def test_copies_are_equal_and_its_state_is_what_a_checkpoint_has(linear):
    x = randn(3, 64)
    assert torch.equal(copy.deepcopy(linear)(x), linear(x))
    assert set(linear.state_dict()) == {*linear.packed(), "bias"}
    assert not any(p.requires_grad for p in linear.parameters())
    assert "in_features=64, out_features=32" in repr(linear)


def test_bits_of_a_single_module_need_a_rule_in_the_config():
    how = checkpoints.gptq_config(bits=8)
    tensors = checkpoints.packed(randn(32, 64), how)
    with pytest.raises(LorakitError, match=r"qweight is \[16, 32\]: 8 bits for each of 64 inputs, expected 4"):
        settings_of(checkpoints.gptq_config(), tensors, 64)
    settings = settings_of(checkpoints.gptq_config(dynamic={"+:.*down.*": {"bits": 8}}), tensors, 64)
    assert (settings.bits, settings.group_size) == (8, checkpoints.GROUP)


def test_the_group_size_of_a_single_module_is_that_of_its_scales():
    tensors = checkpoints.packed(randn(32, 64), checkpoints.gptq_config(group_size=16))
    del tensors["g_idx"]
    settings = settings_of(checkpoints.gptq_config(dynamic={"+:.*": {"group_size": 16}}), tensors, 64)
    assert settings.group_size == 16
