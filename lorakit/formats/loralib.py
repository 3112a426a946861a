"""loralib's checkpoint: a state dict with `<module>.lora_A` [r, in], `<module>.lora_B` [out, r] and saved weights.

torchtune's own files (`<module>.lora_a.weight`, `.lora_b.weight`) and litgpt's, in `{"model": ...}`, are read too, with
the names of their models' modules. The file has no config: to read it, alpha must be given, and for a MergedLinear
which parts are adapted (`packed`). A MergedLinear has A [n·r, in] and B [n·out/parts, r]. Convolutions are read by
`lorakit.loralib` modules only, because loralib's factors of a convolution depend on the weight's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors
from ..config import LoraConfig
from ..errors import AdapterError
from ..io.atomic import replacing
from ..io.tensors import write_tensors
from ..ops.packed import compact_packed, expand_packed
from .format import Format, ReadOptions, WriteOptions
from .scale import clean, commonest, folded
from .unheld import convolutions, embeddings, other_kinds
from .wrappers import read_unwrapped


def read(path: Path, alpha: float | None = None, packed: dict[str, list[bool]] | None = None) -> Adapter:
    """Read a loralib state dict. `packed`: name ending -> which parts of a MergedLinear are adapted.

    AdapterError without `alpha`, or if the file is no such state dict.
    """
    if path.is_dir():
        raise AdapterError(f"{path} is a folder; loralib's checkpoint is one file\n  give the file")
    tensors = _torchtune(read_unwrapped(path)[0], path)
    modules = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    if not modules:
        some = ", ".join(list(tensors)[:3])
        raise AdapterError(f"{path} is no adapter: it has no key that ends in .lora_A (it has {some}, ...)")
    for key in tensors:
        if key.endswith(".lora_B") and f"{key.removesuffix('.lora_B')}.lora_A" not in tensors:
            raise AdapterError(f"{path}: '{key.removesuffix('.lora_B')}' has a lora_B and no lora_A")
    if alpha is None:
        raise AdapterError(
            f"{path} is a loralib checkpoint, which does not hold alpha\n"
            "  give the lora_alpha it was trained with: alpha=16, say (--alpha 16)\n"
            "  once and for all: lorakit convert FILE OUT --to peft --alpha 16"
        )
    config = LoraConfig(rank=1, alpha=alpha, targets=modules, packed=packed or {})
    factors = {module: _factors(module, tensors, config, path) for module in modules}
    ranks = [f.rank for f in factors.values()]
    common = max(set(ranks), key=ranks.count)
    endings = sorted({m.rsplit(".", 1)[-1] for m in modules})
    patterns = {f"^{m}": f.rank for m, f in factors.items() if f.rank != common}
    config = config.replace(rank=common, targets=endings, rank_pattern=patterns)
    saved = {key: value for key, value in tensors.items() if not key.endswith((".lora_A", ".lora_B"))}
    return Adapter(config, factors, saved).check()


def _torchtune(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """torchtune's <module>.lora_a.weight, .lora_b.weight under loralib's names; others as they are."""
    strange = next((key for key in tensors if key.endswith(".magnitude")), None)
    if strange is not None and any(key.endswith(".lora_a.weight") for key in tensors):
        raise AdapterError(
            f"{where}: key '{strange}' is torchtune's DoRA, which lorakit does not read\n"
            "  give the PEFT folder that torchtune writes beside it (adapter_config.json, adapter_model.safetensors)"
        )
    return {
        key.replace(".lora_a.weight", ".lora_A").replace(".lora_b.weight", ".lora_B"): t for key, t in tensors.items()
    }


def losses(adapter: Adapter) -> list[str]:
    """What a loralib state dict cannot hold of this adapter, one line each."""
    conv = convolutions(adapter, ", whose updates loralib factors differently")
    return other_kinds(adapter, "lora") + embeddings(adapter) + conv


def alpha_of(adapter: Adapter) -> float:
    """The alpha that a file of this adapter must be read with: the most common one."""
    return commonest(clean(f.scale * f.rank) for f in adapter.factors.values()) if adapter.factors else 1.0


def write(adapter: Adapter, path: Path) -> Path:
    """Write a loralib state dict: safetensors if the name ends so, else torch's pickle. Returns the path.

    It holds no alpha: all modules get the most common one, and the rest of their scales is folded into B. AdapterError,
    and nothing written, if the format cannot hold all of the adapter.
    """
    lost = losses(adapter.check())
    if lost:
        raise AdapterError(f"{path}: a loralib checkpoint cannot hold all of this adapter\n  " + "\n  ".join(lost))
    common = alpha_of(adapter)
    tensors: dict[str, Tensor] = dict(adapter.saved)
    for module, f in adapter.factors.items():
        B = folded(f.B, clean(f.scale * f.rank / common))
        if f.parts:
            compact = compact_packed(B, f.parts)
            if compact is None:
                raise AdapterError(f"'{module}' is packed as {list(f.parts)} according to its config, but its B is not")
            B = compact.flatten(0, 1)
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = f.A, B
    if path.suffix == ".safetensors":
        write_tensors(path, tensors)
    else:
        with replacing(path) as temporary:
            torch.save({k: v.detach().cpu().clone() for k, v in tensors.items()}, temporary)
    return path


def _factors(module: str, tensors: dict[str, Tensor], config: LoraConfig, where: Path) -> Factors:
    A, B = tensors[f"{module}.lora_A"], tensors.get(f"{module}.lora_B")
    if B is None:
        raise AdapterError(f"{where}: '{module}' has a lora_A and no lora_B")
    if A.dim() != 2 or B.dim() != 2:
        raise AdapterError(f"{where}: '{module}' has A {list(A.shape)} and B {list(B.shape)}; expected matrices")
    parts = config.parts_of(module)
    alpha = config.alpha_of(module)
    if parts is not None:
        n = sum(parts)
        if A.shape[0] % n or B.shape[0] % n or A.shape[0] // n != B.shape[1]:
            raise AdapterError(
                f"{where}: '{module}' has A {list(A.shape)} and B {list(B.shape)}, which is not {n} adapted parts"
            )
        return Factors(A, expand_packed(B.reshape(n, -1, B.shape[1]), parts), alpha, parts=parts)
    if A.shape[0] != B.shape[1]:
        raise AdapterError(
            f"{where}: '{module}' has A {list(A.shape)} and B {list(B.shape)}: a MergedLinear\n"
            "  say which parts are adapted, in Python: Adapter.load(path, alpha=..., packed={'"
            + module.rsplit(".", 1)[-1]
            + "': [True, False, True]})"
        )
    return Factors(A, B, alpha)


class Loralib(Format):
    """loralib's checkpoint, behind the interface of all formats."""

    name = "loralib"
    takes_alpha = True
    takes_packed = True

    def fits(self, path: Path, keys: Sequence[str]) -> bool:
        return any(key.endswith((".lora_A", ".lora_a.weight")) for key in keys)

    def read(self, path: Path, options: ReadOptions) -> Adapter:
        return read(path, options.alpha, options.packed)

    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        return losses(adapter)

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        return write(adapter, path)


FORMAT = Loralib()
