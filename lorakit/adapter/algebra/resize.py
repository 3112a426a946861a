"""An adapter at another rank: each ΔW is truncated to its first singular values, the best approximation of that rank
(Eckart and Young 1936).

rank=8            eight singular values of each module
keep=0.99         as many as hold 99 % of the energy Σσ² of each module; overall=True: of all modules together, by one
                  threshold for all singular values, so that modules that changed more keep more
error=0.1         the same as keep = 1 - error², where the relative error is ‖ΔW - ΔW'‖ / ‖ΔW‖ (Frobenius)

LoHa, LoKr and dense updates become low-rank factors. ΔW of a LoRA is never formed: a QR of B and Aᵀ, then the SVD of an
r x r matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...errors import AdapterError, ConfigError
from ..adapter import Adapter
from ..lora import Factors, FactorShapes
from ..update import Update
from ..virtual_tokens import BODY
from .compatible import check_have_changes
from .compose import compose, relative
from .product import norm, separate
from .reform import with_updates
from .svd import Svd, needed


@dataclass(frozen=True)
class ModuleResize:
    """One module. `before`, `after`: ranks (a LoHa's or LoKr's own r); `error`: ‖ΔW - ΔW'‖ / ‖ΔW‖; `norm`: ‖ΔW‖_F."""

    module: str
    before: int
    after: int
    error: float
    norm: float

    @property
    def energy(self) -> float:
        """The share of Σσ² that is kept."""
        return max(0.0, 1 - self.error**2)

    @classmethod
    def of_stack(cls, module: str, parts: Sequence[ModuleResize], after: int) -> ModuleResize:
        """Sum up the matrices of a stack."""
        size = math.hypot(*(part.norm for part in parts))
        error = math.hypot(*(part.error * part.norm for part in parts))
        return cls(module, max(part.before for part in parts), after, error / size if size else 0.0, size)


@dataclass(frozen=True)
class Resized:
    """An adapter at another rank, and the approximation error of each module."""

    adapter: Adapter
    modules: tuple[ModuleResize, ...]

    @property
    def error(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ over all modules."""
        total = sum(m.norm**2 for m in self.modules)
        return math.sqrt(sum((m.error * m.norm) ** 2 for m in self.modules) / total) if total else 0.0

    @property
    def energy(self) -> float:
        """The share of Σσ² over all modules that is kept."""
        return max(0.0, 1 - self.error**2)

    @property
    def worst(self) -> ModuleResize | None:
        """The module with the largest relative error."""
        return max(self.modules, key=lambda m: m.error, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "error": self.error,
            "energy": self.energy,
            "modules": [{**asdict(m), "energy": m.energy} for m in self.modules],
        }


def resize(
    adapter: Adapter,
    rank: int | None = None,
    *,
    keep: float | None = None,
    error: float | None = None,
    overall: bool = False,
    drop_bias: bool = False,
    on_module: Callable[[str, int, int], None] | None = None,
) -> Resized:
    """Return the adapter at rank `rank`, or at the lowest rank that `keep` or `error` allow; with both, `rank` is the
    maximum.

    Modules whose rank is low enough keep their factors. drop_bias: drop the bias's change of a dense update, which
    low-rank factors cannot hold. on_module(name, done, total) is called after each module.

    Raises ConfigError for options that contradict each other; AdapterError for a DoRA, whose ΔW depends on its base,
    and for a dense update with a bias unless `drop_bias`.
    """
    keep = _share(rank, keep, error, overall)
    stacks = {m: u for m, u in adapter.updates.items() if u.matrices() is not None}
    if stacks:
        return _with_stacks(adapter, stacks, rank, keep, overall, drop_bias, on_module)
    if list(adapter.updates) == [BODY]:
        check_have_changes([adapter])
    vectors = _without_matrix(adapter, drop_bias)
    matrices = {m: u for m, u in adapter.updates.items() if m not in vectors}
    shapes = {m: u.factor_shapes(m) for m, u in matrices.items()}
    spectra, threshold = _overall(matrices, rank, keep) if overall and keep is not None else ({}, None)
    resized, reports = dict(adapter.updates), []
    for done, (m, update) in enumerate(adapter.updates.items(), start=1):
        if m in vectors:
            continue
        svds = spectra.pop(m, None) or update.singular_values(rank, keep)
        after = _truncated(update, shapes[m], svds, max(_rank(svd, rank, keep, threshold) for svd in svds))
        resized[m] = after if drop_bias else update.with_weight(after)
        relative_error, size = relative(update, after) if after is not update else (0.0, norm(after))
        reports.append(ModuleResize(m, update.rank, after.rank, relative_error, size))
        if on_module is not None:
            on_module(m, done, len(adapter.updates))
    return Resized(with_updates(adapter, resized).check(), tuple(reports))


def _with_stacks(
    adapter: Adapter,
    stacks: Mapping[str, Update],
    rank: int | None,
    keep: float | None,
    overall: bool,
    drop_bias: bool,
    on_module: Callable[[str, int, int], None] | None,
) -> Resized:
    """Resize an adapter with stacks of matrices (experts) by resizing each matrix."""
    apart = resize(
        replace(adapter, updates=separate(adapter.updates)),
        rank,
        keep=keep,
        overall=overall,
        drop_bias=drop_bias,
        on_module=on_module,
    )
    reports = {report.module: report for report in apart.modules}
    updates, summed = dict[str, Update](), []
    for m, update in adapter.updates.items():
        if m not in stacks:
            updates[m] = apart.adapter.updates[m]
            summed += [reports[m]] if m in reports else []
            continue
        names = [f"{m}.{i}" for i in range(len(update.matrices() or ()))]
        updates[m] = update.of_matrices([apart.adapter.updates[name] for name in names])
        summed.append(ModuleResize.of_stack(m, [reports[name] for name in names], updates[m].rank))
    return Resized(with_updates(adapter, updates).check(), tuple(summed))


def _truncated(update: Update, shapes: FactorShapes, svds: Sequence[Svd], rank: int) -> Factors:
    """Return the update at this rank; its own factors if their rank is as low. `svds`: one, or one for each packed
    part.
    """
    f = update.factors
    if f is not None and rank >= f.rank:
        return f
    scale, rslora = (f.scale, f.rslora) if f is not None else (1.0, False)
    return compose(shapes, svds, rank, scale, rslora, next(iter(update.tensors().values())).dtype)


def _overall(updates: Mapping[str, Update], rank: int | None, keep: float) -> tuple[dict[str, list[Svd]], float]:
    """Return each module's singular values, and the smallest to keep so that the share `keep` of all energy stays."""
    # Kinds other than LoRA compute only as many singular values as are asked for. A module may have to keep more than
    # it would by itself, so ask for a little more.
    spectra = {m: u.singular_values(rank, 1 - (1 - keep) / 10) for m, u in updates.items()}
    threshold = _threshold(spectra, keep)
    # A module whose last computed value is above the threshold may have to keep even more, and the others less.
    complete = {m for m, u in updates.items() if u.factors is not None}
    while short := [m for m in updates if m not in complete and any(float(s.S[-1]) > threshold for s in spectra[m])]:
        spectra |= {m: updates[m].singular_values(rank) for m in short}
        complete |= set(short)
        threshold = _threshold(spectra, keep)
    return spectra, threshold


def _share(rank: int | None, keep: float | None, error: float | None, overall: bool) -> float | None:
    """Return the share of the energy to keep, from `keep` or `error`. Raises ConfigError if the options contradict each
    other.
    """
    if rank is None and keep is None and error is None:
        raise ConfigError(
            "resize needs a rank, a share of the energy to keep, or the largest error\n"
            "  rank=8, keep=0.99 or error=0.1 (--rank 8, --keep 0.99 or --error 0.1)"
        )
    if keep is not None and error is not None:
        raise ConfigError(f"keep={keep} and error={error} say the same thing twice (keep = 1 - error²); give one")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; expected at least 1")
    for name, value in (("keep", keep), ("error", error)):
        if value is not None and not (0 < value <= 1):
            raise ConfigError(f"{name} is {value}; expected more than 0 and at most 1")
    if overall and keep is None and error is None:
        raise ConfigError(
            "overall needs keep or error: a rank is one module's\n"
            "  for example keep=0.99, overall=True (--keep 0.99 --overall)"
        )
    return keep if error is None else 1 - error**2


def _without_matrix(adapter: Adapter, drop_bias: bool) -> dict[str, Update]:
    """Return the updates of norms and of biases alone, which stay unchanged. Raises AdapterError for a matrix with a
    bias, unless `drop_bias`.
    """
    others = {m: u for m, u in adapter.updates.items() if not u.is_matrix}
    for m, update in adapter.updates.items():
        if m not in others and update.changes_bias and not (drop_bias or update.bias_apart):
            raise AdapterError(
                f"'{m}' changes its bias too, which low-rank factors cannot hold\n"
                "  drop_bias=True (--drop-bias) leaves the bias's change out"
            )
    return others


def _rank(svd: Svd, rank: int | None, keep: float | None, threshold: float | None) -> int:
    """Return the number of singular values to keep; at least one."""
    most = len(svd.S) if rank is None else min(rank, len(svd.S))
    if threshold is not None:
        most = min(most, int((svd.S.double() >= threshold).sum()))
    elif keep is not None:
        most = min(most, needed(svd.S, svd.total, keep))
    else:
        return most  # even if some are zero: the caller asked for one rank in all modules
    return max(1, min(most, svd.rank))


def _threshold(spectra: Mapping[str, Sequence[Svd]], keep: float) -> float:
    """Return the smallest singular value to keep, over all modules."""
    svds = [svd for own in spectra.values() for svd in own]
    values = torch.cat([svd.S.double() for svd in svds]).sort(descending=True).values
    return float(values[needed(values, sum(svd.total for svd in svds), keep) - 1])
