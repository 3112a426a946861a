"""Textual-inversion embeddings in LoRA files and in files of their own.

    bundle_emb.sks.string_to_param.*            [n, dim]   of the only text encoder, in a kohya file: `sks`
    bundle_emb.sks.clip_l, bundle_emb.sks.clip_g           of SDXL's two: `sks.clip_l`, `sks.clip_g`
    sks.safetensors: {"sks": [n, dim]}, or {"clip_l": ..., "clip_g": ...}     one token, a file of its own

A1111 and its successors take bundled tokens with the LoRA. ComfyUI takes them from a copy of the file in its folder
`models/embeddings`, all tokens of the file as one. diffusers refuses a LoRA file that has them; it and ComfyUI read a
token's own file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import count

from torch import Tensor

PREFIX = "bundle_emb."
# What trainers call a text encoder's part of a token; "_out": of the encoder's outputs (OneTrainer).
_PART = re.compile(r"\.(?P<part>(clip_l|clip_g|t5|t5xxl|llama|qwen|gemma)(_out)?)$")


def name_of(key: str) -> str:
    """A bundled key's name in `Adapter.embeddings`."""
    token, _, part = key.removeprefix(PREFIX).partition(".")
    return token if part.startswith(("string_to_param", "emb_params")) else f"{token}.{part}"


def unbundled(embeddings: Mapping[str, Tensor]) -> list[str]:
    """What a kohya file cannot hold of these, one line each."""
    lines = []
    for name, vectors in embeddings.items():
        token, _ = token_and_part(name)
        if not token or "." in token:
            lines.append(f"token '{name}': readers take what stands in front of the first dot for the token")
        elif vectors.dim() not in (1, 2):
            lines.append(f"token '{name}' has shape {list(vectors.shape)}; expected [vectors, dim]")
    return lines


def bundled(embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a kohya file that hold these."""
    tensors = {}
    for name, vectors in embeddings.items():
        token, part = token_and_part(name)
        tensors[f"{PREFIX}{token}.{part or 'string_to_param.*'}"] = _rows(vectors)
    return tensors


def own_files(embeddings: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors: one file for each token, named so that it can be typed into a prompt.

    Tokens with the same name there, such as `a` and `<a>`, are numbered: a.safetensors, a-2.safetensors. Case does not
    tell files apart on every disk.
    """
    names: dict[str, str] = {}  # token -> file
    files: dict[str, dict[str, Tensor]] = {}
    for name, vectors in embeddings.items():
        token, part = token_and_part(name)
        if token not in names:
            names[token] = _free(re.sub(r"[^\w-]+", "-", token).strip("-") or "token", names.values())
        files.setdefault(names[token], {})[part or token] = _rows(vectors)
    return files


def _free(stem: str, taken: Iterable[str]) -> str:
    """Return the first of stem.safetensors, stem-2.safetensors, ... that is not taken."""
    lower = {name.lower() for name in taken}
    numbered = (f"{stem}{'' if n == 1 else f'-{n}'}.safetensors" for n in count(1))
    return next(name for name in numbered if name.lower() not in lower)


def token_and_part(name: str) -> tuple[str, str]:
    """(token, the text encoder's part of it or "")."""
    match = _PART.search(name)
    return (name, "") if match is None else (name[: match.start()], match["part"])


def _rows(vectors: Tensor) -> Tensor:
    """[n, dim]; a single vector is often kept as [dim]."""
    return vectors if vectors.dim() != 1 else vectors[None]
