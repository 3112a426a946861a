"""A merged GGUF model, read again: each tensor by the `gguf` package's reader, and the model as transformers loads it.

tensors   max |file − (W + ΔW)| over max |W + ΔW|, tensor by tensor; within the rounding of the tensor's type (`gguf_types.ROUNDING`)
logits    max |file's − base's with the adapter attached| over the largest of these, of the tokens of `logits`, both in float32
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapter.adapter import Adapter
from ..errors import LorakitError
from ..formats.gguf_types import BF16, F16, F32, Q8_0, ROUNDING, SMALLEST
from ..model import attach
from ..models.base import load_model
from .gguf_model import Placed
from .logits import logits_of, why_not

# Of logits, by what the matrices are rounded to. Measured on the embedded model and on tiny random ones, whose weights are far larger, with
# adapters that move the logits by as much as they are large: f32 4e-6, f16 0.003, bf16 0.025, q8_0 0.057 at the most (0.08, 0.3, 0.38 of the
# last three where they move them by far more); with q and k in the wrong order of rows 0.34 at the least.
LOGITS = {F32: 1e-3, F16: 0.1, BF16: 0.25, Q8_0: 0.3}
READ = ("llama", "mistral", "qwen2", "qwen3", "gpt2")  # by transformers' reader of GGUF


@dataclass(frozen=True)
class Verified:
    """`tensors`: the largest relative difference, and of which tensor. `logits`: None where transformers does not load such a file. `note`: on these."""

    tensors: float
    tensor: str
    logits: float | None
    note: str = ""

    def __str__(self) -> str:
        logits = "not compared" if self.logits is None else f"off by {self.logits:.2g} of the largest"
        note = f" ({self.note})" if self.note else ""
        return f"of the tensors {self.tensor} is furthest off, by {self.tensors:.2g} of its largest number; logits {logits}{note}"


def verified(
    path: Path, placed: Sequence[Placed], extra: Mapping[str, np.ndarray], adapter: Adapter | None, base: Path, config: Any, dtype: str
) -> Verified:
    """LorakitError where the file is not what was to be written."""
    most, name = tensors_differ(path, placed, extra)
    if config.model_type not in READ:
        return Verified(most, name, None, f"transformers reads no GGUF of a {config.model_type}")
    if adapter is not None and (adapter.others or any(f.magnitude is not None for f in adapter.factors.values())):
        return Verified(most, name, None, "no live model takes DoRA, LoHa, LoKr or whole updates yet")
    why = why_not(adapter, base) if adapter is not None else None
    if why is not None:
        return Verified(most, name, None, why)
    lost = unread(config)
    logits = logits_differ(path, adapter, base, config if lost else None)
    if not logits <= LOGITS[dtype]:
        raise _fault(f"its logits are off by {logits:.2g} of the largest")
    return Verified(
        most, name, logits, f"with the base's hyper-parameters, as transformers does not read {lost} from a GGUF" if lost else ""
    )


def tensors_differ(path: Path, placed: Sequence[Placed], extra: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """(the largest difference over the tensor's largest number, its tensor)."""
    from gguf import GGUFReader, dequantize

    found = {t.name: t for t in GGUFReader(path).tensors}
    if found.keys() != {p.name for p in placed} | extra.keys():
        raise _fault("it holds other tensors than were written")
    most, where = 0.0, ""
    for p in placed:
        tensor = found[p.name]
        if tuple(int(n) for n in tensor.shape[::-1]) != p.shape or tensor.tensor_type.name.lower() != p.kind:
            raise _fault(f"'{p.name}' is {tensor.shape[::-1]} of {tensor.tensor_type.name}")
        at, off, largest = 0, 0.0, 0.0
        for block in p.blocks():
            there = dequantize(tensor.data[at : at + len(block)], tensor.tensor_type).reshape(block.shape)
            off, largest = max(off, float(np.abs(there - block).max())), max(largest, float(np.abs(block).max()))
            at += len(block)
        if not off <= 1.01 * (ROUNDING[p.kind] * largest + SMALLEST[p.kind]):
            raise _fault(f"'{p.name}' is off by {off:.2g}, its largest number is {largest:.2g}")
        if largest and off / largest >= most:
            most, where = off / largest, p.name
    for name, numbers in extra.items():
        if not np.array_equal(found[name].data, numbers):
            raise _fault(f"'{name}' is not what was written")
    return most, where


def unread(config: Any) -> str:
    """What transformers' reader of GGUF would leave out of this model's hyper-parameters, or nothing."""
    kind = config.model_type
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        return "the scaling of rotary positions"
    if kind == "gpt2" and config.n_positions != 1024:
        return "the number of positions"
    if kind == "qwen3" and config.head_dim != 128:
        return "the size of the heads"
    if kind in ("llama", "mistral") and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)):
        return "that there are biases"
    return ""


def logits_differ(path: Path, adapter: Adapter | None, base: Path, config: Any = None) -> float:
    """`config`: for the model in the file, in place of the file's own hyper-parameters."""
    from transformers import AutoModelForCausalLM

    more = {} if config is None else {"config": config}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar knows no other way to be quiet
        theirs: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **more).eval()
    found = logits_of(theirs)
    del theirs
    ours = load_model(str(base), torch.float32, torch.device("cpu"))
    wanted = logits_of(ours if adapter is None else attach(ours, adapter, force=True))
    return float((found - wanted).abs().max() / wanted.abs().max())


def _fault(what: str) -> LorakitError:
    return LorakitError(
        f"the GGUF model, read again, is not base and adapter: {what}\n  nothing was kept; report this: it is a fault of lorakit's"
    )
