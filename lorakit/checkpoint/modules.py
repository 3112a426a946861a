"""Which module each tensor of a checkpoint is the weight of, and of what kind: from the model built without weights.

transformers builds the architecture on the meta device from the folder's config, which takes no memory and runs none of
the folder's code. For architectures that it does not know, the files' names are taken as module names and matrices as
linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.fingerprint import fingerprint
from ..adapter.lora import FactorShapes
from ..errors import TargetError
from .base import Base
from .renaming import Renaming, find_renaming

_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "tok_embeddings", "embed_in")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layout:
    """`modules`, `parameters`: the model's, by name; empty if the architecture is not known. `rename`: from the model's
    names to the files'.
    """

    base: Base
    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, Tensor]
    rename: Renaming

    def own(self, name: str) -> str:
        """Return the model's name of one of the files' tensors."""
        old, new = self.rename.old, self.rename.new
        candidate = old + name[len(new) :] if name.startswith(new) else name
        return candidate if candidate in self.parameters or not self.parameters else name

    def factor_shapes(self, name: str, shape: tuple[int, ...]) -> FactorShapes | None:
        """Return the shapes of low-rank factors for this weight; None if it has none (a norm, a bias)."""
        module = name.removesuffix(".weight")
        if len(shape) < 2 or 0 in shape:
            return None
        if not self.modules:
            embedding = module.rpartition(".")[2] in _EMBEDDINGS
            return FactorShapes("embedding", shape[:1]) if embedding else FactorShapes.of_shape(shape)
        kind = self.modules.get(module)
        if isinstance(kind, nn.Embedding):
            return FactorShapes("embedding", shape[:1])
        if isinstance(kind, _CONVOLUTIONS):
            return FactorShapes("conv", shape[1:], len(shape), groups=kind.groups)
        if isinstance(kind, nn.Linear):
            return FactorShapes("linear", shape[1:])
        if type(kind).__name__ == "Conv1D" and len(shape) == 2:  # transformers', stored as [in, out]
            return FactorShapes("linear", shape[:1], transposed=True)
        return None

    def fingerprint(self) -> dict[str, Any] | None:
        """Return the live model's fingerprint; None if the architecture is not known."""
        if not self.parameters:
            return None
        architecture = self.base.architecture or ""
        return fingerprint(_Stored(self.parameters, self), architecture)


class _Stored(dict):
    """The model's parameters on the meta device, for their shapes; `[name]` reads that parameter from its file."""

    def __init__(self, parameters: Mapping[str, Tensor], layout: Layout) -> None:
        super().__init__(parameters)
        self._layout = layout

    def __getitem__(self, name: str) -> Tensor:
        slot = self._layout.base.tensors.get(self._layout.rename(name)) or self._layout.base.tensors.get(name)
        if slot is None:
            return super().__getitem__(name)
        return torch.cat([block for _, block in slot.rows()]).reshape(slot.shape)


def layout_of(base: Base) -> Layout:
    """Find the layout of a checkpoint folder."""
    model = _empty_model(base)
    if model is None:
        return Layout(base, {}, {}, Renaming())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    numbered = [n for n in parameters if any(part.isdigit() for part in n.split("."))]
    try:
        rename = find_renaming(numbered or list(parameters), base.tensors, base.folder)
    except TargetError:  # the tensors are not the model's parameters (fused experts): use the files' names
        return Layout(base, {}, {}, Renaming())
    return Layout(base, dict(model.named_modules()), parameters, rename)


def _empty_model(base: Base) -> nn.Module | None:
    import transformers

    cls = getattr(transformers, base.architecture or "", None)
    if cls is None or base.model_type not in transformers.CONFIG_MAPPING:
        return None
    config = transformers.AutoConfig.from_pretrained(base.folder)
    with torch.device("meta"):
        return cls(config)
