"""Map transformers' modules to the tensors of a GGUF model, and permute the rows that llama.cpp orders differently.

Tensor names come from the `gguf` package's map. It knows many names for one tensor; the modules listed here for each
`model_type` make it invertible.

llama.cpp rotates neighbouring pairs of a head's rows where transformers rotates its two halves, so for some
architectures the rows of q and k are permuted, head by head: row i of half h becomes row 2i + h (llama.cpp,
`LlamaModel.permute`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from ..errors import AdapterError, did_you_mean
from ..io.json_object import read_json

MAX_LAYERS = 1024  # far above any model; a larger number in a name would make the map huge
_ENDS = ("model.embed_tokens", "lm_head")
_ATTENTION = tuple(f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkvo")
_GATED = (*_ENDS, *_ATTENTION, *(f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")))
_STARCODER2 = (*_ENDS, *_ATTENTION, "model.layers.{}.mlp.c_fc", "model.layers.{}.mlp.c_proj")
_PHI = (*_ENDS, *_ATTENTION[:3], *(f"model.layers.{{}}.{name}" for name in ("self_attn.dense", "mlp.fc1", "mlp.fc2")))
_PHI3 = (*_ENDS, *(f"model.layers.{{}}.{n}_proj" for n in ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down")))
_GPT2 = (
    "transformer.wte",
    "lm_head",
    *(f"transformer.h.{{}}.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
)
Rows = TypeVar("Rows", Tensor, np.ndarray)
TOKENS, OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Architecture:
    """`name`: GGUF's name. `modules`: transformers' names, with {} for the layer number. `permuted`: whether the rows
    of q and k are permuted.
    """

    name: str
    modules: tuple[str, ...]
    permuted: bool = False
    transposed: bool = False  # transformers has Conv1D for its linears


ARCHITECTURES = {
    "llama": Architecture("llama", _GATED, permuted=True),
    "mistral": Architecture("llama", _GATED, permuted=True),
    "granite": Architecture("granite", _GATED, permuted=True),
    "qwen2": Architecture("qwen2", _GATED),
    "qwen3": Architecture("qwen3", _GATED),
    "gemma": Architecture("gemma", _GATED),
    "gemma2": Architecture("gemma2", _GATED),
    "gemma3_text": Architecture("gemma3", _GATED),
    "olmo2": Architecture("olmo2", _GATED),
    "starcoder2": Architecture("starcoder2", _STARCODER2),
    "phi": Architecture("phi2", _PHI),
    "phi3": Architecture("phi3", _PHI3),
    "gpt2": Architecture("gpt2", _GPT2, transposed=True),
}


def of_model(model_type: Any, where: str) -> Architecture:
    """The architecture of a transformers `model_type`. AdapterError listing the known ones."""
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        near = did_you_mean(str(model_type), ARCHITECTURES)
        raise AdapterError(
            f"{where}: model_type '{model_type}' has no GGUF name map here{near}\n  known: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def of_file(name: Any, where: Path) -> Architecture:
    """The architecture that a GGUF file names. AdapterError listing the known ones."""
    for architecture in ARCHITECTURES.values():
        if architecture.name == name:
            return architecture
    known = ", ".join(dict.fromkeys(a.name for a in ARCHITECTURES.values()))
    raise AdapterError(
        f"{where}: general.architecture is {name!r}, of which the modules' names are not known here\n  known: {known}"
    )


def tensor_names(architecture: Architecture, layers: int) -> dict[str, str]:
    """module -> GGUF's tensor, one to one."""
    gguf = package()
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(number, layers)
    modules = [m.format(n) for m in architecture.modules for n in (range(layers) if "{}" in m else range(1))]
    return {m: f"{name}.weight" for m in modules if (name := known.get_name(m)) is not None}


def layer_count(names: Iterable[str]) -> int:
    """The number of layers: one more than the largest number in these names. AdapterError above `MAX_LAYERS`."""
    count = 1 + max((int(n[:9]) for name in names for n in re.findall(r"\.(\d+)\.", name)), default=0)
    if count > MAX_LAYERS:
        raise AdapterError(f"a tensor is of layer {count - 1:,}; no model has that many")
    return count


def heads(tensor: str, base: Mapping[str, Any] | None) -> int | None:
    """The number of heads in the rows of a permuted architecture's tensor; None unless it is q or k. AdapterError if
    the base's config is missing or wrong.
    """
    key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(tensor.split(".")[-2])
    if key is None:
        return None
    if base is None:
        raise AdapterError(
            f"'{tensor}' is permuted head by head, and the number of heads is not in the file\n"
            "  give the base: base=FOLDER (--base FOLDER), the one with its config.json"
        )
    count = base.get(key) or base.get("num_attention_heads")
    if not isinstance(count, int) or count < 1:
        raise AdapterError(f"the base's {key} is {count!r}; expected a number of heads")
    return count


def permute(B: Rows, count: int, module: str) -> Rows:
    """Rows from transformers' order to llama.cpp's: [heads, 2, d/2] to [heads, d/2, 2]; torch or numpy. `count`: heads.
    AdapterError if they do not divide the rows.
    """
    return _swap(B, count, module, (2, -1))


def unpermute(B: Rows, count: int, module: str) -> Rows:
    """The inverse of `permute`."""
    return _swap(B, count, module, (-1, 2))


def _swap(B: Rows, count: int, module: str, split: tuple[int, int]) -> Rows:
    if B.shape[0] % (2 * count):
        raise AdapterError(
            f"'{module}' has {B.shape[0]} output rows, not a multiple of {count} heads of even size\n"
            "  is it another base?"
        )
    return B.reshape(count, *split, B.shape[1]).swapaxes(1, 2).reshape(B.shape)


def base_config(base: Any) -> dict[str, Any]:
    """A base's config as plain data: from its folder or config.json, a transformers config, or a mapping. AdapterError
    if there is none.
    """
    if base is None:
        raise AdapterError(
            "a GGUF adapter names its base's architecture, and some have the rows of q and k permuted head by head\n"
            "  give the base: base=FOLDER (--base FOLDER), the one with its config.json"
        )
    if isinstance(base, Mapping):
        return dict(base)
    if hasattr(base, "to_dict"):
        return base.to_dict()
    path = Path(base).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise AdapterError(f"no base at '{base}': expected the folder of a transformers model, with its config.json")
    return read_json(path)


def package() -> Any:
    """The `gguf` package. AdapterError if this extra is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise AdapterError("GGUF needs the gguf package: pip install 'lorakit[gguf]'") from error
    return gguf
