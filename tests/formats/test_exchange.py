"""Adapters between lorakit and diffusers, through files, for tiny pipelines of eight families: what is written here
predicts the same in diffusers, and what diffusers writes predicts the same here.
"""

from __future__ import annotations

import json
import re
from typing import Any

import diffusers as hub
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.bases.pipeline import as_module, components_of

from exchange_families import FAMILIES, KINDS, Family

CLOSE = 1e-5
BLOCK = re.compile(r"(blocks|layers|refiner)\.\d+\.(?!.*(norm1|norm1_context|norm)\.linear)")
ATTENTION = re.compile(r"(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)$")


def adapted(family: Family, kind: str) -> dict[str, nn.Module]:
    """The modules of a pipeline that a file of this kind changes, by full name."""
    model = as_module(family.pipe())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    text = {n: m for n, m in linears.items() if n.startswith("text_encoder") and re.search(r"(self_attn|mlp)\.\w+$", n)}
    denoiser = {n: m for n, m in linears.items() if n.startswith(family.denoiser)}
    attention = {n: m for n, m in denoiser.items() if ATTENTION.search(n)}
    return {
        "attention": attention,
        "blocks": {n: m for n, m in denoiser.items() if BLOCK.search(n) and isinstance(m, nn.Linear)},
        "all": denoiser,
        "mixed": denoiser | text,
        "text": text,
        "both": attention | text,
    }[kind]


def attached(family: Family, kind: str) -> Any:
    """A pipeline with random factors on the modules of this kind; `mixed`: ranks 1 to 3 and six alphas."""
    pipe, modules = family.pipe(), list(adapted(family, kind))
    config = lk.LoraConfig(rank=4, alpha=8, targets=modules)
    if kind == "mixed":
        config = config.replace(
            rank_pattern={f"^{re.escape(m)}": 1 + i % 3 for i, m in enumerate(modules)},
            alpha_pattern={f"^{re.escape(m)}": 0.5 + i % 6 for i, m in enumerate(modules)},
        )
    model = lk.attach(as_module(pipe), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".A", ".B")):
                parameter.normal_(std=0.3)
    return pipe


def predict(family: Family, pipe: Any) -> Tensor:
    with torch.no_grad():
        return family.predict(pipe)


def placed(pipe: Any) -> int:
    """How many modules of a pipeline carry a LoRA of PEFT's."""
    return sum("lora_A" in m._modules and len(m.lora_A) for c in components_of(pipe).values() for m in c.modules())


def cases(*, forms: bool) -> list[Any]:
    """(model, kind, format): every kind in diffusers' format, or the forms that its loader takes besides."""
    return [
        pytest.param(model, kind, format, id=f"{model}-{kind}-{format}")
        for model, family in FAMILIES.items()
        for format, kinds in (family.forms if forms else {"diffusers": KINDS}).items()
        for kind in kinds
        if family.text or kind not in ("text", "both")
    ]


@pytest.mark.parametrize("model, kind, format", cases(forms=False) + cases(forms=True))
def test_diffusers_predicts_what_we_predict_from_our_file(model, kind, format, tmp_path):
    family = FAMILIES[model]
    pipe = attached(family, kind)
    ours, base = predict(family, pipe), predict(family, family.pipe())
    assert (ours - base).abs().max() > 1e-3
    adapter = lk.capture(as_module(pipe))
    adapter.save(tmp_path / "x.safetensors", format)
    theirs = family.pipe()
    theirs.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    assert placed(theirs) == len(adapter.updates) == len(adapted(family, kind))
    torch.testing.assert_close(predict(family, theirs), ours, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfyui", "peft"])
@pytest.mark.parametrize("model", FAMILIES)
def test_our_file_predicts_the_same_on_a_fresh_pipeline(model, format, tmp_path):
    family = FAMILIES[model]
    for kind in KINDS if family.text else KINDS[:-2]:
        pipe = attached(family, kind)
        ours = predict(family, pipe)
        path = tmp_path / (kind if format == "peft" else f"{kind}.safetensors")
        lk.capture(as_module(pipe)).save(path, format)
        again = family.pipe()
        lk.attach(as_module(again), lk.Adapter.load(path))
        torch.testing.assert_close(predict(family, again), ours, atol=CLOSE, rtol=0, msg=lambda t, k=kind: f"{k}: {t}")
