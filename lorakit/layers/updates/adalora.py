"""AdaLoRA on a live module (Zhang et al. 2023): a rank for each module, found in training.

    y = base(x) + s · B diag(E) A x        A: [r, in]   E: [r, 1]   B: [out, r]   s = alpha / r

A and B are kept near orthogonal by a penalty, so that each entry of E is like a singular value of ΔW. Over all modules
together, the entries of lowest importance are set to zero, until `adalora_rank` are left on average (section 3.2):

    I = |w · ∂L/∂w|      sensitivity ← β I + (1 - β) ...      uncertainty ← β |I - sensitivity| + ...
    importance of entry i = (sensitivity · uncertainty of E_i) + their means over row i of A and over column i of B
    budget: r · n modules in warm-up, then falling with the cube of the time left, then the final one

An entry that was set to zero goes on learning, and may come back while the budget still falls. As a value it is the
LoRA that it is, with E in B and without the entries that are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ...adapter.lora import Factors
from ...config import LoraConfig, scale_of
from ...errors import TargetError
from .update import LiveUpdate, device_of, master_dtype

if TYPE_CHECKING:
    from ..layer import LoraLayer

BETA = 0.85  # of both averages: the paper's choice (appendix), and PEFT's default
STD = 0.02  # of the first A and B
NAMES = ("A", "E", "B")


@dataclass(frozen=True)
class Product:
    """s · B A with B = B' diag(E), as `Pair` has it."""

    A: Tensor
    B: Tensor
    scale: float
    dropout: float
    gain: Tensor | None = None


@dataclass(frozen=True)
class Budget:
    """How many entries all modules together keep: `first` in warm-up, `last` at the end. Shares are of the steps."""

    first: int
    last: int
    warmup: float
    final: float
    every: int

    def settled(self, steps: int) -> int:
        """Return the step after which the ranks stay. Importances need a step before it."""
        return min(max(steps - round(self.final * steps), 2), steps)

    def at(self, step: int, steps: int) -> int | None:
        """Return the budget to apply after `step` (from 1); None if none is applied then."""
        warm, settled = round(self.warmup * steps), self.settled(steps)
        if step == settled:
            return self.last
        if step <= warm or step > settled or step % self.every:
            return None
        left = 1 - (step - warm) / (settled - warm)
        return int((self.first - self.last) * left**3 + self.last)


class AdaLoraFactors(LiveUpdate):
    """One adapter's A, E and B on one module, with the importances of their elements."""

    averages = False
    captured_as = "lora"
    kept: Tensor  # [r], which entries of E the last reduction left

    def __init__(self, A: Tensor, E: Tensor, B: Tensor, config: LoraConfig, alpha: float, trainable: bool):
        super().__init__()
        self.A, self.E, self.B = (nn.Parameter(t, requires_grad=trainable) for t in (A, E, B))
        self.rank = self.width = A.shape[0]
        self.alpha, self.rslora, self.dropout = alpha, config.rslora, config.dropout
        self.weight = config.adalora_penalty
        last = config.adalora_rank or max(1, self.rank // 2)
        self.budget = Budget(
            self.rank, min(last, self.rank), config.adalora_warmup, config.adalora_final, config.adalora_every
        )
        for name in NAMES:
            for average in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{average}_{name}", torch.zeros_like(self.get_parameter(name).data))
        self.register_buffer("kept", torch.ones(self.rank, dtype=torch.bool, device=A.device))

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        if layer.lora_kind == "embedding":
            raise TargetError(
                f"'{name}' is an embedding, for which AdaLoRA is not defined (nor is it in PEFT)\n"
                "  remove it from the targets, or use variant='lora'"
            )
        if config.parts_of(name) is not None:
            raise TargetError(
                f"'{name}' is a packed projection, and AdaLoRA cannot adapt parts of one\n  remove it from `packed`"
            )
        if config.init != "default":
            raise TargetError(
                f"init='{config.init}' has no effect on AdaLoRA ('{name}'), whose A and B are normal and whose E is "
                "zero\n  remove it"
            )
        rank, dtype, device = config.rank_of(name), master_dtype(layer), device_of(layer)
        shapes = layer.lora_shapes(rank)
        A, B = (torch.empty(shape, dtype=dtype, device=device).normal_(std=STD) for shape in shapes)
        E = torch.zeros(rank, 1, dtype=dtype, device=device)
        return cls(layer.lora_laid_out(A), E, B, config, config.alpha_of(name), trainable)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    def pair(self, layer: LoraLayer) -> Product:
        return Product(self.A, self._scaled(self.B), self.scale, self.dropout)

    def _scaled(self, B: Tensor) -> Tensor:
        return B * self.E.view(1, -1, *(1 for _ in B.shape[2:]))

    def value(self, layer: LoraLayer) -> Factors:
        A, B, alpha = self.A.detach(), self._scaled(self.B).detach(), self.alpha
        used = self.E.detach().flatten() != 0
        if not (used.all() or (self.kept.all() and not used.any())):  # the latter: one that is new
            if not used.any():  # files have no rank 0
                used[0] = True
            A, B = A[used], B[:, used]
            share = len(A) / self.rank
            alpha *= math.sqrt(share) if self.rslora else share
        kind = layer.lora_kind
        groups = getattr(layer, "groups", 1) if kind == "conv" else 1
        return Factors(A, B, alpha, kind, self.rslora, layer.lora_transposed and kind == "linear", groups)

    def faster(self, layer: LoraLayer) -> tuple[str, ...]:
        return ("B",)

    def freeze_a(self, layer: LoraLayer, name: str) -> None:
        raise TargetError(
            f"'{name}' has AdaLoRA, whose importances and penalty are of a trained A\n"
            "  omit freeze_a, or use variant='lora'"
        )

    @classmethod
    def penalty(cls, updates: Sequence[Self]) -> Tensor | None:
        """Return the weighted mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over all modules (equation 4, with PEFT's mean)."""
        weight = updates[0].weight
        if not weight:
            return None
        grams: dict[int, list[Tensor]] = {}  # by rank
        device = updates[0].A.device
        for update in updates:
            A, B = update.A.flatten(1), update.B.flatten(1)
            grams.setdefault(update.rank, []).extend([(A @ A.T).to(device), (B.T @ B).to(device)])
        norms = [
            torch.linalg.matrix_norm(torch.stack(of_rank) - torch.eye(rank, dtype=of_rank[0].dtype, device=device))
            for rank, of_rank in grams.items()
        ]
        return weight * torch.cat(norms).mean()

    @classmethod
    @torch.no_grad()
    def after_step(cls, updates: Sequence[Self], step: int, steps: int) -> None:
        """Update the importances, and set entries of E to zero when it is time."""
        first = updates[0].budget
        settled = first.settled(steps)
        if step < settled or settled == 1:
            for update in updates:
                update._update_importances()
        if step > settled:
            for update in updates:
                update._mask()
            return
        whole = Budget(
            sum(u.budget.first for u in updates),
            sum(u.budget.last for u in updates),
            first.warmup,
            first.final,
            first.every,
        )
        budget = whole.at(step, steps)
        if budget is None or budget >= whole.first:
            return
        scores = [update._scores() for update in updates]
        every = torch.cat([score.to(scores[0].device) for score in scores])
        threshold = float(every.kthvalue(whole.first - budget).values)
        for update, score in zip(updates, scores, strict=True):
            update.kept.copy_(score > threshold)
            update._mask()
        if step == settled:  # not needed any more
            for update in updates:
                for name in NAMES:
                    update.get_buffer(f"sensitivity_{name}").zero_()
                    update.get_buffer(f"uncertainty_{name}").zero_()

    def _update_importances(self) -> None:
        for name in NAMES:
            parameter = self.get_parameter(name)
            if parameter.grad is None:
                continue
            sensitivity, uncertainty = self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")
            importance = (parameter * parameter.grad).abs_()
            sensitivity.mul_(BETA).add_(importance, alpha=1 - BETA)
            uncertainty.mul_(BETA).add_(importance.sub_(sensitivity).abs_(), alpha=1 - BETA)

    def _scores(self) -> Tensor:
        """Return the importance of each entry: [r]."""
        A, E, B = (self.get_buffer(f"sensitivity_{n}") * self.get_buffer(f"uncertainty_{n}") for n in NAMES)
        return E.flatten() + A.flatten(1).mean(1) + B.flatten(1).mean(0)

    def _mask(self) -> None:
        self.E.masked_fill_(~self.kept[:, None], 0.0)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, kept={int(self.kept.sum())}, alpha={self.alpha:g}, A={list(self.A.shape)}"


Live = AdaLoraFactors
