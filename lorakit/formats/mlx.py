"""MLX's adapters (mlx-lm): a folder with `adapters.safetensors` and `adapter_config.json`, or the numbered file alone.
Read too: numpy's `adapters.npz` of mlx-examples, and mlx-vlm's folder (`<module>.A`, `.B`, alpha as the scale).

    <module>.lora_a  [in, r]      <module>.lora_b  [r, out]      of an embedding [vocab, r], [r, dim]
    <module>.m       [out]        DoRA's magnitude; of an embedding [vocab]

    y = x Wᵀ + scale · (x a) b        scale stands in the config as it is, so alpha = scale · r

All modules have one scale: where a module's differs, the rest goes into its lora_b. Ranks may differ. Modules have the
names of mlx-lm's models, which for Llama-like models are transformers'. PEFT calls its config `adapter_config.json`
too; the content tells them apart. lorakit's own metadata is in the header of the safetensors file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.dora import Dora
from ..adapter.lora import Factors
from ..adapter.update import Update
from ..errors import AdapterError, listing
from ..io.atomic import write_text
from ..io.json_object import parse_json, read_json
from ..io.tensors import write_tensors
from .format import Format, ReadOptions, WriteOptions
from .inside import DIFFUSERS_FILE
from .packed import parts_of
from .scale import clean, commonest, config_of, folded
from .unheld import convolutions, embeddings, other_kinds, part_dora

CONFIG, WEIGHTS, NPZ = "adapter_config.json", "adapters.safetensors", "adapters.npz"
OURS = ("packed", "transposed", "embeddings")  # in lorakit's part of the header, beside the adapter's metadata
# The last names of token embeddings in mlx-lm's models, whose shapes alone could be a linear's.
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "tok_embeddings", "embed_in", "word_embeddings", "embeddings", "embedding"}
)


def fits(keys: Iterable[str]) -> bool:
    """Whether a file's keys are MLX's."""
    keys = list(keys)
    endings = {key.rsplit(".", 1)[-1] for key in keys}
    return {"lora_a", "lora_b"} <= endings or (bool(keys) and endings == {"A", "B"})


def is_mlx_config(values: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is MLX's, and not PEFT's."""
    return "peft_type" not in values and (
        "lora_parameters" in values or "fine_tune_type" in values or {"rank", "alpha"} <= values.keys()
    )


def weights_in(folder: Path) -> Path:
    """The tensors' file of MLX's folder; older ones are numpy's archives."""
    return folder / NPZ if (folder / NPZ).is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def is_mlx(folder: Path) -> bool:
    """Whether a folder is MLX's."""
    return weights_in(folder).is_file() and (folder / CONFIG).is_file() and is_mlx_config(read_json(folder / CONFIG))


def read(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], alpha: float | None = None) -> Adapter:
    """The adapter of these tensors and this header, read from the file `path`.

    The scale is in the config beside the file; without one, `alpha` must be given. AdapterError if neither is there, or
    the tensors are malformed.
    """
    beside = path.parent / CONFIG
    values = read_json(beside) if beside.is_file() else {}
    values = values if is_mlx_config(values) else {}
    scale = _scale(values, beside, alpha) if values else None
    if scale is None and alpha is None:
        raise AdapterError(
            f"{path} is an MLX adapter without its {CONFIG}, which holds the scale\n"
            "  put that file beside it, or give alpha = scale · rank: alpha=160, say (--alpha 160) for rank 8 and "
            "mlx-lm's own scale, 20"
        )
    ours = parse_json(header.get("lorakit", "{}"), f"{path} (its header)")
    if not any(key.endswith(".lora_a") for key in tensors):  # mlx-vlm's: <module>.A, <module>.B
        names = {"A": "lora_a", "B": "lora_b"}
        tensors = {f"{m}.{names.get(last, last)}": t for (m, _, last), t in _parted(tensors)}
    modules = [key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")]
    factors: dict[str, Factors] = {}
    updates: dict[str, Update] = {}
    saved: dict[str, Tensor] = {}
    for module in modules:
        a, b = tensors.get(f"{module}.lora_a"), tensors.get(f"{module}.lora_b")
        f = updates[module] = factors[module] = _factors(module, a, b, scale, alpha, ours, path)
        if f"{module}.m" in tensors:
            updates[module] = _dora(module, f, tensors[f"{module}.m"], path)
    for key, tensor in tensors.items():
        module, _, last = key.rpartition(".")
        if last == "lora_b" and module not in factors:
            raise AdapterError(f"{path}: '{module}' has a lora_b and no lora_a")
        if last not in ("lora_a", "lora_b") and not (last == "m" and module in factors):
            saved[re.sub(r"\.(linear|embedding)\.(?=[^.]+$)", ".", key) if _inside(module, factors) else key] = tensor
    dropout, model = (values.get("lora_parameters") or {}).get("dropout"), values.get("model")
    known = {"dropout": dropout} if isinstance(dropout, int | float) and 0 <= dropout < 1 else {}
    if not factors:
        raise AdapterError(
            f"{path} is no MLX adapter: it has no key that ends in .lora_a (it has {listing(tensors, 3)})"
        )
    config = config_of(factors, base=model if isinstance(model, str) else None, **known)
    return Adapter(config, updates, saved, {k: v for k, v in ours.items() if k not in OURS}).check()


def losses(adapter: Adapter) -> list[str]:
    """What MLX's format cannot hold of this adapter, one line each."""
    lost = other_kinds(adapter, "lora", "dora") + embeddings(adapter)
    lost += convolutions(adapter, ": mlx-lm adapts linear layers and embeddings")
    matrices = {m: adapter.updates[m] for m, f in adapter.factors.items() if f.kind != "conv"}
    lost += part_dora(matrices, "MLX")
    # The rows of an embedding's weight are its inputs, the tokens.
    by_column = [
        m
        for m, u in matrices.items()
        if u.variant == "dora" and u.outputs_independent == (adapter.factors[m].kind == "embedding")
    ]
    if by_column:
        lost.append(
            f"DoRA's magnitude of {listing(by_column, 2)}: MLX has one number for each row of the weight, this one for "
            "each column"
        )
    stacked = [n for n, t in adapter.saved.items() if t.dim() > 2]
    if stacked:
        lost.append(f"saved weights of more than two axes ({listing(stacked, 2)}), which MLX lays out in another order")
    return lost


def write(adapter: Adapter, path: Path) -> Path:
    """Write MLX's folder and return it. AdapterError, and nothing written, if it cannot hold all of the adapter."""
    adapter.check()
    lost = losses(adapter)
    if not adapter.factors:
        lost.append("it has no low-rank factors")
    if lost:
        raise AdapterError(f"{path}: MLX's format cannot hold all of this adapter\n  " + "\n  ".join(lost))
    scale = commonest(clean(f.scale) for f in adapter.factors.values())
    scale = next(f.scale for f in adapter.factors.values() if clean(f.scale) == scale)  # without the rounding
    tensors: dict[str, Tensor] = {}
    for module, f in adapter.factors.items():
        ratio = 1.0 if clean(f.scale) == clean(scale) else f.scale / scale
        tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"] = f.A.T, folded(f.B, ratio).T
        own = adapter.updates[module].tensors()
        if "magnitude" in own:
            tensors[f"{module}.m"] = own["magnitude"].flatten()
    for name, tensor in adapter.saved.items():
        module, _, last = name.rpartition(".")
        adapted = adapter.factors.get(module)
        inner = "" if adapted is None else "embedding." if adapted.kind == "embedding" else "linear."
        tensors[f"{module}.{inner}{last}"] = tensor
    ours = {
        **adapter.metadata,
        "packed": {m: list(f.parts) for m, f in adapter.factors.items() if f.parts},
        "transposed": sorted(m for m, f in adapter.factors.items() if f.transposed),
        "embeddings": sorted(m for m, f in adapter.factors.items() if f.kind == "embedding"),
    }
    values = {
        "fine_tune_type": "dora" if any(u.variant == "dora" for u in adapter.updates.values()) else "lora",
        "num_layers": -1,  # all: layers that the file lacks get updates of zero
        "lora_parameters": {
            "rank": commonest(f.A.shape[0] for f in adapter.factors.values()),
            "scale": scale,
            "dropout": adapter.config.dropout,
            "keys": sorted({_within_layer(m) for m in adapter.factors}),
        },
        **({"model": adapter.config.base} if adapter.config.base else {}),
    }
    write_tensors(path / WEIGHTS, tensors, {"format": "mlx", "lorakit": json.dumps(ours, sort_keys=True)})
    write_text(path / CONFIG, json.dumps(values, indent=4, sort_keys=True) + "\n")
    return path


def _scale(values: Mapping[str, Any], where: Path, alpha: float | None) -> float:
    """The config's scale. AdapterError if it has none, is not a LoRA's, or `alpha` was given too."""
    kind = values.get("fine_tune_type") or "lora"
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"{where}: fine_tune_type is {kind!r}; lorakit reads lora and dora\n"
            "  for fully fine-tuned weights, lorakit extract makes an adapter"
        )
    if alpha is not None:
        raise AdapterError(f"{where} holds the scale\n  leave out alpha")
    if "alpha" in values and "lora_parameters" not in values:  # mlx-vlm: y = x Wᵀ + alpha · (x A) B
        values = {"lora_parameters": {"scale": values["alpha"]}}
    parameters = values.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not (scale > 0 and math.isfinite(scale)):
        raise AdapterError(f"{where}: lora_parameters.scale is {scale!r}; expected a positive number")
    return float(scale)


def _parted(tensors: Mapping[str, Tensor]) -> list[tuple[tuple[str, str, str], Tensor]]:
    return [(key.rpartition("."), tensor) for key, tensor in tensors.items()]


def _factors(
    module: str,
    a: Tensor | None,
    b: Tensor | None,
    scale: float | None,
    alpha: float | None,
    ours: Mapping[str, Any],
    path: Path,
) -> Factors:
    if a is None or b is None:
        raise AdapterError(f"{path}: '{module}' has a lora_a and no lora_b")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or 0 in a.shape:
        stacked = "\n  those of stacked experts are not supported" if a.dim() == 3 else ""
        raise AdapterError(
            f"{path}: '{module}' has lora_a {list(a.shape)}, lora_b {list(b.shape)}; expected [in, r] and [r, "
            f"out]{stacked}"
        )
    A, B = a.T.contiguous(), b.T.contiguous()
    parts = parts_of(ours.get("packed"), module, A, B, path)
    listed, turned = ours.get("embeddings"), ours.get("transposed")
    embedding = module in listed if isinstance(listed, list) else module.rsplit(".", 1)[-1] in EMBEDDINGS
    rank = A.shape[0] // (sum(parts) if parts else 1)
    return Factors(
        A,
        B,
        clean(scale * rank) if scale is not None else float(alpha or 0),
        "embedding" if embedding else "linear",
        transposed=isinstance(turned, list) and module in turned,
        parts=tuple(parts) if parts else None,
    )


def _dora(module: str, f: Factors, m: Tensor, path: Path) -> Dora:
    """`m`: one element for each row of the stored weight, [out], of an embedding [vocab]."""
    if m.dim() != 1:
        raise AdapterError(f"{path}: '{module}.m' has shape {list(m.shape)}; expected one axis")
    return Dora(f, m.reshape(1, -1) if f.kind == "embedding" else m.reshape(-1, 1))


def _inside(module: str, factors: Mapping[str, Factors]) -> bool:
    """Whether this is the base's layer inside an adapted one, as mlx-lm nests it."""
    outer, _, last = module.rpartition(".")
    return last in ("linear", "embedding") and outer in factors


def _within_layer(module: str) -> str:
    """mlx-lm's key: the name within a layer, or the full name outside all layers."""
    return re.sub(r"^.*?\.\d+\.", "", module)


class Mlx(Format):
    """MLX's folder or file, behind the interface of all formats."""

    name = "mlx"
    is_folder = True
    takes_alpha = True
    files = (WEIGHTS, NPZ)

    def owns(self, path: Path) -> bool:
        if is_mlx(path):
            return True
        # A config alone counts, unless another format's file is there: reading it reports the missing tensors.
        alone = (path / CONFIG).is_file() and not (path / DIFFUSERS_FILE).is_file()
        return alone and is_mlx_config(read_json(path / CONFIG))

    def fits(self, path: Path, keys: Sequence[str]) -> bool:
        return fits(keys)

    def file_in(self, path: Path) -> Path:
        return weights_in(path) if path.is_dir() else path

    def read(self, path: Path, options: ReadOptions) -> Adapter:
        return read(*self.tensors_in(path), options.alpha)

    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        return losses(adapter)

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        return write(adapter, path)


FORMAT = Mlx()
