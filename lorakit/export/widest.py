"""The one format of a diffusion adapter's file that most image programs read, for use before one knows the program.

    SD1, SD2, SDXL        kohya       A1111, Forge, ComfyUI, diffusers, sd-scripts
    SD3, Flux, Chroma     diffusers   diffusers; ComfyUI maps these names
    Qwen-Image, Z-Image   comfyui     ComfyUI; diffusers' loader converts it
    Flux.2, Wan           comfyui     the same, where only modules of the blocks are adapted: of the rest diffusers
                                      makes errors, and gets its own format

tests/export/test_widest.py loads each with real diffusers, and looks its keys up as ComfyUI does.
"""

from __future__ import annotations

import re

from ..adapter.adapter import Adapter
from ..formats.kohya import written_for

_KOHYA = ("sd1", "sd2", "sdxl")
_COMFYUI = ("qwen_image", "z_image")
_COMFYUI_IN_BLOCKS = ("flux2", "wan")
_OUTSIDE = re.compile(r"(^|\.)(norm_out|proj_out|\w*embed\w*|condition_\w+)\b")


def widest_format(adapter: Adapter) -> str:
    """Return "kohya", "diffusers" or "comfyui". Embeddings, and updates other than low-rank factors, need kohya's."""
    model = written_for(adapter)
    plain = all(update.variant == "lora" for update in adapter.updates.values())
    if model in _KOHYA or adapter.embeddings or (model is not None and not plain):
        return "kohya"
    inside = not any(_OUTSIDE.search(module.partition(".")[2]) for module in adapter.updates)
    inside = inside and all(re.search(r"\.\d+\.", module) for module in adapter.updates)
    return "comfyui" if model in _COMFYUI or (model in _COMFYUI_IN_BLOCKS and inside) else "diffusers"
