"""Projections that diffusers has fused are not called: an adapter of theirs is an error, and never silently without
effect.
"""

from __future__ import annotations

import diffusers
import pytest
import tiny
import torch
from tiny_pipelines import draw, sd1_unet, tiny_sd1

import lorakit as lk
from lorakit.errors import StateError, TargetError


def unet():
    torch.manual_seed(0)
    return sd1_unet()


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    ).eval()


@torch.no_grad()
def output(model) -> torch.Tensor:
    made = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made)

    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(random(1, 4, 8, 8), torch.tensor([3]), random(1, 5, 12)).sample
    return model(
        random(1, 6, 4),
        encoder_hidden_states=random(1, 5, 12),
        pooled_projections=random(1, 12),
        timestep=torch.tensor([0.3]),
        img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample


@pytest.fixture(params=[unet, flux])
def model(request):
    return request.param()


def trained(model, **config):
    return tiny.randomise_factors(lk.attach(model, lk.LoraConfig(**{"rank": 2, "targets": "attention"} | config)))


@pytest.mark.parametrize("targets", ["attention", "kohya", "all-linear", ["to_q", "to_v"], r".*\.to_[kv]"])
def test_fused_projections_cannot_be_adapted_until_they_are_unfused(model, targets):
    model.fuse_qkv_projections()
    with pytest.raises(TargetError, match=r"fused into another module's.*\n.*call unfuse_qkv_projections\(\)"):
        lk.attach(model, lk.LoraConfig(targets=targets))
    assert lk.adapters(model) == []
    model.unfuse_qkv_projections()
    base = output(model)
    trained(model, targets=targets)
    assert not torch.equal(output(model), base)


def test_what_is_still_called_may_be_adapted_beside_them(model):
    model.fuse_qkv_projections()
    base = output(model)
    trained(model, targets=["to_out.0"])
    assert not torch.equal(output(model), base)


def test_an_adapter_from_a_file_is_refused_as_a_new_one_is(model):
    adapter = lk.capture(trained(model))
    lk.detach(model)
    model.fuse_qkv_projections()
    with pytest.raises(TargetError, match="unfuse_qkv_projections"):
        lk.attach(model, adapter)
    model.unfuse_qkv_projections()
    lk.attach(model, adapter)  # the same base, though an older attention keeps the fused copy


def test_fusing_later_is_noticed_at_the_next_call(model):
    trained(model)
    ours = output(model)
    model.fuse_qkv_projections()
    with pytest.raises(StateError, match=r"were fused after an adapter was attached to its 'to_[qk]'"):
        output(model)
    with lk.route(model, ["default"]), pytest.raises(StateError, match="were fused after"):
        output(model)
    with pytest.raises(StateError, match=r"merge\(model\): the weight of '.*to_[qk]' is fused"):
        lk.merge(model)
    lk.activate(model, None)
    output(model)  # the base alone is what it was
    lk.activate(model, "default")
    model.unfuse_qkv_projections()
    torch.testing.assert_close(output(model), ours, atol=1e-6, rtol=0)
    hooks = [m for m in model.modules() if m._forward_pre_hooks]
    lk.detach(model)
    assert hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_fusing_after_a_merge_is_right(model):
    trained(model)
    ours = output(model)
    lk.merge(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(output(model), ours, atol=1e-5, rtol=0)
    with pytest.raises(StateError, match=r"unmerge\(model\)"):
        lk.unmerge(model)
    model.unfuse_qkv_projections()
    lk.unmerge(model)
    torch.testing.assert_close(output(model), ours, atol=1e-6, rtol=0)


def test_a_pipeline_that_is_fused():
    pipe = tiny_sd1()
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(TargetError, match=r"'unet\..*\n.*unfuse_qkv_projections"):
        lk.attach(pipe, lk.LoraConfig(targets="kohya"))
    pipe.unfuse_qkv_projections(vae=False)
    lk.attach(pipe, lk.LoraConfig(rank=2, targets="kohya"))
    assert torch.equal(draw(pipe), draw(tiny_sd1()))
