"""A GGUF adapter, which llama.cpp and Ollama read: one file, through the `gguf` package (an extra).

    general.architecture = the base's   general.type = "adapter"   adapter.type = "lora"   adapter.lora.alpha: f32
    <GGUF's tensor>.lora_a  [r, in]       of token_embd [vocab, r]
    <GGUF's tensor>.lora_b  [out, r]      rows of q and k permuted where the base's are (`gguf_names`)

llama.cpp scales a module by alpha / r, with the module's r and the file's only alpha (alpha 0: by 1). rsLoRA and other
alphas are folded into B. Tensors are written in F32, F16 or BF16 like the factors; or in Q8_0 if their rows are
multiples of 32 elements: lora_a of most linears, lora_b if the rank is a multiple of 32. The others are then in F16, as
in llama.cpp's converter. lorakit's metadata, with the parts of packed projections, is in the pair `lorakit.metadata`,
which other programs ignore.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors, Kind
from ..errors import AdapterError, listing
from ..io.atomic import replacing
from ..io.gguf_header import is_gguf, read_gguf
from ..io.json_object import parse_json
from .format import Format, ReadOptions, WriteOptions
from .gguf_names import (
    OUTPUT,
    TOKENS,
    Architecture,
    base_config,
    heads,
    layer_count,
    of_file,
    of_model,
    package,
    permute,
    tensor_names,
    unpermute,
)
from .gguf_types import BF16, BLOCK, F16, F16_MOST, F32, Q8_0, encode, type_of
from .packed import parts_of
from .scale import clean, commonest, config_of, folded
from .unheld import convolutions, embeddings, other_kinds

__all__ = ["FORMAT", "losses", "names_of", "read", "rows_of", "write"]
METADATA = "lorakit.metadata"
_UNREAD = {"adapter.alora.invocation_tokens": "aLoRA, which is active after its tokens only, is not supported"}


def losses(adapter: Adapter) -> list[str]:
    """What a GGUF adapter cannot hold of this adapter, one line each."""
    lost = []
    if adapter.saved:
        lost.append(
            f"{len(adapter.saved)} saved weights ({listing(adapter.saved, 2)}): GGUF adapters hold only factors"
        )
    return lost + other_kinds(adapter, "lora") + embeddings(adapter) + convolutions(adapter)


def write(adapter: Adapter, path: Path, base: Any = None, kind: str | None = None) -> Path:
    """Write a GGUF adapter and return the path.

    base: its base's folder (with config.json) or a transformers config; default: the folder in the adapter's config.
    kind: "q8_0" for blocks of 8 bits; default: each tensor's own precision.

    AdapterError, and nothing written, if the format cannot hold all of the adapter, or the base's architecture is not
    known or does not have the modules.
    """
    assert kind in (None, Q8_0), kind
    adapter.check()
    lost = losses(adapter)
    if lost:
        raise AdapterError(f"{path}: a GGUF adapter cannot hold all of this adapter\n  " + "\n  ".join(lost))
    if path.is_dir():
        raise AdapterError(f"{path} is a folder; a GGUF adapter is one file")
    gguf = package()
    values = _base(adapter, base)
    architecture = of_model(values.get("model_type"), "the base")
    names = _names(adapter, architecture, values)
    alpha = commonest(_alpha(f) for f in adapter.factors.values())
    pairs = {}
    for module, tensor in sorted(names.items()):
        f = adapter.factors[module]
        B = folded(f.B, _alpha(f) / alpha)
        count = heads(tensor, values) if architecture.permuted else None
        pairs[f"{tensor}.lora_a"] = f.A.T if tensor == TOKENS else f.A
        pairs[f"{tensor}.lora_b"] = B if count is None else permute(B, count, module)
    packed = {m: list(f.parts) for m, f in adapter.factors.items() if f.parts}
    ours = {**adapter.metadata, **({"packed": packed} if packed else {})}
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture.name)
        try:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            if ours:
                writer.add_string(METADATA, json.dumps(ours, sort_keys=True))
            for name, t in pairs.items():
                _add(writer, name, t, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return path


def read(path: Path, base: Any = None) -> Adapter:
    """Read a GGUF adapter, with transformers' module names. `base`: as in `write`; required if the architecture
    permutes the rows of q and k. AdapterError if the file is no such adapter.
    """
    pairs, tensors = read_gguf(path)
    kind = pairs.get("general.type")
    if kind != "adapter" or pairs.get("adapter.type") != "lora":
        what = f"general.type {kind!r}, adapter.type {pairs.get('adapter.type')!r}"
        raise AdapterError(f"{path} is no LoRA adapter but a GGUF file with {what}\n  expected 'adapter' and 'lora'")
    for key, what in _UNREAD.items():
        if key in pairs:
            raise AdapterError(f"{path}: key '{key}': {what}")
    architecture = of_file(pairs.get("general.architecture"), path)
    alpha = _read_alpha(pairs.get("adapter.lora.alpha", 0.0), path)
    ours = parse_json(str(pairs.get(METADATA, "{}")), f"{path}: key '{METADATA}'")
    packed = ours.pop("packed", {})
    values = base_config(base) if base is not None else None
    modules = {tensor: module for module, tensor in tensor_names(architecture, layer_count(tensors)).items()}
    factors = {}
    for tensor in dict.fromkeys(name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors):
        A, B = (tensors.get(f"{tensor}.lora_{half}") for half in "ab")
        module = modules.get(tensor)
        if A is None or B is None or module is None:
            raise AdapterError(f"{path}: tensor '{tensor}': {_unfit(A, B, architecture)}")
        factors[module] = _factors(module, tensor, A, B, alpha, architecture, values, packed, path)
    if not factors:
        raise AdapterError(f"{path} holds no tensors")
    return Adapter(config_of(factors), factors, metadata=ours).check()


def names_of(adapter: Adapter, base: Any = None) -> dict[str, str]:
    """module -> the tensor of the base's GGUF that it adapts. AdapterError as in `write`."""
    values = _base(adapter, base)
    return _names(adapter, of_model(values.get("model_type"), "the base"), values)


def rows_of(module: str, delta: Any, base: Any) -> Any:
    """A module's ΔW [out, in], torch or numpy, with its rows in GGUF's order."""
    values = base_config(base)
    architecture = of_model(values.get("model_type"), "the base")
    tensor = tensor_names(architecture, layer_count([module])).get(module)
    count = heads(tensor, values) if tensor is not None and architecture.permuted else None
    return delta if count is None else permute(delta, count, module)


def _factors(
    module: str,
    tensor: str,
    A: Tensor,
    B: Tensor,
    alpha: float,
    architecture: Architecture,
    base: Mapping[str, Any] | None,
    packed: Any,
    path: Path,
) -> Factors:
    if A.dim() != 2 or B.dim() != 2:
        raise AdapterError(f"{path}: '{tensor}' has A {list(A.shape)} and B {list(B.shape)}; expected matrices")
    tokens = tensor == TOKENS
    A = A.T.contiguous() if tokens else A
    if A.dtype != B.dtype:  # one of them in Q8_0, and then in float32 here
        A, B = A.float(), B.float()
    count = heads(tensor, base) if architecture.permuted else None
    B = B if count is None else unpermute(B, count, module).contiguous()
    alpha = alpha or float(A.shape[0])  # llama.cpp's 0: scale 1
    parts = parts_of(packed, module, A, B, path)
    kind: Kind = "embedding" if tokens else "linear"
    turned = architecture.transposed and not tokens and tensor != OUTPUT
    return Factors(A, B, clean(alpha / (sum(parts) if parts else 1)), kind, transposed=turned, parts=parts)


def _unfit(A: Tensor | None, B: Tensor | None, architecture: Architecture) -> str:
    if A is None and B is None:
        return "expected names that end in .lora_a and .lora_b"
    if A is None or B is None:
        return f"it has a lora_{'b' if A is None else 'a'} and no lora_{'a' if A is None else 'b'}"
    return f"no module of the architecture '{architecture.name}' has that name"


def _names(adapter: Adapter, architecture: Architecture, base: Mapping[str, Any]) -> dict[str, str]:
    """module -> GGUF's tensor, for the adapter's modules. AdapterError for modules that the base's GGUF lacks."""
    known = tensor_names(architecture, layer_count(adapter.factors))
    tied = base.get("tie_word_embeddings") is True
    for m in adapter.factors:
        if (known.get(m) == OUTPUT and tied) or (m not in known and m in architecture.modules):  # Gemma's always is
            raise AdapterError(
                f"the base's '{m}' is its token embedding, and its GGUF has no {OUTPUT} to adapt\n"
                "  leave that module out of the adapter"
            )
    unknown = [m for m in adapter.factors if m not in known]
    if unknown:
        raise AdapterError(
            f"{len(unknown)} modules are not in the base's architecture '{architecture.name}': {listing(unknown, 3)}\n"
            f"  it has {listing(architecture.modules, 20).replace('{}', 'N')}"
        )
    names = {m: known[m] for m in adapter.factors}
    for m, tensor in names.items():
        if (adapter.factors[m].kind == "embedding") != (tensor == TOKENS):
            raise AdapterError(f"'{m}' holds factors of kind '{adapter.factors[m].kind}', which do not fit {tensor}")
    return names


def _base(adapter: Adapter, base: Any) -> dict[str, Any]:
    own = adapter.config.base
    if base is None and own and (Path(own).expanduser() / "config.json").is_file():
        base = own
    return base_config(base)


def _alpha(f: Factors) -> float:
    """The file's alpha if this were its only module."""
    return clean(f.scale * f.A.shape[0])


def _read_alpha(value: Any, path: Path) -> float:
    """The shortest decimal number that rounds to this f32. AdapterError if it is no number."""
    import numpy

    if not isinstance(value, float):
        raise AdapterError(f"{path}: key 'adapter.lora.alpha' is {value!r}; expected a number")
    return float(str(numpy.float32(value)))


def _add(writer: Any, name: str, tensor: Tensor, kind: str | None) -> None:
    """Add a tensor in `kind`, or in its own dtype; float64, which llama.cpp does not read, becomes float32."""
    values = tensor.detach().float().cpu().contiguous().numpy()
    if kind is not None and values.shape[-1] % BLOCK:
        kind = F16 if np.abs(values).max() <= F16_MOST else F32
    kind = kind or {torch.bfloat16: BF16, torch.float16: F16}.get(tensor.dtype, F32)
    writer.add_tensor(name, encode(values, kind, name), raw_dtype=type_of(kind))


class Gguf(Format):
    """GGUF's adapter, behind the interface of all formats."""

    name = "gguf"
    takes_blocks = True

    def owns(self, path: Path) -> bool:
        return not path.is_dir() and is_gguf(path)

    def read(self, path: Path, options: ReadOptions) -> Adapter:
        return read(path, options.base)

    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        return losses(adapter)

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        return write(adapter, path, options.base, options.blocks)


FORMAT = Gguf()
