"""Logits through a base: those of lorakit's live adapter, and those of the base with the written file's content added to its weights.

    W' = W + ΔW          as `written.py` reads it; [in, out] (Conv1D, embeddings) is turned for it
    W' = m V / ‖V‖       V = W + ΔW, of a DoRA (Liu et al. 2024): ‖·‖ of each output's row, or of each input's column
    saved                replaced; a weight that others share (tied) gets a copy of its own first

One model in float32 is in memory (4 bytes a parameter): the adapter is attached, run and detached, then the weights are changed in place,
one at a time. No live model takes a DoRA yet: its reference is the same maths on the adapter's own factors, and the base is read twice.
Where a part of the adapter went into a copy of the base, the reference is base + adapter, and the file's content is added to the copy.
(The changes of biases that an effect may have are in files of image models alone.)
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
from ..bases.load import load_config, load_model
from ..checkpoint.base import open_base
from ..errors import AdapterError, LorakitError
from ..io.stream import read_header
from ..model.attach import attach
from ..model.detach import detach
from ..model.fit import check_base, is_live
from .effect import Content, Effect

# Of the largest |logit|. The same weights, added in another order in float32, are 1e-6 to 1e-5 apart.
TOLERANCE = 1e-3
# The same where weights of a copy of the base were rounded once more, to its own type. Measured on the embedded model and on tiny random
# ones with five of seven linears in the copy: f16 0.0024, bf16 0.023 at the most; with all but one of them lost 0.12 at the least.
ROUNDED = {torch.float16: 0.02, torch.bfloat16: 0.1}
TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
LENGTH = 12


@dataclass(frozen=True)
class Logits:
    """Of 2 x 12 fixed tokens. `difference`: the largest. `largest`: the largest |logit|. `moved`: how much the adapter changes them at most.

    `live`: whether the reference is lorakit's live adapter; else it is W' of the adapter's own factors.
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
            f"the largest difference is {self.difference:.2g}, {self.relative:.2g} of the largest logit (the adapter moves them by up to"
            f" {self.moved:.2g}{reference})"
        )


def why_not(adapter: Adapter, base: Any) -> str | None:
    """Why logits cannot be compared through this base; None if they can."""
    if base is None:
        return "no base was given (--base FOLDER)"
    folder = Path(base).expanduser() if isinstance(base, str | Path) else None
    if folder is None or not folder.is_dir():
        return f"{'the base' if folder is None else base} is no folder with weights"
    if not (folder / "config.json").is_file():
        return f"{base} is no language model's folder: it has no config.json"
    weights = list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    if not weights:
        return f"{base} has a config and no weights"
    if adapter.config.task not in TASKS:
        return f"the adapter is for {adapter.config.task}, which is no language model's task"
    if any(f.groups > 1 for f in adapter.factors.values()):
        return "the adapter has grouped convolutions"
    try:
        if getattr(load_config(str(folder)), "quantization_config", None):
            return f"{base} is quantized"
        need, free = _bytes_in_float32(weights), _free_memory()
    except (LorakitError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{base} cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}"
    if free is not None and need > free:
        return f"{base} takes {need / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB of memory are free"
    return None


def tolerance(copy: Path | None) -> float:
    """Of the largest |logit|: through the base, or through a copy of it."""
    return TOLERANCE if copy is None else ROUNDED.get(open_base(copy).dtype, TOLERANCE)


def compare(adapter: Adapter, found: Content, wanted: Content, base: Path, copy: Path | None = None) -> Logits | str:
    """The logits of the adapter on its base, and of what the file does to it, or to a copy; why not, where the base is no language model.

    AdapterError if the adapter is not for this base.
    """
    try:
        model = _load(base)
        before = logits_of(model)
    except LorakitError as error:
        return str(error).splitlines()[0]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"{base} gives no logits for token ids alone: {next(iter(str(error).splitlines()), type(error).__name__)}"
    live = is_live(adapter)
    try:
        if live:
            reference = logits_of(attach(model, adapter))
            detach(model)
        else:
            check_base(model, adapter, force=False)
            apply(model, wanted)
            reference = logits_of(model)
        if copy is not None or not live:
            del model  # before there is another
            model = _load(base if copy is None else copy)
        apply(model, found)
    except LorakitError as error:
        raise AdapterError(
            f"{base}: logits cannot be compared through this base: {error}\n  name the adapter's own base, or none: ΔW is compared all the same"
        ) from error
    written = logits_of(model)
    apart = (written - reference).abs()
    return Logits(
        float(apart.max()) if apart.isfinite().all() else math.inf,
        float(reference.abs().max()),
        float((reference - before).abs().max()),
        live,
    )


@torch.no_grad()
def apply(model: nn.Module, content: Content) -> None:
    """Change the model's weights as the content says. AdapterError where they do not fit."""
    for name, value in content.saved.items():
        module, last = _module(model, name.rpartition(".")[0]), name.rpartition(".")[2]
        own = module._parameters.get(last)
        if own is None or own.shape != value.shape:
            raise AdapterError(f"'{name}' is {list(value.shape)}, and the base's is {'not there' if own is None else list(own.shape)}")
        _put(module, last, torch.from_numpy(np.array(value)))
    for name, effect in content.effects.items():
        module = _module(model, name)
        weight = module._parameters.get("weight")
        if weight is None:
            raise AdapterError(f"'{name}' ({type(module).__name__}) has no weight in this base")
        _put(module, "weight", _changed(name, module, weight, effect))


def _changed(name: str, module: nn.Module, weight: Tensor, effect: Effect) -> Tensor:
    """W' of one module, as the weight is stored."""
    embedding = isinstance(module, nn.Embedding)
    turned = embedding or type(module).__name__ == "Conv1D"  # stored as [vocabulary, dim], [in, out]
    W = (weight.T if turned else weight).flatten(1)  # [out, in·k]
    delta = torch.from_numpy(effect.delta()) if effect.delta is not None else torch.zeros_like(W)
    if delta.shape != W.shape:
        raise AdapterError(f"'{name}' has a ΔW of {list(delta.shape)}, and the base's weight is {list(W.shape)}")
    V = W.double() + delta
    if effect.magnitude is not None:
        m = torch.from_numpy(np.array(effect.magnitude, np.float64))
        if m.dim() == 1:  # one number for each stored row: each output's, or each token's of an embedding
            m = m[None, :] if embedding else m[:, None]
        norm = V.norm(dim=0 if m.shape[0] == 1 != V.shape[0] else 1, keepdim=True)
        if m.shape != norm.shape:
            raise AdapterError(f"'{name}' has a magnitude of {list(m.shape)}, and its weight is {list(W.shape)}")
        V = V * torch.where(norm > 0, m / norm, 0)  # a row of zeros stays one, as `merge` has it
    return (V.T if turned else V).reshape(weight.shape)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """A parameter of the module's own: others that shared the old one keep it."""
    old = module._parameters[name]
    assert old is not None
    module._parameters[name] = nn.Parameter(value.to(old.dtype, copy=True).contiguous(), requires_grad=False)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise AdapterError(f"'{name}' is no module of this {type(model).__name__}") from error


def _load(base: Path) -> nn.Module:
    return load_model(str(base), torch.float32, torch.device("cpu"))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """[2, 12, vocabulary] of tokens spread over the vocabulary."""
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ids = ((torch.arange(2 * length) * 7919 + 5) % config.vocab_size).reshape(2, length)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder, use_cache=False).logits.double()


def _bytes_in_float32(weights: list[Path]) -> int:
    """Of the parameters that the files hold; pickles are taken for 16 bits."""
    total = 0
    for path in weights:
        if path.suffix == ".safetensors":
            total += sum(4 * math.prod(slot.shape) for slot in read_header(path)[0].values())
        else:
            total += 2 * path.stat().st_size
    return total


def _free_memory() -> int | None:
    """What Linux says is available; None elsewhere."""
    told = Path("/proc/meminfo")
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines()) if told.is_file() else {}
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
