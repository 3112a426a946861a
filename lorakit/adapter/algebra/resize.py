"""An adapter at another rank: the first singular values of each ΔW (Eckart and Young 1936: nothing of that rank is
nearer).

rank=8            eight of each module
keep=0.99         as many as hold 99 % of the energy Σσ² of each module; overall=True: of all modules together, by one
                  threshold for
                  all singular values, so that modules that changed more keep more
error=0.1         the same as keep = 1 - error², the relative error being ‖ΔW - ΔW'‖ / ‖ΔW‖ (Frobenius)

LoHa, LoKr and whole updates become low-rank factors. ΔW of a LoRA is never formed: QR of its halves, and an SVD of r x
r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...errors import AdapterError, ConfigError
from ..adapter import Adapter
from ..update import Update
from .compose import compose, relative
from .product import norm
from .reform import with_updates
from .svd import Svd, needed


@dataclass(frozen=True)
class ModuleResize:
    """One module: `before` is the rank it had (of a LoHa or LoKr what it calls so), `error` ‖ΔW - ΔW'‖ / ‖ΔW‖, `norm`
    ‖ΔW‖.
    """

    module: str
    before: int
    after: int
    error: float
    norm: float

    @property
    def energy(self) -> float:
        """The share of Σσ² that is kept."""
        return max(0.0, 1 - self.error**2)


@dataclass(frozen=True)
class Resized:
    """An adapter at another rank, and what that cost."""

    adapter: Adapter
    modules: tuple[ModuleResize, ...]

    @property
    def error(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ over all modules."""
        whole = sum(m.norm**2 for m in self.modules)
        return math.sqrt(sum((m.error * m.norm) ** 2 for m in self.modules) / whole) if whole else 0.0

    @property
    def energy(self) -> float:
        return max(0.0, 1 - self.error**2)

    @property
    def worst(self) -> ModuleResize | None:
        return max(self.modules, key=lambda m: m.error, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
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
    """The adapter at a rank of at most `rank`, or as low as `keep` or `error` allow, or both (then `rank` is the most).

    A module already that small stays as it is. drop_bias: leave out the bias's change of a whole update, which low-rank
    factors cannot hold. on_module(name, done, total) is called after each. Raises AdapterError for a DoRA, whose ΔW
    depends on its base.
    """
    keep = _share(rank, keep, error, overall)
    updates, others = dict(adapter.updates), _kept_whole(adapter, drop_bias)
    forms = {m: u.form(m) for m, u in updates.items() if m not in others}
    # The other kinds tell their singular values only as far as they are asked to: a little further than each needs by
    # itself.
    ahead = keep if keep is None or not overall else 1 - (1 - keep) / 10
    spectra, reports = {}, []
    resized: dict[str, Update] = {}
    threshold = None
    if overall and keep is not None:
        spectra = {m: updates[m].singular_values(rank, ahead) for m in forms}
        threshold = _threshold(spectra, keep)
        # Where the last value told is still above the threshold, more of that module may have to stay, and less of the
        # others.
        asked = {m for m in forms if updates[m].factors is not None}
        while short := [m for m in forms if m not in asked and any(float(svd.S[-1]) > threshold for svd in spectra[m])]:
            spectra |= {m: updates[m].singular_values(rank) for m in short}
            asked |= set(short)
            threshold = _threshold(spectra, keep)
    for done, (m, update) in enumerate(updates.items(), start=1):
        if m in others:
            resized[m] = update
            continue
        svds = spectra.pop(m, None) or update.singular_values(rank, ahead)
        wanted = max(_rank(svd, rank, keep, threshold) for svd in svds)
        f = update.factors
        if f is not None and wanted >= f.rank:
            after = f
        else:
            scale, rslora = (f.scale, f.rslora) if f is not None else (1.0, False)
            after = compose(forms[m], svds, wanted, scale, rslora, next(iter(update.tensors().values())).dtype)
        resized[m] = after if drop_bias else update.with_weight(after)
        error, size = relative(update, after) if after is not update else (0.0, norm(after))
        reports.append(ModuleResize(m, update.rank, after.rank, error, size))
        if on_module is not None:
            on_module(m, done, len(updates))
    return Resized(with_updates(adapter, resized).check(), tuple(reports))


def _share(rank: int | None, keep: float | None, error: float | None, overall: bool) -> float | None:
    """How much of the energy is to be kept, out of what was asked. ConfigError if that makes no sense."""
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


def _kept_whole(adapter: Adapter, drop_bias: bool) -> dict[str, Update]:
    """The updates that stay as they are: changes of norms and biases alone. AdapterError for a matrix with a bias,
    unless dropped.
    """
    whole = {m: u for m, u in adapter.updates.items() if not u.is_matrix}
    for m, update in adapter.updates.items():
        if m not in whole and update.changes_bias and not (drop_bias or update.bias_apart):
            raise AdapterError(
                f"'{m}' changes its bias too, which low-rank factors cannot hold\n"
                "  drop_bias=True (--drop-bias) leaves the bias's change out"
            )
    return whole


def _rank(svd: Svd, rank: int | None, keep: float | None, threshold: float | None) -> int:
    """How many singular values of this one stay; at least one."""
    most = len(svd.S) if rank is None else min(rank, len(svd.S))
    if threshold is not None:
        most = min(most, int((svd.S.double() >= threshold).sum()))
    elif keep is not None:
        most = min(most, needed(svd.S, svd.total, keep))
    else:
        return most  # even where some are zero: one rank for all modules is what was asked for
    return max(1, min(most, svd.rank))


def _threshold(spectra: Mapping[str, Sequence[Svd]], keep: float) -> float:
    """The smallest singular value, of all modules', that has to stay."""
    svds = [svd for own in spectra.values() for svd in own]
    values = torch.cat([svd.S.double() for svd in svds]).sort(descending=True).values
    return float(values[needed(values, sum(svd.total for svd in svds), keep) - 1])
