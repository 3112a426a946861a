"""Adapters between lorakit and diffusers, through files, for tiny pipelines of eight families: what is written here
predicts the same in diffusers, and what diffusers writes predicts the same here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exchange_families import CLOSE, FAMILIES, Family, adapted, attached, placed, predict
from safetensors.torch import load_file
from torch import Tensor

import lorakit as lk
from lorakit.bases.pipeline import components_of
from lorakit.export import image_programs


def cases(*, forms: bool) -> list[Any]:
    """(model, kind, format): every kind in diffusers' format, or the forms that its loader takes besides."""
    return [
        pytest.param(model, kind, format, id=f"{model}-{kind}-{format}")
        for model, family in FAMILIES.items()
        for format, kinds in (family.forms if forms else {"diffusers": family.kinds}).items()
        for kind in kinds
    ]


@pytest.mark.parametrize("model, kind, format", cases(forms=False) + cases(forms=True))
def test_diffusers_predicts_what_we_predict_from_our_file(model, kind, format, tmp_path):
    family = FAMILIES[model]
    pipe = attached(family, kind)
    ours, base = predict(family, pipe), predict(family, family.pipe())
    assert (ours - base).abs().max() > 1e-3
    adapter = lk.capture(pipe)
    adapter.save(tmp_path / "x.safetensors", format)
    theirs = family.pipe()
    theirs.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    assert placed(theirs) == len(adapter.updates) == len(adapted(family, kind))
    if format == "diffusers":  # what export says of the file is what diffusers does with it
        said = image_programs.placed("diffusers", model, load_file(tmp_path / "x.safetensors"))
        assert (sum(said.read.values()), said.unread) == (placed(theirs), [])
    torch.testing.assert_close(predict(family, theirs), ours, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfyui", "peft"])
@pytest.mark.parametrize("model", FAMILIES)
def test_our_file_predicts_the_same_on_a_fresh_pipeline(model, format, tmp_path):
    family = FAMILIES[model]
    for kind in ("attention", "mixed"):
        pipe = attached(family, kind)
        ours = predict(family, pipe)
        path = tmp_path / (kind if format == "peft" else f"{kind}.safetensors")
        lk.capture(pipe).save(path, format)
        again = family.pipe()
        lk.attach(again, lk.Adapter.load(path))
        torch.testing.assert_close(predict(family, again), ours, atol=CLOSE, rtol=0, msg=lambda t, k=kind: f"{k}: {t}")


def from_peft(family: Family, kind: str, folder: Path, alphas: bool) -> Tensor:
    """Save a LoRA of PEFT's layers with diffusers' own `save_lora_weights`, and return its prediction. `alphas`: with
    the header that holds them, as diffusers' training scripts do today.
    """
    pipe, modules = family.pipe(), list(adapted(family, kind))
    saved: dict[str, Any] = {}
    torch.manual_seed(2)
    for component, model in components_of(pipe).items():
        names = dict(model.named_modules())
        own = [m.removeprefix(f"{component}.") for m in modules if m.startswith(f"{component}.")]
        own = [name if name in names else name.removeprefix("text_model.") for name in own]
        if not own:
            continue
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6 if alphas else 4,
            target_modules=own,
            rank_pattern=dict.fromkeys(own[::3], 2) if alphas else {},
            alpha_pattern=dict.fromkeys(own[::4], 3) if alphas else {},
            init_lora_weights=False,
        )
        peft.inject_adapter_in_model(config, model)
        saved[f"{component}_lora_layers"] = peft.get_peft_model_state_dict(model, adapter_name="default")
        if alphas:
            plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
            saved[f"{component}_lora_adapter_metadata"] = plain
    pipe.save_lora_weights(str(folder), **saved)
    return predict(family, pipe)


@pytest.mark.parametrize("alphas", [True, False], ids=["alphas", "no-alphas"])
@pytest.mark.parametrize("model", FAMILIES)
def test_we_predict_what_diffusers_predicts_from_its_file(model, alphas, tmp_path):
    family = FAMILIES[model]
    for kind in ("mixed", "both") if family.text else ("mixed", "attention"):
        theirs = from_peft(family, kind, tmp_path / kind, alphas)
        assert (theirs - predict(family, family.pipe())).abs().max() > 1e-4
        adapter = lk.Adapter.load(tmp_path / kind)
        assert adapter.updates.keys() == adapted(family, kind).keys()
        ours = family.pipe()
        lk.attach(ours, adapter)
        torch.testing.assert_close(predict(family, ours), theirs, atol=CLOSE, rtol=0, msg=lambda t, k=kind: f"{k}: {t}")
