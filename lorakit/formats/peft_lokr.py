"""PEFT's LoKr folder, read and written.

    <module>.lokr_w1 or .lokr_w1_a, .lokr_w1_b; .lokr_w2 or .lokr_w2_a, .lokr_w2_b, .lokr_t2

PEFT's scale is always alpha / r; ours, as LyCORIS', is 1 for two full matrices. When reading, that scale goes into W1;
when writing, such a module has alpha = r.

PEFT gives its tensors their shapes by rank, `decompose_factor` and `decompose_both`, the last two for all modules of a
file. Factors of other shapes, such as LyCORIS' with `full_matrix` or `unbalanced_factorization`, do not load there.

Of a Conv1d with a full W2, PEFT 0.21 computes another product (it extends W1 by a first axis, not by the kernel's): a
file of that is read as the ΔW that PEFT applies, and none is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.dense import Dense
from ..adapter.lokr import FIELDS, Lokr, kron_shapes
from ..adapter.update import Update
from ..config import LoraConfig
from ..errors import listing
from . import peft_lycoris
from .peft_kind import PeftKind, trained_biases
from .scale import folded


class _Lokr(PeftKind):
    peft_type, variant = "LOKR", "lokr"

    def config(self, values: Mapping[str, Any], where: Path) -> tuple[LoraConfig, bool]:
        ours, transposed = peft_lycoris.config(values, where, self.variant)
        factor = values.get("decompose_factor")
        size = factor if isinstance(factor, int) and factor >= 2 else None  # -1: as near to the root as possible
        return ours.replace(lokr_factor=size, lokr_both=bool(values.get("decompose_both"))), transposed

    def updates(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        config: LoraConfig,
        where: Path,
        ours: dict[str, Any],
    ) -> tuple[dict[str, Update], dict[str, Tensor]]:
        found, saved = peft_lycoris.parts(self.peft_type, "lokr", FIELDS, tensors, config, where)
        return {module: _update(module, parts, config) for module, parts in found.items()}, saved

    def losses(self, adapter: Adapter) -> list[str]:
        lost = trained_biases(adapter, "LoKr") + peft_lycoris.some_in_tucker_form(adapter)
        updates = _of_kind(adapter)
        axes = {m: len(max((u.weight_shape(), *map(_shape, u.tensors().values())), key=len)) for m, u in updates}
        flat = [m for m, u in updates if u.w2 is not None and axes[m] == 3]
        if flat:
            lost.append(f"a full W2 of {listing(flat, 2)}: PEFT computes another product of a Conv1d's")
        deep = [m for m in axes if axes[m] == 5]
        if deep:
            lost.append(f"factors of {listing(deep, 2)}: PEFT's LoKr has no Conv3d")
        factor, both = _settings(adapter)
        other = [m for m, u in updates if not _is_made(u, _rank(adapter, m, u, both), factor, both)]
        if other:
            lost.append(
                f"the shapes of W1 and W2 of {len(other)} modules ({listing(other, 2)}): PEFT has one decompose_factor "
                "and decompose_both for all modules, and gives no module these"
            )
        return lost

    def tensors_of(self, adapter: Adapter, prefix: str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
        _, both = _settings(adapter)
        ranks = {m: _rank(adapter, m, u, both) for m, u in _of_kind(adapter)}
        alphas = {m: u.scale * ranks[m] for m, u in _of_kind(adapter)}
        return peft_lycoris.tensors_of(adapter, prefix, "lokr"), ranks, alphas

    def fields(self, values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        factor, both = _settings(adapter)
        return peft_lycoris.fields(values, adapter) | {
            "decompose_both": both,
            "decompose_factor": -1 if factor is None else factor,
            "peft_type": self.peft_type,
            "rank_dropout_scale": False,
        }


KIND = _Lokr()


def _update(module: str, parts: dict[str, Tensor], config: LoraConfig) -> Update:
    alpha = config.alpha_of(module)
    if "w1" in parts and "w2" in parts:
        scale = alpha / config.rank_of(module)
        if parts["w2"].dim() == 3:
            full = torch.kron(parts["w1"], parts["w2"]) * scale  # W1 as [1, o1, i1]
            sizes = [a * b for a, b in zip(parts["w1"].shape, parts["w2"].shape, strict=False)]
            return Dense(full.reshape(*sizes, parts["w2"].shape[2]))
        parts = parts | {"w1": folded(parts["w1"], scale)}
    fields: dict[str, Any] = {"alpha": alpha, **parts}
    return Lokr(**fields)


def _of_kind(adapter: Adapter) -> list[tuple[str, Lokr]]:
    return [(m, u) for m, u in adapter.updates.items() if isinstance(u, Lokr)]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _outer(update: Lokr) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (o1, i1) and (o2, i2); i2 with its kernel, unless the tensors show that."""
    first = (update.w1, update.w1) if update.w1 is not None else (update.w1a, update.w1b)
    second = (update.w2, update.w2) if update.w2 is not None else (update.w2a, update.w2b)
    assert first[0] is not None
    assert first[1] is not None
    assert second[0] is not None
    assert second[1] is not None
    outputs = second[0].shape[1 if update.t2 is not None else 0]
    return (first[0].shape[0], first[1].shape[1]), (outputs, second[1].shape[1])


def _rank(adapter: Adapter, module: str, update: Lokr, both: bool) -> int:
    """Return the rank for which PEFT makes these tensors: of full matrices, the adapter's if it is large enough."""
    if update.w1b is not None or update.w2b is not None:
        return update.rank
    first, second = _outer(update)
    return max(adapter.config.rank_of(module), -(-max(*second, *(first if both else ())) // 2))


def _settings(adapter: Adapter) -> tuple[int | None, bool]:
    """Return decompose_factor, None for PEFT's -1, and decompose_both with which PEFT makes most of the modules: the
    adapter's own if they do.
    """
    updates = _of_kind(adapter)
    firsts = {size for _, u in updates for size in _outer(u)[0] if size > 1}
    both = any(u.w1a is not None for _, u in updates)
    candidates = [(adapter.config.lokr_factor, adapter.config.lokr_both)]
    candidates += [(factor, both) for factor in (None, *sorted(firsts))]

    def made(settings: tuple[int | None, bool]) -> int:
        factor, both = settings
        return sum(_is_made(u, _rank(adapter, m, u, both), factor, both) for m, u in updates)

    return max(candidates, key=made)


def _is_made(update: Lokr, rank: int, factor: int | None, both: bool) -> bool:
    """Whether PEFT makes tensors of these shapes for some kernel (a file does not tell that of a product)."""
    own = {name: _shape(t) for name, t in update.tensors().items()}
    (o1, i1), (o2, i2) = _outer(update)
    for kernel, columns in _kernels(update, i2):
        expected = kron_shapes(o1 * o2, i1 * columns, kernel, rank, factor, both)
        if update.t2 is not None and "w2b" in expected:
            expected |= {"w2a": (rank, o2), "w2b": (rank, columns), "t2": own["t2"]}
        if expected == own:
            return True
    return False


def _kernels(update: Lokr, columns: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield the possible kernels, each with i2. `columns`: i2, or i2 times the kernel's size."""
    if update.w2 is not None or update.t2 is not None:
        yield () if update.w2 is None else tuple(update.w2.shape[2:]), columns
    elif update.shape is not None:
        kernel = tuple(update.shape[2:])
        yield kernel, columns // math.prod(kernel)
    else:
        yield from (((size,), columns // size) for size in range(1, columns + 1) if columns % size == 0)
