"""The interface to a base's weight, whether it is an ordinary tensor or quantized by some library.

All code that reads or writes the weight's elements uses this interface: the shape and device of new factors, merging,
the fingerprint, the summary. The forward does not: an adapted module calls its own class's forward, which knows the
storage, and adds its updates to the output.

A quantized weight may belong to a module that is not an `nn.Linear`, and be held in several tensors, none of which is
called "weight" (GPTQ, AWQ, HQQ). `is_linear` and `stored` say so.

"The dense weight" is the one that the module computes with, in the layout of its class: [out, in] of a linear, [in,
out] of transformers' Conv1D, [out, in/groups, *k] of a convolution, [vocab, dim] of an embedding.

Each way of storing a weight is an object in a file's `KINDS`. No file imports its library: a module of that library
exists only in a process that has already imported it. So modules are recognized by the names of their classes and by
what they hold.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...errors import StateError

MERGE = (
    "  keep the adapter unmerged; or merge the files: lorakit merge BASE ADAPTER OUT takes the unquantized base, or a\n"
    "  bitsandbytes, GPTQ or AWQ folder. It writes ordinary weights; with --requantize, quantized ones"
)


class BaseWeight(Protocol):
    """One way of storing a weight. It holds no state: everything is read from the module it is given."""

    quantization: ClassVar[str | None]  # its name in messages; None if the weight is not quantized

    def owns(self, module: nn.Module) -> bool:
        """Whether this module's weight is stored in this way."""

    def is_linear(self, module: nn.Module) -> bool:
        """Whether the module computes x Wᵀ + b with this weight, though its class is not derived from nn.Linear."""

    def stored(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the module's parameters that hold the weight; () if buffers hold it (GPTQ, AWQ)."""

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """Return the dense weight's shape."""

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Return the dense weight's dtype; for a quantized one, the dtype before quantization, if it is known."""

    def device(self, module: nn.Module) -> torch.device:
        """Return the weight's device."""

    def dense(self, module: nn.Module) -> Tensor:
        """Return the dense weight, detached; for an unquantized base without a copy.

        Raises StateError if the storage cannot be read.
        """

    def sample(self, module: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the dense weight's elements at flat positions `at` [n], and the largest error of each due to
        quantization: both [n], float32.
        """

    def was_transposed(self, module: nn.Module) -> bool:
        """Whether the module had a transposed weight before quantization (a Conv1D that became a linear)."""

    def writable(self, module: nn.Module, name: str) -> Tensor:
        """Return the tensor to add ΔW to in place. `name`: the module's. Raises StateError if there is none."""

    def check(self, module: nn.Module, name: str, trainable: bool) -> None:
        """Raise StateError if this module can no longer be adapted or, with `trainable`, passes no gradients on.
        `name`: the module's.
        """

    def prepare(self, module: nn.Module) -> None:
        """Keep the module's own forward from changing the storage while adapters are attached."""

    def restore(self, module: nn.Module) -> None:
        """Undo `prepare`."""


class QuantizedWeight:
    """What most quantized weights have in common: they are read, and never written to."""

    quantization: ClassVar[str | None] = None

    def is_linear(self, module: nn.Module) -> bool:
        return False

    def stored(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def was_transposed(self, module: nn.Module) -> bool:
        return False

    def writable(self, module: nn.Module, name: str) -> Tensor:
        raise StateError(
            f"'{name}' is quantized ({self.quantization}): merging would round it again, and lose part of ΔW\n{MERGE}"
        )

    def check(self, module: nn.Module, name: str, trainable: bool) -> None:
        """Do nothing: it can always be adapted."""

    def prepare(self, module: nn.Module) -> None:
        """Do nothing: its forward does not change the storage."""

    def restore(self, module: nn.Module) -> None:
        """Do nothing, as `prepare`."""


def refuse_activations(name: str, quantization: str | None) -> None:
    """Raise StateError for a module that quantizes its input too: rounding passes no gradient on."""
    raise StateError(
        f"'{name}' quantizes its input as well as its weight ({quantization}), and passes no gradients on\n"
        "  load the base with its weights alone quantized; a trained adapter can be attached to this one"
    )


class QuantizedTensorWeight(QuantizedWeight):
    """A parameter of a tensor class that says its dense shape and dtype, and can dequantize itself."""

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(weight_of(module).shape)

    def dtype(self, module: nn.Module) -> torch.dtype:
        dtype: torch.dtype = weight_of(module).dtype
        return dtype

    def device(self, module: nn.Module) -> torch.device:
        device: torch.device = weight_of(module).device
        return device

    def dense(self, module: nn.Module) -> Tensor:
        with torch.no_grad():
            dense: Tensor = weight_of(module).dequantize()
        return dense


def weight_of(module: nn.Module) -> Any:
    """Return a module's parameter `weight`, whatever class of tensor it is."""
    return module._parameters["weight"]
