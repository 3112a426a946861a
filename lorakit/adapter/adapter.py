"""`Adapter`: a config, one update for each target module, saved weights, textual-inversion embeddings, metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LoraConfig
from ..errors import AdapterError
from .checks import all_finite
from .lora import Factors, factors_of
from .update import Update


@dataclass(frozen=True)
class Adapter:
    """An adapter as a value. It needs no model.

    `updates`: module name -> its update; `adapter.update` lists the kinds, a LoRA is a `Factors`.
    `saved`: parameter name -> its trained value (biases, PEFT's modules_to_save), under the base's name.
    `embeddings`: token -> its textual-inversion vectors, [n, dim] or [dim].
    `metadata`: plain data kept with the adapter (`fingerprint`, `recipe`, `data`, `metrics`, `header`: a file's own).

    Module names in a diffusion pipeline start with the component, named as in diffusers: "unet.", "transformer.",
    "text_encoder.", "text_encoder_2.", "text_encoder_3.".
    """

    config: LoraConfig
    updates: Mapping[str, Update]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self) -> Adapter:
        """Return the adapter itself; AdapterError if it is empty, or an update or a tensor is malformed."""
        if not self.updates and not self.saved and not self.embeddings:
            raise AdapterError("the adapter is empty: it holds no updates, no saved weights and no embeddings")
        for module, update in self.updates.items():
            update.check(module)
        for name, tensor in (*self.saved.items(), *self.embeddings.items()):
            if tensor.is_floating_point() and tensor.element_size() > 1 and not all_finite(tensor):
                what = "saved weight" if name in self.saved else "embedding"
                raise AdapterError(f"{what} '{name}' holds values that are not finite (NaN or infinity)")
        return self

    @cached_property
    def factors(self) -> Mapping[str, Factors]:
        """module -> the low-rank factors of its update (`Update.factors`), for LoRA and DoRA. A view to read from: a
        DoRA is more than its factors.
        """
        return factors_of(self.updates)

    @property
    def rank(self) -> int:
        """The largest rank of any module's low-rank factors; 0 if no module has any."""
        return max((u.rank for u in self.updates.values() if u.has_factors), default=0)

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors, without the zeros of packed projections."""
        others = sum(t.numel() for t in (*self.saved.values(), *self.embeddings.values()))
        return sum(u.parameters for u in self.updates.values()) + others

    def digest(self) -> str:
        """Return the SHA-256 of the names, dtypes, shapes and values of all tensors. It does not depend on the file
        format.
        """
        sha256 = hashlib.sha256()
        named = {f"{m}.{field}": t for m, u in self.updates.items() for field, t in u.tensors().items()}
        for name, tensor in sorted({**named, **self.saved, **self.embeddings}.items()):
            sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha256.hexdigest()

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Adapter:
        """Return a copy in another precision or on another device. Integer tensors keep their dtype."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else None)

        return replace(
            self,
            updates={m: u.map(lambda _, t: move(t)) for m, u in self.updates.items()},
            saved={n: move(t) for n, t in self.saved.items()},
            embeddings={n: move(t) for n, t in self.embeddings.items()},
        )

    def __repr__(self) -> str:
        saved = f", {len(self.saved)} saved weights" if self.saved else ""
        tokens = f", {len(self.embeddings)} embeddings" if self.embeddings else ""
        return f"Adapter(rank {self.rank}, {len(self.updates)} modules, {self.parameters:,} parameters{saved}{tokens})"

    # Arithmetic on ΔW, implemented in algebra/: combine.py, edit.py and resize.py.

    def __mul__(self, weight: float) -> Adapter:
        """Multiply every ΔW by `weight`.

        Raises AdapterError if the adapter has saved weights or a DoRA; ConfigError if `weight` is not finite.
        """
        from .algebra.edit import scale

        return scale(self, weight) if isinstance(weight, int | float) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        """Negate every ΔW. Errors as for multiplication."""
        return self * -1.0

    def __add__(self, other: Adapter) -> Adapter:
        """Add ΔW exactly; the ranks add up. `lorakit.combine` has weights and other methods.

        Raises AdapterError for different bases, shapes or saved weights, and for a DoRA.
        """
        from .algebra.combine import combine

        return combine([self, other]) if isinstance(other, Adapter) else NotImplemented

    def __sub__(self, other: Adapter) -> Adapter:
        """Subtract ΔW exactly. Errors as for addition."""
        from .algebra.combine import combine

        return combine([self, other], [1.0, -1.0]) if isinstance(other, Adapter) else NotImplemented

    def resize(self, rank: int | None = None, **options: Any) -> Adapter:
        """Approximate every ΔW at a lower rank as well as possible: `rank`, or keep=0.99 of the energy, or error=0.1.

        `lorakit.adapter.algebra.resize` explains the options, and also returns the error of each module. ConfigError
        for options that contradict each other; AdapterError for a DoRA, and for a bias's change unless drop_bias=True.
        """
        from .algebra.resize import resize

        return resize(self, rank, **options).adapter

    def prune(self, drop: str | list[str]) -> Adapter:
        """Return the adapter without the modules that `drop` names: name endings, or one regular expression for full
        names.

        Raises TargetError if an ending matches no module, or no module is left.
        """
        from .algebra.edit import prune

        return prune(self, drop)

    def select(self, keep: str | list[str]) -> Adapter:
        """Return the adapter with only the modules that `keep` names: name endings, or one regular expression for full
        names.

        Raises TargetError as for `prune`.
        """
        from .algebra.edit import select

        return select(self, keep)

    def rename(self, names: Mapping[str, str]) -> Adapter:
        """Return the adapter with other module names. `names`: a full name or a prefix -> what replaces it.

        Raises AdapterError if two modules would get the same name; TargetError for an entry that matches none.
        """
        from .algebra.edit import rename

        return rename(self, names)

    # Files: the one import from above (`formats`), because `Adapter.load(...)` is where a reader looks for it.

    @classmethod
    def load(cls, source: str | Path, **options: Any) -> Adapter:
        """Read an adapter from a folder, a file or a hub id, in any known format. Options: `lorakit.formats.load`.

        Raises AdapterError for anything that is not a valid adapter.
        """
        from ..formats import load

        return load(source, **options)

    def save(self, path: str | Path, format: str = "peft", **options: Any) -> Path:
        """Write the adapter; PEFT's folder by default. Returns the path written. Options: `lorakit.formats.save`.

        Raises AdapterError if the format cannot hold it.
        """
        from ..formats import save

        return save(self, path, format, **options)
