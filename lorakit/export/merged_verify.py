"""A merged GGUF model, read again: each tensor by the `gguf` package's reader, and the model as transformers loads it.

tensors   max |file − (W + ΔW)| over max |W + ΔW|, tensor by tensor; within the rounding of the tensor's type (`gguf_types.ROUNDING`)
logits    max |file's − base's with the adapter attached| over the largest of these, of the tokens of `logits`, both in float32: what
          the file's precision costs. How far it may be depends on the model; that the file is right is told by another difference,
          from the model's own W + ΔW rounded as the file's tensors are, in the model's own order of rows: the same numbers, so nearly none.
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
from ..bases.load import load_model
from ..checkpoint.tensors import merged_rows
from ..errors import LorakitError
from ..formats.gguf_types import ROUNDING, SMALLEST, encode, type_of
from ..model.attach import attach
from ..model.fit import is_live
from .gguf_model import Placed
from .logits import logits_of, why_not

TOLERANCE = 1e-3  # of logits from the same rounded numbers; with q and k in a wrong order of rows they were off by 0.34 at the least
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
    why = why_not(adapter, base) if adapter is not None else None
    if why is not None:
        return Verified(most, name, None, why)
    lost = unread(config)
    live = adapter is None or is_live(adapter)
    logits, fault = logits_differ(path, placed, adapter if live else None, base, config if lost else None)
    if not fault <= TOLERANCE:
        raise _fault(f"its logits are off by {fault:.2g} of the largest from those of the same numbers")
    notes = [f"with the base's hyper-parameters, as transformers does not read {lost} from a GGUF"] if lost else []
    notes += [] if live else ["from W + ΔW rounded as in the file: no live model takes DoRA, or other kinds that lorakit does not train"]
    return Verified(most, name, logits if live else fault, "; ".join(notes))


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


def logits_differ(path: Path, placed: Sequence[Placed], adapter: Adapter | None, base: Path, config: Any = None) -> tuple[float, float]:
    """From base and adapter, and from base and adapter rounded as in the file. `config`: in place of the file's own hyper-parameters."""
    from transformers import AutoModelForCausalLM

    more = {} if config is None else {"config": config}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar knows no other way to be quiet
        theirs: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **more).eval()
    found = logits_of(theirs)
    del theirs
    ours = load_model(str(base), torch.float32, torch.device("cpu"))
    wanted = logits_of(ours if adapter is None else attach(ours, adapter, force=True))
    del ours
    rounded = logits_of(_rounded(load_model(str(base), torch.float32, torch.device("cpu")), placed))
    most = wanted.abs().max()
    return float((found - wanted).abs().max() / most), float((found - rounded).abs().max() / most)


def _rounded(model: Any, placed: Sequence[Placed]) -> Any:
    """The model with the merged weights, each rounded as its tensor of the file is; rows and columns as the model has them."""
    from gguf import dequantize

    known = dict(model.named_parameters(remove_duplicate=False))
    names = {p.entry.name: next(n for n in (p.entry.name, f"{model.base_model_prefix}.{p.entry.name}") if n in known) for p in placed}
    head = model.get_output_embeddings()
    if "lm_head.weight" in names.values() and head is not None:  # it may be tied, and no longer be
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for p in placed:
        whole = torch.cat([block.float() for _, block in merged_rows(p.entry)])
        rows = whole.T if p.turned else whole
        there = dequantize(encode(rows.numpy(), p.kind, p.name), type_of(p.kind)).reshape(rows.shape)
        number = torch.from_numpy(there.copy())
        parameter = model.get_parameter(names[p.entry.name])
        with torch.no_grad():
            parameter.copy_((number.T if p.turned else number).reshape(parameter.shape))
    return model


def _fault(what: str) -> LorakitError:
    return LorakitError(
        f"the GGUF model, read again, is not base and adapter: {what}\n  nothing was kept; report this: it is a fault of lorakit's"
    )
