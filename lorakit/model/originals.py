"""The weights of a quantized base's modules before they were quantized, read from the checkpoint they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.weights import open_weights
from ..errors import ConfigError, LorakitError, did_you_mean
from ..layers.bases import base_of

_GIVE = (
    "  give the unquantized checkpoint: attach(..., originals=FOLDER); to lorakit train as --model, quantized while it "
    "is loaded (--quantize nf4)"
)
Originals = str | Path | Mapping[str, Tensor]


def originals_of(
    model: nn.Module, modules: Mapping[str, nn.Module], given: Originals | None
) -> Callable[[str], Tensor | None]:
    """Return a function: module name -> its weight before quantization [out, in], None where it is not quantized.

    `given`: a checkpoint's folder, or its tensors by name; None: the checkpoint that the base was loaded from, if it
    was quantized while loading. Raises ConfigError where the weights are not found.
    """
    quantized = {name: module for name, module in modules.items() if base_of(module).quantization is not None}
    if not quantized:
        return lambda name: None
    read = _from_mapping(given) if isinstance(given, Mapping) else _from_folder(model, quantized, given)

    def original(name: str) -> Tensor | None:
        module = quantized.get(name)
        if module is None:
            return None
        W = read(name)
        return W.T if base_of(module).was_transposed(module) else W

    return original


def _from_mapping(tensors: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        found = tensors.get(f"{name}.weight", tensors.get(name))
        if found is None:
            raise ConfigError(
                f"attach(..., originals=...) has no '{name}.weight'{did_you_mean(f'{name}.weight', tensors)}\n"
                "  expected the unquantized weight of each quantized module to adapt, by name"
            )
        return found

    return read


def _from_folder(
    model: nn.Module, modules: Mapping[str, nn.Module], given: str | Path | None
) -> Callable[[str], Tensor]:
    path = _own_checkpoint(model) if given is None else Path(given).expanduser()
    try:
        weights = open_weights(path, dict.fromkeys(modules))
    except LorakitError as error:
        raise ConfigError(f"the weights before quantization cannot be read from {path}: {error}\n{_GIVE}") from error
    stored = {name: weights.stored[name][0] for name in modules}
    if any(weight.base.config.get("quantization_config") for weight in stored.values()):
        raise ConfigError(f"{path} is quantized itself, and init='loftq' needs its weights before that\n{_GIVE}")
    return lambda name: torch.cat([block for _, block in stored[name].slot.rows()])


def _own_checkpoint(model: nn.Module) -> Path:
    """Return the folder that transformers loaded the model from. Raises ConfigError if it is not known or not here."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if name and Path(name).is_dir():
        return Path(name)
    where = f"{name!r} is not here" if name else "the model does not say where they are"
    unknown = ConfigError(f"init='loftq' needs the weights before quantization, and {where}\n{_GIVE}")
    if not name:
        raise unknown
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise unknown from error
