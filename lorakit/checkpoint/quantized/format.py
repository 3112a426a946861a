"""The interface to a format of quantized weights in checkpoint files.

A module's weight W [out, in] is stored as several tensors, named "<module>.<own name>". `tensors` maps own names to
them, in memory. Outputs can be read and written by themselves: `cut` takes some of them out of a module's tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...io.stream import DTYPES

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # own name -> (dtype as in a file's header, shape)


class Format(Protocol):
    """One format. It holds no state; `settings` are a value of its own class, read from a model's config."""

    kinds: ClassVar[tuple[str, ...]]  # its names in `--requantize`
    title: ClassVar[str]  # the codec's TITLE
    marker: ClassVar[str]  # the own name of a tensor that only a module of this format has
    main: ClassVar[str]  # the own name of the tensor that holds the elements
    names: ClassVar[tuple[str, ...]]  # what own names begin with

    def settings(self, config: Mapping[str, Any]) -> Any | None:
        """Read a `quantization_config`; None if it is of another format. Raises LorakitError for a variant that cannot
        be read.
        """

    def kind(self, settings: Any) -> str:
        """Return the name in `kinds` that these settings have."""

    def new_settings(self, kind: str, like: Any, dtype: torch.dtype) -> Any:
        """Return the usual settings of `kind`. `like`: the base's, of any format, from which group sizes and a
        precision are taken; `dtype`: of the base's other weights, the precision where `like` has none.
        """

    def takes(self, shape: tuple[int, int], settings: Any) -> bool:
        """Whether the format's library computes rightly with a weight of this shape (out, in)."""

    def config(self, settings: Any, unquantized: list[str]) -> dict[str, Any]:
        """Return the `quantization_config` of a model. `unquantized`: the linear modules that are not quantized."""

    def of_module(self, shapes: Shapes, small: Tensors, settings: Any) -> tuple[Any, tuple[int, int]]:
        """Return the settings of one module, which may differ from the config's, and its (out, in).

        small: those of its tensors that have a few bytes only. Raises LorakitError if its tensors do not fit together.
        """

    def step(self, shape: tuple[int, int], settings: Any) -> int:
        """Return the number of outputs at whose multiples a module's tensors can be cut."""

    def opened(self, tensors: Tensors) -> Tensors:
        """Prepare a module's tensors for `cut`."""

    def cut(self, tensors: Tensors, shape: tuple[int, int], start: int, stop: int, settings: Any) -> Tensors:
        """Return the opened tensors of outputs `start` to `stop`, multiples of `step` or the end."""

    def dequantized(self, tensors: Tensors, settings: Any) -> Tensor:
        """Return W [out, in] of tensors that `cut` returned, in float32."""

    def errors(self, tensors: Tensors, W: Tensor, settings: Any) -> Tensor:
        """Return how far each element of W may be from the weight before it was quantized [out, in]."""

    def written(self, shape: tuple[int, int], settings: Any, like: Shapes | None) -> Shapes:
        """Return the tensors that `quantized` makes. `like`: those of the module in the base, if the format is its."""

    def quantized(
        self, blocks: Iterable[Tensor], shape: tuple[int, int], settings: Any, like: Tensors | None
    ) -> dict[str, Tensor]:
        """Quantize W, given in blocks of outputs [n, in] whose borders are multiples of `step`.

        like: the module's tensors in the base, if the format is the base's: where the format leaves a choice, their
        settings, groups, scales and zero points are kept.
        """


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    """Return tensors without memory, of these shapes."""
    return {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, (dtype, shape) in shapes.items()}
