"""Keep what gradient checkpointing saves, the input of each layer, outside the device's memory until backward.

    forward     the layer's input is written out when the layer has run, and freed
    backward    it is read back when its layer is computed again

The values come back with the same bits. On an accelerator they lie in the computer's memory (pinned, so that copies are
quick); on a CPU, which has no other memory, in temporary files without a name, so that nothing is left behind when a
run is killed. Only the checkpoints of layers are moved: what the loss saves stays where it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from ..errors import StateError

SMALL = 1 << 16  # bytes; smaller tensors, such as masks and positions, stay in memory
# The attribute in which transformers and diffusers keep the function that computes a layer with checkpointing.
CHECKPOINT = "_gradient_checkpointing_func"


def offload(model: nn.Module, hooks: Callable[[], saved_tensors_hooks]) -> None:
    """Keep the checkpoints of a model's layers as `hooks()` does, such as `to_files(folder)`. Call it after gradient
    checkpointing has been turned on. Raises StateError if it has not been, or by a function that is not known.
    """
    checkpointed = [module for module in model.modules() if CHECKPOINT in module.__dict__]
    if not checkpointed:
        raise StateError(
            f"{type(model).__name__}: no layer is checkpointed, so there is nothing to offload\n"
            "  turn gradient checkpointing on first; or leave out offload_activations, if this model does it in a way "
            "of its own"
        )
    for module in checkpointed:
        inner = module.__dict__[CHECKPOINT]
        if not isinstance(inner, Offloaded):
            setattr(module, CHECKPOINT, Offloaded(inner, hooks))


def to_memory_or_files(device: torch.device, folder: Path) -> Callable[[], saved_tensors_hooks]:
    """Return hooks for `offload`: into the computer's memory from an accelerator, into files of `folder` from it."""
    if device.type != "cpu":
        return lambda: save_on_cpu(pin_memory=torch.cuda.is_available())
    return lambda: ToFiles(folder)


class Offloaded:
    """The function with which a layer is checkpointed, so that what it saves is kept elsewhere."""

    def __init__(self, checkpoint: Callable[..., Any], hooks: Callable[[], saved_tensors_hooks]):
        self.checkpoint, self.hooks = checkpoint, hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.hooks():  # inside, the layer's own tensors are saved by checkpointing's hooks, that is not at all
            return self.checkpoint(*args, **kwargs)


class _Written(NamedTuple):
    file: IO[bytes]
    shape: torch.Size
    dtype: torch.dtype


class ToFiles(saved_tensors_hooks):
    """Writes saved tensors into files of a folder. Raises StateError if one cannot be written."""

    def __init__(self, folder: Path):
        super().__init__(lambda tensor: _write(tensor, folder), _read)


def is_moved(tensor: Tensor) -> bool:
    """Whether a saved tensor is moved out of memory: not if it is small, or a parameter, which stays there anyway."""
    return tensor.numel() * tensor.element_size() > SMALL and not isinstance(tensor, nn.Parameter)


def _write(tensor: Tensor, folder: Path) -> Tensor | _Written:
    if not is_moved(tensor):
        return tensor
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it is closed when backward is done with it)
    try:
        file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
    except OSError as error:
        file.close()
        raise StateError(
            f"offload_activations: cannot write into {folder}: {error}\n"
            "  free some space, choose another folder (out), or leave it out"
        ) from error
    return _Written(file, tensor.shape, tensor.dtype)


def _read(kept: Tensor | _Written) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    tensor = torch.empty(kept.shape, dtype=kept.dtype)
    kept.file.seek(0)
    into = tensor.flatten().view(torch.uint8).numpy()
    if kept.file.readinto(into.data) != len(into):  # type: ignore[attr-defined]
        raise StateError("offload_activations: a temporary file of the run is shorter than it was written")
    return tensor
