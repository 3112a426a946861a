"""The written file, read again on a path of its own: plain numpy arrays and the format's definition of ΔW, none of lorakit's readers.

    PEFT        ΔW = lora_alpha / r · B A, alpha and rank by `rank_pattern`, `alpha_pattern`; / √r with use_rslora
    kohya       ΔW = alpha / r · up · down (r: down's rows)
    diffusers   as PEFT, alphas from the header's `lora_adapter_metadata`
    MLX         ΔW = scale · (a b)ᵀ
    GGUF        ΔW = adapter.lora.alpha / r · b a, rows of q and k in llama's order

What the file should hold is made from the adapter's own factors, under the names and in the order of rows that the format has.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter.adapter import Adapter
from ..adapter.factors import Factors
from ..errors import AdapterError

Deltas = dict[str, Callable[[], np.ndarray]]  # by the file's own name of the module; made when asked for, one at a time


def peft(folder: Path) -> Deltas:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))
    tensors = _arrays(folder / "adapter_model.safetensors")
    found: Deltas = {}
    for key, A in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A\.weight|embedding_A)", key)
        if match is None:
            continue
        B = tensors[key[: -len(match[2])] + match[2].replace("A", "B")]
        name = match[1]
        rank = _by_pattern(config["rank_pattern"], name, config["r"])
        alpha = _by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        found[name] = lambda A=A, B=B, scale=scale: _product(B, A, scale)  # type: ignore[misc]
    return found


def _by_pattern(pattern: Mapping[str, Any], name: str, default: float) -> float:
    """PEFT's rule: the first key that matches the whole name or its end."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def kohya(path: Path) -> Deltas:
    tensors = _arrays(path)
    found: Deltas = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            up, alpha = tensors[f"{name}.lora_up.weight"], tensors.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else float(alpha.reshape(())) / down.shape[0]
            found[name] = lambda up=up, down=down, scale=scale: _product(up, down, scale)  # type: ignore[misc]
    return found


_OLDER = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")  # of text encoders, where diffusers reads no other


def diffusers(path: Path) -> Deltas:
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    header = json.loads(_header(file).get("__metadata__", {}).get("lora_adapter_metadata", "{}"))
    tensors = _arrays(file)
    found: Deltas = {}
    for key, A in tensors.items():
        ends = next((e for e in ((".lora_A.weight", ".lora_B.weight"), _OLDER) if key.endswith(e[0])), None)
        if ends is not None:
            name = key.removesuffix(ends[0])
            component, _, module = name.partition(".")
            rank = A.shape[0]
            alpha = _by_pattern(header.get(f"{component}.alpha_pattern") or {}, module, header.get(f"{component}.lora_alpha", rank))
            found[name] = lambda A=A, B=tensors[name + ends[1]], scale=alpha / rank: _product(B, A, scale)  # type: ignore[misc]
    return found


def mlx(folder: Path) -> Deltas:
    scale = float(json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))["lora_parameters"]["scale"])
    tensors = _arrays(folder / "adapters.safetensors")
    found: Deltas = {}
    for key, a in tensors.items():
        if key.endswith(".lora_a"):
            name = key.removesuffix(".lora_a")
            found[name] = lambda a=a, b=tensors[f"{name}.lora_b"]: _product(b.T, a.T, scale)  # type: ignore[misc]
    return found


def gguf(path: Path) -> Deltas:
    """Under the GGUF's names, as they lie there (rows of llama's q and k in the file's order)."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    found: Deltas = {}
    for key, a in tensors.items():
        if key.endswith(".lora_a"):
            name = key.removesuffix(".lora_a")
            if name == "token_embd.weight":  # stored as [vocabulary, r]
                a = a.T
            found[name] = lambda a=a, b=tensors[f"{name}.lora_b"]: _product(b, a, alpha / a.shape[0])  # type: ignore[misc]
    return found


READERS: dict[str, Callable[[Path], Deltas]] = {"peft": peft, "kohya": kohya, "diffusers": diffusers, "mlx": mlx, "gguf": gguf}


def expected(adapter: Adapter, format: str, base: Any) -> Deltas:
    """What the file should hold, from the adapter's own factors, under the file's names and in its order of rows."""
    if format == "kohya":
        return _expected_of_kohya(adapter)
    if format == "gguf":
        from ..formats.gguf import names_of, rows_of

        base = base or adapter.config.base
        names = names_of(adapter, base)
        return {names[m]: lambda m=m, f=f: rows_of(m, delta_of(f), base) for m, f in adapter.factors.items()}  # type: ignore[misc]
    return {m: lambda f=f: delta_of(f) for m, f in adapter.factors.items()}  # type: ignore[misc]


def _expected_of_kohya(adapter: Adapter) -> Deltas:
    """One key may stand for several modules, whose rows then follow each other; of some the two halves are swapped."""
    from ..formats import names

    model = adapter.metadata.get("model")
    if model not in names.MODELS:
        model = names.model_of(adapter.updates)
    assert model is not None, "it has been written"
    sizes = names.shapes(model)
    made: Deltas = {}
    for place in {names.places(model)[m] for m in adapter.factors}:

        def rows(place: Any = place) -> np.ndarray:
            parts = [
                delta_of(adapter.factors[m]) if m in adapter.factors else np.zeros((sizes[m][0], math.prod(sizes[m][1:])))
                for m in place.modules
            ]
            whole = np.concatenate(parts)
            module = place.modules[0]
            if len(place.modules) == 1 and names.swaps_halves(model, place.key, module, (whole.shape[1], whole.shape[0])):
                return np.concatenate(np.split(whole, 2)[::-1])
            return whole

        made[place.key] = rows
    return made


def largest_difference(path: Path, format: str, wanted: Deltas) -> float:
    """max |ΔW in the file − ΔW wanted| over all modules, over the largest |ΔW|. AdapterError where the file holds other modules."""
    found = READERS[format](path)
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or more:
        raise AdapterError(f"{path}: read again, it lacks {missing[:3]} and holds {more[:3]} beside what was written")
    off = most = 0.0
    for name, make in wanted.items():
        ours, theirs = make(), found[name]()
        if ours.shape != theirs.shape:
            raise AdapterError(f"{path}: read again, '{name}' has ΔW {list(theirs.shape)} and not {list(ours.shape)}")
        off, most = max(off, float(np.abs(theirs - ours).max())), max(most, float(np.abs(ours).max()))
    return off / most if most else off


def delta_of(f: Factors) -> np.ndarray:
    return _product(_array(f.B), _array(f.A), f.scale)


def _product(B: np.ndarray, A: np.ndarray, scale: float) -> np.ndarray:
    """scale · B A in float64, as matrices."""
    return scale * (B.reshape(B.shape[0], -1).astype(np.float64) @ A.reshape(A.shape[0], -1).astype(np.float64))


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy()


def _header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file by its specification: numpy knows no bfloat16, which is the upper half of a float32."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    header = _header(path)
    start = 8 + int.from_bytes(path.open("rb").read(8), "little")
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    found = {}
    for name, slot in header.items():
        if name != "__metadata__" and slot["dtype"] in kinds:
            a, b = slot["data_offsets"]
            numbers = whole[start + a : start + b].view(kinds[slot["dtype"]])
            if slot["dtype"] == "BF16":
                numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
            found[name] = numbers.reshape(slot["shape"])
    return found
