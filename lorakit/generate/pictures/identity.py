"""Which pipeline and which adapters a picture was made with: their hashes, and what differs when it is made again.

Model hash    of a checkpoint file A1111's: 10 digits of its sha256. A folder has no such file: there it is of 64
              elements of every parameter, as loaded, so it depends on the precision.
Lora hash     CivitAI's AutoV3: 12 digits of the sha256 of what follows a safetensors file's header; of another
              file, of all its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...formats import find, weights_of
from ...formats.kohya_metadata import file_hashes
from ...version import VERSION
from .png_text import Lora, Parameters

MODEL_DIGITS, LORA_DIGITS = 10, 12
PROGRAM = f"lorakit {VERSION}"
SAMPLES = 64  # elements of each parameter


def model_hash(pipe: Any, source: str) -> str:
    """Return the hash of a pipeline. `source`: what it was loaded from. Call it before adapters are attached."""
    path = Path(source).expanduser()
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:MODEL_DIGITS]
    sha256 = hashlib.sha256()
    for component, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            for name, tensor in sorted(module.state_dict().items()):
                sha256.update(f"{component}.{name} {list(tensor.shape)} ".encode())
                flat = tensor.detach().flatten()
                at = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLES, len(flat))).long()
                sha256.update(flat[at.to(flat.device)].cpu().float().numpy().tobytes())
    return sha256.hexdigest()[:MODEL_DIGITS]


def model_name(source: str) -> str:
    """Return a model's name: of a file or folder without its path, of a hub id without its owner."""
    path = Path(source)
    return path.stem if path.is_file() else path.name


def precision_name(dtype: torch.dtype) -> str:
    """Return a precision as `--precision` has it: bf16, fp16 or fp32."""
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(dtype).removeprefix("torch.")]


def libraries() -> str:
    """Return the versions of the libraries that a picture depends on."""
    import diffusers

    return f"diffusers {diffusers.__version__}, torch {torch.__version__}"


def lora_hash(source: str) -> str | None:
    """Return the hash of an adapter's file; None if its tensors are in several."""
    file = weights_of(find(source))
    if file is None:
        return None
    if file.suffix == ".safetensors":
        return file_hashes(file)[0][:LORA_DIGITS]
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:LORA_DIGITS]


def public_source(source: str) -> str | None:
    """Return what may be written of a path or hub id: None for a path outside the current folder, which names its
    user's folders.
    """
    path = Path(source)
    return None if path.is_absolute() or source.startswith("~") or ".." in path.parts else source


def differences(made: Parameters, model: str, digest: str, loras: Mapping[str, Lora]) -> list[str]:
    """Return why the picture of these parameters may look different now, a line each.

    `made`: of the picture; `model`, `digest`: this pipeline's name and hash; `loras`: the adapters at hand.
    """
    lines = []
    if made.model_hash and made.model_hash != digest:
        lines.append(
            f"the model: it was made with {made.model or 'one'} ({made.model_hash}), this is {model} ({digest})"
        )
    for name, lora in made.loras.items():
        own = loras.get(name)
        if own is None:
            known = f" ({lora.hash})" if lora.hash else ""
            lines.append(f"an adapter: it was made with '{name}'{known}, which is not given: --adapter {name}=PATH")
        elif lora.hash and own.hash and lora.hash != own.hash:
            lines.append(f"an adapter: '{name}' has the hash {own.hash}, and was {lora.hash} when it was made")
    return lines
