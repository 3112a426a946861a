"""`Adapter`: a config plus, for each target module, its low-rank factors, plus any weights saved whole, plus metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LoraConfig
from ..errors import AdapterError
from .factors import Factors


@dataclass(frozen=True)
class Adapter:
    """An adapter as a value. It needs no model.

    `factors`: module name -> `Factors`. `saved`: parameter name -> its trained value (biases, saved modules), as the base
    names it. `metadata`: plain data that travels along (`fingerprint`, `recipe`, `data`, `metrics`...).
    """

    config: LoraConfig
    factors: Mapping[str, Factors]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> Adapter:
        """Itself, or AdapterError if any part of it is malformed."""
        if not self.factors and not self.saved:
            raise AdapterError("the adapter is empty: it holds no factors and no saved weights")
        for module, factors in self.factors.items():
            factors.check(module)
        for name, tensor in self.saved.items():
            if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
                raise AdapterError(f"saved weight '{name}' holds values that are not finite (NaN or infinity)")
        return self

    @property
    def rank(self) -> int:
        """The largest rank of any module (0 for an adapter of saved weights alone)."""
        return max((f.rank for f in self.factors.values()), default=0)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(f.A.numel() + f.B.numel() for f in self.factors.values()) + sum(t.numel() for t in self.saved.values())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Adapter:
        """The same adapter in another precision or on another device."""
        moved = {m: replace(f, A=f.A.to(device, dtype), B=f.B.to(device, dtype)) for m, f in self.factors.items()}
        saved = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in self.saved.items()}
        return replace(self, factors=moved, saved=saved)

    def __repr__(self) -> str:
        saved = f", {len(self.saved)} saved weights" if self.saved else ""
        return f"Adapter(rank {self.rank}, {len(self.factors)} modules, {self.parameters:,} parameters{saved})"

    # Files: the one place where the adapter looks up, to `formats`, so that `Adapter.load(...)` is where one looks for it.

    @classmethod
    def load(cls, source: str | Path, **options: Any) -> Adapter:
        """Read an adapter from a folder, a file or a hub id, in any format lorakit knows (see `lorakit.formats.load`)."""
        from ..formats import load

        return load(source, **options)

    def save(self, path: str | Path, format: str = "peft", **options: Any) -> Path:
        """Write it; PEFT's folder by default (see `lorakit.formats.save`). Returns the path written."""
        from ..formats import save

        return save(self, path, format, **options)
