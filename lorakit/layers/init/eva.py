"""EVA (Paischer et al. 2024): start from the directions in which a module's inputs vary most, and give the modules
ranks by how much of that each direction explains.

    X = U S Vᵀ        X [n, in·k]: the inputs of the first batches, minus their mean        A = V_rᵀ        B = 0

    explained[i] = Sᵢ² / ‖X‖²        the Σ r largest of all modules together are kept, at most rho · r of a module

The sum of all ranks is that of the config, and so is each module's scale: alpha is that of its new rank. A module none
of whose directions is kept is not adapted. The SVD is updated batch by batch (Ross et al. 2008), with twice as many
directions as are needed; modules that read one input share its SVD. Padding and positions without a label do not count.
Equal to PEFT's `initialize_lora_eva_weights`, which goes through the batches until its directions have settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter.algebra.svd import matrix_svd
from ...config import LoraConfig
from ...errors import StateError, listing
from .batches import FirstBatches, input_of, trained_positions
from .matrix import Matrix
from .ranks import redistributed
from .start import WITH_CONV, Evidence, Gathered, Part, Start

# Directions kept between batches: a multiple of those that are needed, and so many at least. What is cut off in between
# is missing in the end.
SPARE, LEAST = 2, 64


@dataclass(frozen=True)
class Spread:
    """The SVD of n rows minus their mean. `S` [q], `Vt` [q, in·k]; `total`: ‖X‖²."""

    count: int
    mean: Tensor
    total: float
    S: Tensor
    Vt: Tensor

    @property
    def explained(self) -> Tensor:
        """The share of the variance in each direction, of those above the rounding of the arithmetic."""
        shares = self.S.square() / max(self.total, torch.finfo(torch.float32).tiny)
        rounding = torch.finfo(self.S.dtype).eps * max(self.count, self.Vt.shape[1]) * float(self.S[0])
        return shares[rounding < self.S]


def spread(before: Spread | None, rows: Tensor, most: int) -> Spread:
    """Return the SVD with further rows [n, in·k] added, at most `most` directions."""
    mean = rows.mean(0)
    centered = rows - mean
    total, stack = float(centered.square().sum(dtype=torch.float64)), [centered]
    count = len(rows)
    if before is not None:
        step = (before.count * count / (before.count + count)) ** 0.5 * (before.mean - mean)
        stack = [before.S[:, None] * before.Vt, centered, step[None]]
        total += before.total + float(step.square().sum(dtype=torch.float64))
        mean = mean + (before.mean - mean) * (before.count / (before.count + count))
        count += before.count
    svd = matrix_svd(torch.cat(stack), most)
    return Spread(count, mean, total, svd.S, svd.Vt)


class Eva(Start):
    """A from the inputs of the first batches, B zero."""

    kinds = WITH_CONV
    needs_batches = True

    def gather(self, matrices: Mapping[str, Matrix], config: LoraConfig, evidence: Evidence) -> Gathered:
        """Find the directions of each module's inputs, and the ranks. Raises StateError for a module that the batches
        do not reach.
        """
        assert evidence.batches is not None
        most = {m: max(1, round(config.rank_of(m) * config.eva_rho)) for m in matrices}
        found = _spreads(matrices, evidence.batches, max(most.values(), default=1))
        missing = [m for m in matrices if m not in found]
        if missing:
            raise StateError(
                f"the first {len(evidence.batches)} batches do not reach {len(missing)} modules, so init='eva' knows "
                f"nothing of their inputs: {listing(missing, 3)}\n"
                "  give more batches (LoraConfig.init_batches), or leave these modules out (exclude)"
            )
        explained, budget = {m: found[m].explained[: most[m]] for m in matrices}, sum(map(config.rank_of, matrices))
        if sum(map(len, explained.values())) < budget:
            least = min(matrices, key=lambda m: len(explained[m]) / config.rank_of(m))
            raise StateError(
                f"the inputs of '{least}' vary in {len(explained[least])} directions only, in the {found[least].count} "
                f"rows that the first {len(evidence.batches)} batches have for it: too few for rank "
                f"{config.rank_of(least)} of init='eva'\n"
                "  give more batches (LoraConfig.init_batches) or larger ones, or a lower rank"
            )
        ranks = _ranks(explained, budget)
        dropped = dict.fromkeys(
            (m for m, rank in ranks.items() if not rank), "EVA gives it no rank: others explain more of their inputs"
        )
        return Gathered(redistributed(config, {m: r for m, r in ranks.items() if r}), found, dropped)

    def factors(self, part: Part, found: Spread) -> tuple[Tensor, Tensor]:
        A = found.Vt[: part.rank]
        rows = len(range(*part.rows.indices(part.matrix.shape[0])))
        return A, A.new_zeros(rows, part.rank)


def _ranks(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return each module's number among the `budget` largest of all; of equal ones, those of earlier modules."""
    names = [m for m, shares in explained.items() for _ in range(len(shares))]
    order = torch.cat([shares.double().cpu() for shares in explained.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(explained, 0)
    for i in order[:budget].tolist():
        ranks[names[i]] += 1
    return ranks


def _spreads(matrices: Mapping[str, Matrix], batches: FirstBatches, most: int) -> dict[str, Spread]:
    found: dict[str, Spread] = {}
    batch: Any = None
    latest: tuple[Tensor, Spread | None, Spread] | None = None  # input, the SVD before it, and after

    def hook_of(name: str, matrix: Matrix) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            nonlocal latest
            if not torch.is_grad_enabled():
                return
            x, before = input_of(name, args, y), found.get(name)
            if latest is not None and latest[0] is x and latest[1] is before:
                found[name] = latest[2]
                return
            rows = _counted(matrix, x.detach(), batch)
            if not len(rows):
                return
            kept = min(max(SPARE * most, LEAST), rows.shape[1])
            found[name] = spread(before, rows.to(torch.promote_types(rows.dtype, torch.float32)), kept)
            latest = x, before, found[name]

        return hook

    handles = [matrix.module.register_forward_hook(hook_of(name, matrix)) for name, matrix in matrices.items()]
    try:
        for each in batches.forward():
            batch, latest = each, None
    finally:
        for handle in handles:
            handle.remove()
    return found


def _counted(matrix: Matrix, x: Tensor, batch: Any) -> Tensor:
    """Return the rows of the input that count: [n, in·k]."""
    rows = matrix.input_rows(x).flatten(0, 1)
    mask = None if matrix.kind == "conv" else trained_positions(batch, x.shape[:-1])
    return rows if mask is None else rows[mask.flatten()]


START = Eva()
