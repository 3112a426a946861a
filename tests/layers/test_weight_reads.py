"""Modules whose weight is read without calling them are no targets: an adapter there would never be heard."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from architectures import MOE, STATE_SPACE, causal_lm
from made_experts import llama4
from torch import nn

import lorakit as lk
from lorakit.errors import TargetError
from lorakit.layers.weight_reads import reads_of


class Router(nn.Module):
    """Reads one linear's weight, calls another, and asks for the type of a third before it calls that."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.proj, self.cast, self.bias_only = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x = self.cast(x.to(self.cast.weight.dtype)) + self.bias_only.bias
        return self.helper(self.norm(self.proj(x)))

    def helper(self, x):
        return torch.stack([F.linear(row, self.gate.weight, self.gate.bias) for row in x])


def test_reads_and_calls_are_told_apart():
    found = reads_of(Router)
    assert "gate" in found.read - found.called
    assert {"proj", "cast", "norm"} <= found.called
    assert "cast" not in found.read


def test_all_linear_leaves_out_what_is_never_called_and_naming_it_is_an_error():
    model = nn.Sequential(Router(), nn.Linear(4, 4))
    lk.attach(model, lk.LoraConfig(rank=2))
    assert "Router reads its weight without calling it" in lk.summary(model).skipped["0.gate"]
    with pytest.raises(TargetError, match=r"'0.gate' cannot be adapted: Router reads its weight"):
        lk.attach(nn.Sequential(Router()), lk.LoraConfig(rank=2, targets=["gate"]))


@pytest.mark.parametrize("architecture", STATE_SPACE)
def test_every_target_of_a_state_space_model_is_heard_and_peft_loads_the_adapter(architecture, tmp_path):
    model = causal_lm(architecture)
    lk.attach(model, lk.LoraConfig(rank=2))
    endings = {m.rsplit(".", 1)[-1] for m in lk.capture(model).updates}
    assert "in_proj" in endings
    assert not endings & {"conv1d", "dt_proj"}
    if architecture != "jamba":  # its kernel does not take the output projection
        assert "out_proj" not in endings
    tiny.randomise_factors(model, size=0.1)
    ids = torch.tensor([[3, 14, 15, 9, 26]])
    model.train()(ids).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    lk.capture(model).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(causal_lm(architecture), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["conv1d", "dt_proj"])
def test_naming_what_mamba_does_not_call_is_an_error(target):
    with pytest.raises(TargetError, match="MambaMixer reads its weight without calling it"):
        lk.attach(causal_lm("mamba"), lk.LoraConfig(rank=2, targets=[target]))


def test_bloom_whose_second_path_reads_weights_is_adapted_as_before():
    model = causal_lm("bloom")
    lk.attach(model, lk.LoraConfig(rank=2))
    endings = {m.rsplit(".", 1)[-1] for m in lk.capture(model).updates}
    assert endings == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_the_share_of_the_experts_that_no_target_reaches_is_said_by_name():
    """Llama 4's experts have no interface that says what they compute."""
    model = llama4()
    parameters = dict(model.named_parameters())
    experts = sum(p.numel() for n, p in parameters.items() if ".experts." in n)
    lk.attach(model, lk.LoraConfig(rank=2))
    missed = lk.summary(model).unreached
    assert missed is not None
    held = sum(size for name, size in missed.names.items() if name.endswith(("gate_up_proj", "down_proj")))
    assert held == experts
    assert missed.share == pytest.approx(
        sum(missed.names.values()) / sum(p.numel() for p in parameters.values()), rel=1e-9
    )
    assert "which no target reaches: model.layers.*.feed_forward.experts.gate_up_proj" in str(lk.summary(model))


@pytest.mark.parametrize("architecture", MOE)
def test_experts_with_the_interface_are_reached(architecture):
    model = causal_lm(architecture)
    lk.attach(model, lk.LoraConfig(rank=2))
    missed = lk.summary(model).unreached
    assert missed is None or not any(name.endswith(("gate_up_proj", "down_proj")) for name in missed.names)


def test_a_dense_model_reaches_all_that_matters(tiny_llama, tiny_bert):
    for model in (tiny_llama, tiny_bert):
        lk.attach(model, lk.LoraConfig(rank=2))
        assert lk.summary(model).unreached is None
        assert "not reached" not in str(lk.summary(model))
