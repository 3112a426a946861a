"""Read a merged GGUF model back and check it: each tensor with the `gguf` package, and the logits with transformers.

tensors   max |file − (W + ΔW)| / max |W + ΔW| per tensor; must be within its type's rounding (`gguf_types.ROUNDING`)
logits    max |file's − base's with the adapter attached| over the latter's largest, for the tokens of `logits`, both in
          float32. This is the cost of the file's precision, and depends on the model. A second difference decides
          correctness: from the model with W + ΔW rounded like the file's tensors, in the model's own row order. The
          weights are then the same, so it is nearly zero.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapter.adapter import Adapter
from ..bases.load import load_model
from ..bases.rope import record_of
from ..checkpoint.write import merged_rows
from ..errors import LorakitError
from ..formats.gguf_types import ROUNDING, SMALLEST, encode, type_of
from ..model.attach import attach
from ..model.fit import is_live
from .gguf_model import GgufTensor
from .logits import logits_of, why_not

# For logits from the same rounded weights. With the rows of q and k in the wrong order they were off by at least 0.34.
TOLERANCE = 1e-3
LOADABLE = ("llama", "mistral", "qwen2", "qwen3", "gpt2")  # by transformers from a GGUF


@dataclass(frozen=True)
class Verified:
    """The largest relative differences: of `tensors`, in `tensor`; of `logits`, None if not compared.

    `note`: on the logits.
    """

    tensors: float
    tensor: str
    logits: float | None
    note: str = ""

    def __str__(self) -> str:
        logits = "not compared" if self.logits is None else f"off by {self.logits:.2g} of the largest"
        note = f" ({self.note})" if self.note else ""
        return (
            f"tensors off by at most {self.tensors:.2g} of the largest element ({self.tensor}); logits {logits}{note}"
        )


def verified(
    path: Path,
    tensors: Sequence[GgufTensor],
    extra: Mapping[str, np.ndarray],
    adapter: Adapter | None,
    base: Path,
    config: Any,
    dtype: str,
) -> Verified:
    """Compare the file with what was to be written. Raises LorakitError if they differ beyond rounding."""
    largest, name = tensors_differ(path, tensors, extra)
    if config.model_type not in LOADABLE:
        return Verified(largest, name, None, f"transformers does not read a {config.model_type} from a GGUF")
    quantized = f"{base} is quantized" if getattr(config, "quantization_config", None) else None
    why = why_not(adapter, base) if adapter is not None else quantized
    if why is not None:
        return Verified(largest, name, None, why)
    ignored = unread(config)
    live = adapter is None or is_live(adapter)
    logits, error = logits_differ(path, tensors, adapter if live else None, base, config if ignored else None)
    if not error <= TOLERANCE:
        raise _fault(f"its logits are off by {error:.2g} of the largest from those of the same rounded weights")
    notes = (
        [f"with the base's hyper-parameters, as transformers does not read {ignored} from a GGUF"] if ignored else []
    )
    notes += (
        []
        if live
        else ["from W + ΔW rounded as in the file: a live model takes only kinds of update that lorakit trains"]
    )
    return Verified(largest, name, logits if live else error, "; ".join(notes))


def tensors_differ(path: Path, tensors: Sequence[GgufTensor], extra: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """Return (the largest difference relative to its tensor's largest element, that tensor's name).

    Raises LorakitError beyond rounding.
    """
    from gguf import GGUFReader, dequantize

    stored = {t.name: t for t in GGUFReader(path).tensors}
    if stored.keys() != {p.name for p in tensors} | extra.keys():
        raise _fault("it holds other tensors than were written")
    worst, where = 0.0, ""
    for p in tensors:
        tensor = stored[p.name]
        if tuple(int(n) for n in tensor.shape[::-1]) != p.shape or tensor.tensor_type.name.lower() != p.kind:
            raise _fault(f"'{p.name}' is {tensor.shape[::-1]} of {tensor.tensor_type.name}")
        at, off, largest = 0, 0.0, 0.0
        for block in p.blocks():
            values = dequantize(tensor.data[at : at + len(block)], tensor.tensor_type).reshape(block.shape)
            off, largest = max(off, float(np.abs(values - block).max())), max(largest, float(np.abs(block).max()))
            at += len(block)
        if not off <= 1.01 * (ROUNDING[p.kind] * largest + SMALLEST[p.kind]):
            raise _fault(f"'{p.name}' is off by {off:.2g}; its largest element is {largest:.2g}")
        if largest and off / largest >= worst:
            worst, where = off / largest, p.name
    for name, array in extra.items():
        if not np.array_equal(stored[name].data, array):
            raise _fault(f"'{name}' differs from what was written")
    return worst, where


def unread(config: Any) -> str:
    """Find the hyper-parameter that transformers ignores when it loads this model from a GGUF, or ""."""
    kind = config.model_type
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        return "rotary scaling"
    if kind == "gpt2" and config.n_positions != 1024:
        return "the number of positions"
    if kind == "qwen3" and config.head_dim != 128:
        return "the head size"
    if kind in ("llama", "mistral") and (
        getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    ):
        return "the presence of biases"
    return ""


def logits_differ(
    path: Path, tensors: Sequence[GgufTensor], adapter: Adapter | None, base: Path, config: Any = None
) -> tuple[float, float]:
    """Return differences over the largest logit: from base + adapter, and from base + adapter rounded as in the file.

    config: overrides the file's own hyper-parameters.
    """
    from transformers import AutoModelForCausalLM

    options = {} if config is None else {"config": config}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off otherwise
        theirs: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, **options
        ).eval()
    stored = logits_of(theirs)
    del theirs
    scaling = None if adapter is None else record_of(adapter.metadata)
    ours = load_model(str(base), torch.float32, torch.device("cpu"), rope_scaling=scaling)
    if adapter is not None:
        attach(ours, replace(adapter, embeddings={}), force=True)  # a GGUF file has no room for new tokens
    expected = logits_of(ours)
    del ours
    rounded = logits_of(
        _rounded(load_model(str(base), torch.float32, torch.device("cpu"), rope_scaling=scaling), tensors)
    )
    largest = expected.abs().max()
    return float((stored - expected).abs().max() / largest), float((stored - rounded).abs().max() / largest)


def _rounded(model: Any, tensors: Sequence[GgufTensor]) -> Any:
    """Set the model's weights to the merged ones, each rounded to its type in the file, in the model's own layout."""
    from gguf import dequantize

    known = dict(model.named_parameters(remove_duplicate=False))
    names = {
        p.entry.name: next(n for n in (p.entry.name, f"{model.base_model_prefix}.{p.entry.name}") if n in known)
        for p in tensors
    }
    head = model.get_output_embeddings()
    # untie it: merging may have changed only one of the two
    if "lm_head.weight" in names.values() and head is not None:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for p in tensors:
        merged = torch.cat([block.float() for _, block in merged_rows(p.entry)])
        rows = merged.T if p.transposed else merged
        values = torch.from_numpy(
            dequantize(encode(rows.numpy(), p.kind, p.name), type_of(p.kind)).reshape(rows.shape).copy()
        )
        parameter = model.get_parameter(names[p.entry.name])
        with torch.no_grad():
            parameter.copy_((values.T if p.transposed else values).reshape(parameter.shape))
    return model


def _fault(what: str) -> LorakitError:
    return LorakitError(
        f"the GGUF model does not match base and adapter: {what}\n  nothing was written; please report this bug"
    )
