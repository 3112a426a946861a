"""What a way of storing a base's weight offers: as an ordinary tensor, or quantized by some library.

Whatever reads or writes that weight as a matrix of numbers asks the file that owns the module: the shape and device of
fresh factors, merging, the fingerprint, the summary. Computing does not: an adapted module calls its own class's
forward, which knows its storage, and adds its updates to the output.

"The dense weight" is the one that the module computes with, in the layout of its class: [out, in] of a linear, [in,
out] of transformers' Conv1D, [out, in/groups, *k] of a convolution, [vocab, dim] of an embedding.

A way of storing is an object in a file's `KINDS`. No file imports the library that it is for: a
module of that library exists only in a process that has imported it already.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn


class BaseWeight(Protocol):
    """One way of storing a weight. It holds no state: everything is read from the module it is given."""

    quantization: ClassVar[str | None]  # what it is called in messages; None where nothing is quantized

    def owns(self, module: nn.Module) -> bool:
        """Whether this module's weight is stored in this way."""

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """The dense weight's shape."""

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dense weight's dtype; of a quantized one that of what was quantized, as far as it is known."""

    def device(self, module: nn.Module) -> torch.device:
        """Where the weight lies."""

    def dense(self, module: nn.Module) -> Tensor:
        """The dense weight, detached. Of an unquantized base it is the weight itself and no copy.
        StateError where the storage cannot be read.
        """

    def sample(self, module: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
        """The dense weight's elements at flat positions `at` [n], and how far each may lie from the element that was
        quantized [n]. Both float32.
        """

    def is_turned(self, module: nn.Module) -> bool:
        """Whether the module that was quantized stores its weight the other way round (a Conv1D, made a linear)."""

    def writable(self, module: nn.Module, name: str) -> Tensor:
        """The tensor that ΔW may be added to in place. `name`: the module's. StateError where there is none."""

    def check(self, module: nn.Module, name: str) -> None:
        """StateError if this module cannot carry or pass gradients to an update any more. `name`: the module's."""

    def prepare(self, module: nn.Module) -> None:
        """Keep the module's own forward from changing how the weight is stored, while adapters are on the model."""

    def restore(self, module: nn.Module) -> None:
        """Undo `prepare`."""
