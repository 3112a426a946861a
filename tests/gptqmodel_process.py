"""What lorakit does on a GPTQ or AWQ checkpoint that transformers and gptqmodel loaded, printed as JSON:
`python THIS METHOD BACKEND FOLDER`. A process of its own, as the library changes environment variables and prints while
it is imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else it compiles for minutes

import packed_checkpoints as checkpoints
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

import lorakit as lk
from lorakit.errors import StateError
from lorakit.layers.bases import base_of, quantized

CONFIG = lk.LoraConfig(rank=4, alpha=8, targets="all-linear")


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(**tiny.example(model)).logits.float().square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def main(method: str, backend: str, folder: Path) -> dict[str, Any]:
    how = checkpoints.awq_config() if method == "awq" else checkpoints.gptq_config(desc_act=method == "act_order")
    _, dense = checkpoints.save(folder, how)
    config = AwqConfig(backend=backend) if method == "awq" else GPTQConfig(bits=4, backend=backend)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, quantization_config=config)
    module = model.model.layers[0].mlp.up_proj
    said: dict[str, Any] = {
        "class": type(module).__name__,
        "quantization": base_of(module).quantization,
        "modules": len(quantized(model)),
        "dense": apart(base_of(module).dense(module), dense.model.layers[0].mlp.up_proj.weight),
    }
    tiny.randomise_factors(lk.attach(model, CONFIG), size=0.05)
    said["attached"] = getattr(module, "linear_mode", "has none")
    lk.attach(dense, lk.capture(model), trainable=True)  # without force
    with torch.no_grad():
        ours, theirs = (m.eval()(**tiny.example(m)).logits for m in (model, dense))
    said["logits"] = apart(ours, theirs)
    ours, theirs = gradients(model), gradients(dense)
    said["gradients"] = max(apart(ours[name], theirs[name]) for name in theirs)
    lk.detach(model)
    said["detached"] = getattr(module, "linear_mode", "has none")
    with torch.no_grad():
        model.eval()(**tiny.example(model))
    try:
        lk.attach(model, CONFIG)
        said["after evaluation"] = "attached"
    except StateError as error:
        said["after evaluation"] = str(error)
    return said


if __name__ == "__main__":
    said = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    print("\n" + json.dumps(said))
