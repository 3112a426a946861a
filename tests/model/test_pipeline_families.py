"""lorakit's calls on pipelines of every family: no family has code of its own."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_families import FAMILIES
from tiny_pipelines import close, trained

import lorakit as lk
from lorakit.bases.pipeline import PipelineModel, as_module, is_text_encoder
from lorakit.errors import TargetError
from lorakit.layers.layer import LoraLayer
from lorakit.tasks.image.packing import layout_of


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def predicted(made) -> torch.Tensor:
    model = as_module(made.pipe)
    layout = layout_of(model, made.latents, made.prompts)
    with torch.no_grad():
        return model(layout.argument(made.latents), torch.tensor(500), **made.prompts, **layout.call).output


def components(pipe) -> list[str]:
    model = as_module(pipe)
    assert isinstance(model, PipelineModel)
    return list(model.components)


def test_an_adapter_of_every_component_is_captured_saved_attached_and_merged(family, tmp_path):
    made = FAMILIES[family]()
    base, own = predicted(made), components(made.pipe)
    before = {c: tiny.bits(made.pipe.components[c]) for c in own}
    adapter = trained(made.pipe, targets="kohya", components=own)
    assert {m.partition(".")[0] for m in adapter.updates} == set(own)
    assert not any("norm" in m or "mod" in m.replace("text_model", "").replace(".model.", "") for m in adapter.updates)
    for name in own:  # what files call CLIP's layers, whatever transformers calls them
        layers = [m for m in adapter.updates if m.startswith(f"{name}.") and ".self_attn.out_proj" in m]
        assert all(".text_model.encoder.layers." in m for m in layers)
    ours = predicted(made)
    assert (ours - base).abs().max() > 1e-3
    again = FAMILIES[family]()
    lk.attach(again.pipe, lk.Adapter.load(adapter.save(tmp_path / "it.safetensors", format="diffusers")))
    close(predicted(again), ours)
    assert lk.capture(again.pipe).updates.keys() == adapter.updates.keys()
    lk.merge(made.pipe)
    close(predicted(made), ours, 2e-4)
    lk.unmerge(made.pipe)
    lk.detach(made.pipe)
    assert torch.equal(predicted(made), base)
    assert all(tiny.same_bits(before[c], tiny.bits(made.pipe.components[c])) for c in own)


def test_the_default_is_the_denoisers(family):
    made = FAMILIES[family]()
    lk.attach(made.pipe, lk.LoraConfig(rank=2, targets="attention"))
    denoisers = [c for c in components(made.pipe) if not is_text_encoder(c)]
    assert lk.capture(made.pipe).config.components == denoisers
    assert not any(isinstance(m, LoraLayer) for m in made.pipe.vae.modules())
    lk.detach(made.pipe)
    with pytest.raises(TargetError, match="no 'text_encoder_4' to adapt"):
        lk.attach(made.pipe, lk.LoraConfig(components=["text_encoder_4"]))
