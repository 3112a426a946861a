"""Compare logits through a base: with the adapter attached, and with the written file's content added to its weights.

    W' = W + ΔW          ΔW from `written.py`; weights stored as [in, out] (Conv1D, embeddings) are transposed for it
    W' = m V / ‖V‖       V = W + ΔW, for a DoRA (Liu et al. 2024): norms of V's rows (outputs) or columns (inputs)
    saved weights        replaced; tied weights are untied first

One float32 model is in memory (4 bytes per parameter): the adapter is attached, run and detached, then the weights are
changed in place, one at a time. A dense ΔW cannot be attached to a live model: the reference is then the same maths on
the adapter's own tensors, and the base is read twice. If part of the adapter was merged into a copy of the base, the
reference is base + adapter, and the file's content is added to the copy. (Only files of image models contain bias
changes.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..bases.limits import memory_of, resident
from ..bases.load import load_config, load_model
from ..bases.rope import record_of
from ..checkpoint.base import open_base
from ..errors import AdapterError, LorakitError
from ..io.stream import read_header
from ..layers.expert_weight import ExpertWeight
from ..layers.targets import module_names
from ..model.attach import attach
from ..model.detach import detach
from ..model.fit import is_live
from ..model.known_base import check_base
from .effect import Content, Effect

# Relative to the largest |logit|. The same weights, summed in another order in float32, differ by 1e-6 to 1e-5.
TOLERANCE = 1e-3
# For a copy of the base, whose weights are rounded once more to its dtype. Measured on the embedded model and on tiny
# random ones with five of seven linears in the copy: at most 0.0024 in f16 and 0.023 in bf16; with all but one of them
# missing, at least 0.12.
ROUNDED = {torch.float16: 0.02, torch.bfloat16: 0.1}
TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
LENGTH = 12


@dataclass(frozen=True)
class Logits:
    """A comparison of logits for 2 x 12 fixed tokens.

    `difference`: the largest. `largest`: the largest |logit|. `moved`: the largest change made by the adapter.
    `live`: whether the reference is the adapter attached to the model; otherwise it is W' computed from the adapter's
    own factors.
    """

    difference: float
    largest: float
    moved: float
    live: bool

    @property
    def relative(self) -> float:
        return self.difference / self.largest if self.largest else self.difference

    def __str__(self) -> str:
        reference = "" if self.live else "; against W' of the adapter's own factors: no live model takes its kind yet"
        return (
            f"the largest difference is {self.difference:.2g}, {self.relative:.2g} of the largest logit (the adapter "
            "moves them by up to"
            f" {self.moved:.2g}{reference})"
        )


def why_not(adapter: Adapter, base: Any) -> str | None:
    """Say why logits cannot be compared through this base; None if they can."""
    if any(update.variant == "tokens" for update in adapter.updates.values()):
        return "the adapter has trained tokens, whose rows are compared by themselves"
    if base is None:
        return "no base was given (--base FOLDER)"
    folder = Path(base).expanduser() if isinstance(base, str | Path) else None
    if folder is None or not folder.is_dir():
        return f"{'the base' if folder is None else base} is not a folder with weights"
    if not (folder / "config.json").is_file():
        return f"{base} is not a language model's folder: it has no config.json"
    weights = list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    if not weights:
        return f"{base} has a config but no weights"
    if adapter.config.task not in TASKS:
        return f"the adapter is for {adapter.config.task}, not for language modelling"
    if any(f.groups > 1 for f in adapter.factors.values()):
        return "the adapter has grouped convolutions"
    try:
        if getattr(load_config(str(folder)), "quantization_config", None):
            return f"{base} is quantized"
        need, free = _bytes_in_float32(weights), _free_memory()
    except (LorakitError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{base} cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}"
    if free is not None and need > free:
        return f"{base} needs {need / 1e9:.1f} GB in float32, but only {free / 1e9:.1f} GB of memory are free"
    return None


def tolerance(copy: Path | None) -> float:
    """Return the largest accepted difference, relative to the largest |logit|. `copy`: the copy of the base used, if
    any.
    """
    return TOLERANCE if copy is None else ROUNDED.get(open_base(copy).dtype, TOLERANCE)


def compare(adapter: Adapter, stored: Content, intended: Content, base: Path, copy: Path | None = None) -> Logits | str:
    """Compare the logits of base + adapter with those of `base`, or its `copy`, changed as the file says (`stored`).

    intended: what the adapter does, the reference if it cannot be attached. Returns the reason instead if the base is
        no language model. Raises AdapterError if the adapter is not for this base.
    """
    try:
        scaling = record_of(adapter.metadata)
        model = _load(base, scaling)
        before = logits_of(model)
    except LorakitError as error:
        return str(error).splitlines()[0]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return (
            f"{base} gives no logits for token ids alone: {next(iter(str(error).splitlines()), type(error).__name__)}"
        )
    live = is_live(adapter)
    try:
        if live:
            reference = logits_of(attach(model, adapter))
            detach(model)
        else:
            check_base(model, adapter, force=False)
            apply(model, intended)
            reference = logits_of(model)
        if copy is not None or not live:
            del model  # keep one model in memory
            model = _load(base if copy is None else copy, scaling)
        apply(model, stored)
    except LorakitError as error:
        raise AdapterError(
            f"{base}: logits cannot be compared through this base: {error}\n"
            "  give the adapter's own base, or none: ΔW is compared either way"
        ) from error
    written = logits_of(model)
    errors = (written - reference).abs()
    return Logits(
        float(errors.max()) if errors.isfinite().all() else math.inf,
        float(reference.abs().max()),
        float((reference - before).abs().max()),
        live,
    )


@torch.no_grad()
def apply(model: nn.Module, content: Content) -> None:
    """Apply `content` to the model's weights in place.

    Raises AdapterError for a module or shape that the model does not have.
    """
    for name, value in content.saved.items():
        module, last = _module(model, name.rpartition(".")[0]), name.rpartition(".")[2]
        old = module._parameters.get(last)
        if old is None or old.shape != value.shape:
            raise AdapterError(
                f"'{name}' is {list(value.shape)}, but the base's is {'missing' if old is None else list(old.shape)}"
            )
        _put(module, last, torch.from_numpy(np.array(value)))
    stacks = {name: module for name, module in module_names(model).items() if isinstance(module, ExpertWeight)}
    for name, effect in content.effects.items():
        if (stack := stacks.get(name)) is not None:
            _put(stack.experts, stack.parameter, _changed_stack(name, stack, effect))
            continue
        module = _module(model, name)
        weight = module._parameters.get("weight")
        if weight is None:
            raise AdapterError(f"'{name}' ({type(module).__name__}) has no weight in this base")
        _put(module, "weight", _changed(name, module, weight, effect))


def _changed(name: str, module: nn.Module, weight: Tensor, effect: Effect) -> Tensor:
    """Compute W' of one module, as its weight is stored. Raises AdapterError for a shape that does not fit."""
    embedding = isinstance(module, nn.Embedding)
    transposed = embedding or type(module).__name__ == "Conv1D"  # stored as [vocabulary, dim], [in, out]
    W = (weight.T if transposed else weight).flatten(1)  # [out, in·k]
    delta = torch.from_numpy(effect.delta()) if effect.delta is not None else torch.zeros_like(W)
    if delta.shape != W.shape:
        raise AdapterError(f"'{name}' has a ΔW of {list(delta.shape)}, but the base's weight is {list(W.shape)}")
    V = W.double() + delta
    if effect.magnitude is not None:
        m = torch.from_numpy(np.array(effect.magnitude, np.float64))
        if m.dim() == 1:  # one per stored row: per output, or per token of an embedding
            m = m[None, :] if embedding else m[:, None]
        norm = V.norm(dim=0 if m.shape[0] == 1 != V.shape[0] else 1, keepdim=True)
        if m.shape != norm.shape:
            raise AdapterError(f"'{name}' has a magnitude of {list(m.shape)}, but its weight is {list(W.shape)}")
        V = V * torch.where(norm > 0, m / norm, 0)  # a zero row stays zero, as in `merge`
    return (V.T if transposed else V).reshape(weight.shape)


def _changed_stack(name: str, stack: ExpertWeight, effect: Effect) -> Tensor:
    """Compute W' of experts, whose ΔW are below each other. Raises AdapterError for a shape that does not fit."""
    W = stack.weight.mT if stack.is_transposed else stack.weight  # [E, out, in]
    delta = torch.from_numpy(effect.delta()) if effect.delta is not None else torch.zeros_like(W).flatten(0, 1)
    if tuple(delta.shape) != (W.shape[0] * W.shape[1], W.shape[2]):
        raise AdapterError(f"'{name}' has a ΔW of {list(delta.shape)}, but the base's weight is {list(W.shape)}")
    V = W.double() + delta.view_as(W)
    return V.mT if stack.is_transposed else V


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter of this module only: modules that shared the old one keep it."""
    old = module._parameters[name]
    assert old is not None
    module._parameters[name] = nn.Parameter(value.to(old.dtype, copy=True).contiguous(), requires_grad=False)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise AdapterError(f"'{name}' is not a module of this {type(model).__name__}") from error


def _load(base: Path, scaling: str | None) -> nn.Module:
    return load_model(str(base), torch.float32, torch.device("cpu"), rope_scaling=scaling)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Compute float64 logits [2, 12, vocabulary] for fixed tokens spread over the vocabulary."""
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ids = ((torch.arange(2 * length) * 7919 + 5) % config.vocab_size).reshape(2, length)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder, use_cache=False).logits.double()


def _bytes_in_float32(weights: list[Path]) -> int:
    """Return the size of the files' parameters in float32, assuming that pickles hold 16-bit weights."""
    total = 0
    for path in weights:
        if path.suffix == ".safetensors":
            total += sum(4 * math.prod(slot.shape) for slot in read_header(path)[0].values())
        else:
            total += 2 * path.stat().st_size
    return total


def _free_memory() -> int | None:
    """Return the bytes of memory that this process can still allocate; None if they are not known."""
    memory = memory_of(torch.device("cpu"))
    return memory.free - resident() if memory is not None else None
