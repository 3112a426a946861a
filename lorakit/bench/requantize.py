"""How much of an adapter is left when merged weights are quantized again: lorakit's two ways, and PEFT's.

The base is the embedded model, its linears quantized to nearest. The adapter has rank 8 on all of them, random, each ΔW
of the given share of its weight's norm. Shares and errors are means over the linears (`checkpoint.requantize` defines
them):

    in place        Q(Q(W) + ΔW)    `lorakit merge BASE ADAPTER OUT --requantize same --keep-at-least 0`
    PEFT            the same sum, `PeftModel.merge_and_unload()`; it has none for GPTQ and AWQ
    from original   Q(W + ΔW)       `lorakit merge BASE ADAPTER OUT --requantize same --onto ORIGINAL`

Nothing is timed: the shares do not depend on the machine.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors
from ..bases.load import EMBEDDED, model_path
from ..checkpoint import merge_checkpoint
from ..checkpoint.base import open_base
from ..checkpoint.merge_report import Requantized
from ..checkpoint.quantized.format import Format
from ..checkpoint.quantized.found import format_for
from ..config import LoraConfig
from ..errors import LorakitError
from ..layers.bases import base_of
from ..ops.quantized import awq, gptq
from ..ops.quantized.blockwise import Blockwise
from .suite import Row, need

TITLE = """Share of ΔW that is left after merging into a quantized base and quantizing again, and the error in units of
‖ΔW‖; by ‖ΔW‖ / ‖W‖. "in place" rounds Q(W) + ΔW, as PEFT does; "from original" rounds W + ΔW."""

RANK, SHARES = 8, (0.003, 0.01, 0.03, 0.1)
# Without double quantization of scales: it moves every weight a little, and lets less than nothing be seen of ΔW.
KINDS: Mapping[str, Any] = {
    "nf4": Blockwise("nf4"),
    "fp4": Blockwise("fp4"),
    "int8": None,
    "gptq": gptq.Settings(group_size=32),
    "awq": awq.Settings(32),
}
PEFT_KINDS = ("nf4", "fp4", "int8")


def run(quick: bool = False) -> list[Row]:
    """Measure all formats; `quick`: nf4 and gptq, two sizes of ΔW."""
    need("peft")
    need("bitsandbytes")
    original = Path(model_path(EMBEDDED))
    rows = []
    with tempfile.TemporaryDirectory() as made:
        for kind in ("nf4", "gptq") if quick else KINDS:
            base = _quantized(original, Path(made) / kind, kind)
            for share in SHARES[1:3] if quick else SHARES:
                adapter = _adapter(original, share)
                rows.append({"format": kind, "‖ΔW‖/‖W‖": share, **_measure(base, original, adapter, kind)})
    return rows


def _measure(base: Path, original: Path, adapter: Adapter, kind: str) -> Row:
    with tempfile.TemporaryDirectory() as made:
        row: Row = {}
        for name, onto in (("in place", None), ("from original", original)):
            out = Path(made) / name
            try:
                report = merge_checkpoint(base, adapter, out, requantize="same", keep_at_least=0, onto=onto)
            except LorakitError:  # not one weight changed
                row |= {f"{name} kept": _percent(0.0), f"{name} error": "1.00"}
                continue
            row |= _means(name, report.requantized)
        theirs = _peft(base, adapter, Path(made)) if kind in PEFT_KINDS else None
        return {**row, "PEFT kept": "none" if theirs is None else _percent(theirs)}


def _means(name: str, reports: Sequence[Requantized]) -> Row:
    kept = [each.kept for each in reports if each.kept is not None]
    errors = [each.error_of_change for each in reports if each.error_of_change is not None]
    return {f"{name} kept": _percent(sum(kept) / len(kept)), f"{name} error": f"{sum(errors) / len(errors):.2f}"}


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _quantized(original: Path, folder: Path, kind: str) -> Path:
    """Write the original with its linears quantized."""
    from safetensors.torch import save_file

    format: Format = format_for(kind)
    settings, opened = KINDS[kind] or {}, open_base(original)
    tensors: dict[str, Tensor] = {}
    for name, slot in opened.tensors.items():
        W = torch.cat([block for _, block in slot.rows()]).reshape(slot.shape)
        if _is_linear(name):
            made = format.quantized([W.float()], (W.shape[0], W.shape[1]), settings, None)
            tensors |= {f"{name.removesuffix('.weight')}.{own}": tensor for own, tensor in made.items()}
        else:
            tensors[name] = W
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**opened.config, "quantization_config": format.config(settings, ["lm_head"])}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _adapter(original: Path, share: float) -> Adapter:
    made = torch.Generator().manual_seed(0)
    updates = {}
    for name, slot in open_base(original).tensors.items():
        if not _is_linear(name):
            continue
        W = torch.cat([block.float() for _, block in slot.rows()])
        A, B = torch.randn(RANK, W.shape[1], generator=made), torch.randn(W.shape[0], RANK, generator=made)
        scale = math.sqrt(share * float(W.norm() / (B @ A).norm()))
        updates[name.removesuffix(".weight")] = Factors(A * scale, B * scale, RANK)
    return Adapter(LoraConfig(rank=RANK, alpha=RANK, targets="all-linear"), updates)


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _peft(base: Path, adapter: Adapter, folder: Path) -> float:
    """Return the mean share of ΔW that PEFT's merge keeps."""
    import peft
    from transformers import AutoModelForCausalLM

    warnings.filterwarnings("ignore", message="Merge lora module to")  # may get different generations
    adapter.save(folder / "adapter")
    before = open_base(base, quantized=True).tensors
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    merged = model.merge_and_unload()
    shares = []
    for module, factors in adapter.factors.items():
        live, change = merged.get_submodule(module), factors.delta()
        W = torch.cat([block for _, block in before[f"{module}.weight"].rows()])
        moved = base_of(live).dense(live).float() - W
        shares.append(float((moved * change).sum() / change.square().sum()))
    return sum(shares) / len(shares)
