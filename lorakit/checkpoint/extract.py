"""Extract a LoRA from a fine-tuned checkpoint and its base: the first singular values of each ΔW = W_tuned - W_base.

Both are folders of a language model, diffusers pipelines, or single files of a diffusion model. One tensor is in memory
at a time, as float32, with its singular vectors. Large ones get a randomized SVD (Halko et al. 2011,
`lorakit.adapter.algebra.svd`); the error is measured on ΔW itself. Biases and norms have no low-rank factors: they are
left out, or kept as saved weights (language models) or dense updates (diffusion models, LyCORIS' "diff").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.algebra.compose import compose
from ..adapter.algebra.reform import describing
from ..adapter.algebra.svd import distance, matrix_svd, norm_squared
from ..adapter.dense import Dense
from ..adapter.lora import Factors, FactorShapes
from ..config import LoraConfig
from ..errors import ConfigError, LorakitError, TargetError, listing
from ..io.stream import Slot
from ..module_names import matches
from .base import open_base
from .modules import Layout
from .pairs import Pair, image_pairs, model_pairs
from .rounding import STORED, noise_edge
from .tied_weights import declared, find_ties


@dataclass(frozen=True)
class ModuleExtract:
    """One changed weight. `change`: ‖ΔW‖ / ‖W‖; `norm`: ‖ΔW‖_F; `error`: ‖ΔW - ΔW'‖ / ‖ΔW‖, measured.

    `noise`: how many of its ranks cannot be told from rounding to TUNED's 16 bits (see `rounding`).
    """

    module: str
    shape: tuple[int, ...]
    change: float
    norm: float
    rank: int
    error: float
    noise: int = 0

    @property
    def captured(self) -> float:
        """The share of ‖ΔW‖² that the factors capture."""
        return max(0.0, 1 - self.error**2)


@dataclass(frozen=True)
class Extracted:
    """The extracted adapter. `rest`: changed parameters without factors -> ‖change‖; `kept`: those of them that the
    adapter holds as saved weights or dense updates.
    """

    adapter: Adapter
    modules: tuple[ModuleExtract, ...]
    rest: dict[str, float]
    kept: tuple[str, ...]
    unchanged: int
    warnings: tuple[str, ...] = ()

    @property
    def captured(self) -> float:
        """The share of Σ‖ΔW‖² over all weights that the adapter captures."""
        left_out = sum(norm**2 for name, norm in self.rest.items() if name not in self.kept)
        total = sum(m.norm**2 for m in self.modules) + sum(n**2 for n in self.rest.values())
        return max(0.0, 1 - (sum((m.error * m.norm) ** 2 for m in self.modules) + left_out) / total)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        modules = [{**asdict(m), "captured": m.captured} for m in self.modules]
        return {
            "captured": self.captured,
            "unchanged": self.unchanged,
            "rest": self.rest,
            "kept": list(self.kept),
            "warnings": list(self.warnings),
            "modules": modules,
        }


def extract(
    base: Path | str,
    tuned: Path | str,
    rank: int | None = None,
    *,
    keep: float | None = None,
    targets: str | list[str] | None = None,
    save_rest: bool = False,
    seed: int = 0,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Extracted:
    """Extract the adapter that turns BASE into (nearly) TUNED.

    rank: the maximum rank of each module. keep: the share of each ‖ΔW‖² to capture.
    targets: only these modules get factors (name endings, or a regular expression).
    save_rest: keep all other changed parameters too, as saved weights or dense updates.
    seed: of the randomized SVDs. on_tensor(name, done, total): called after each tensor.

    Raises ConfigError for a wrong rank or keep, TargetError if no target changed, LorakitError if the tensors or shapes
    differ, or nothing changed.
    """
    _check_options(rank, keep)
    paths = Path(base).expanduser(), Path(tuned).expanduser()
    pairs, layout = image_pairs(*paths), None
    if pairs is None:
        pairs, layout = model_pairs(*(open_base(path) for path in paths))
    factors: dict[str, Factors] = {}
    saved: dict[str, Tensor] = {}
    dense: dict[str, dict[str, Tensor]] = {}
    reports, rest, unchanged = [], {}, 0
    for done, pair in enumerate(pairs, start=1):
        delta, size = pair.change()
        norm = math.sqrt(norm_squared(delta))
        module, _, last = pair.name.rpartition(".")
        if norm == 0:
            unchanged += 1
        elif pair.factor_shapes is not None and pair.adaptable and (targets is None or matches(module, targets)):
            edge = noise_edge(pair.after)
            factors[module], report = _factors(module, delta, pair.factor_shapes, rank, keep, seed, norm, size, edge)
            reports.append(report)
        else:
            rest[pair.name] = norm
            if save_rest and layout is not None:
                saved[pair.name] = _read(pair.after)
            elif save_rest and pair.adaptable:
                dense.setdefault(module, {})[last] = delta.reshape(pair.before.shape)
        del delta
        if on_tensor is not None:
            on_tensor(pair.name, done, len(pairs))
    others = {m: Dense(changes.get("weight"), changes.get("bias")) for m, changes in dense.items() if m not in factors}
    kept = (*saved, *(f"{m}.{what}" for m, update in others.items() for what in update.tensors()))
    if not factors and not rest:
        raise LorakitError(f"nothing differs between {base} and {tuned}: there is no change to extract")
    if not factors and not kept:
        raise _no_target_changed(targets, rest)
    fingerprint = None
    if layout is not None:
        factors |= _heads(layout, factors)
        fingerprint = layout.fingerprint()
    config = _config(str(base), factors, saved, others)
    adapter = Adapter(config, {**factors, **others}, saved, {"fingerprint": fingerprint} if fingerprint else {})
    return Extracted(adapter.check(), tuple(reports), rest, kept, unchanged, tuple(_doubts(reports, pairs)))


def _check_options(rank: int | None, keep: float | None) -> None:
    """Raise ConfigError unless there is a rank of at least 1, or a share to keep."""
    if (rank is None and keep is None) or (rank is not None and rank < 1) or (keep is not None and not 0 < keep <= 1):
        raise ConfigError(
            "extract needs a rank of at least 1, or keep, the share of the change to capture, up to 1 "
            f"(got rank {rank}, keep {keep})\n"
            "  for example rank=16 (--rank 16) or keep=0.95 (--keep 0.95)"
        )


def _no_target_changed(targets: str | list[str] | None, rest: Iterable[str]) -> TargetError:
    """Build the error for checkpoints that differ only in parameters without factors. `rest`: their names."""
    expected = f"the targets {targets}" if targets else "a matrix"
    return TargetError(
        f"no weight of {expected} changed, but these did: {listing(rest)}\n  save_rest=True (--save-rest) keeps them"
    )


def _doubts(reports: list[ModuleExtract], pairs: list[Pair]) -> list[str]:
    """Return warnings for changes that fine-tuning would hardly make."""
    doubts = []
    if reports and sorted(r.change for r in reports)[len(reports) // 2] > 1:
        doubts.append("most weights changed by more than their norm: TUNED does not seem to be fine-tuned from BASE")
    kinds = sorted({(p.before.dtype, p.after.dtype) for p in pairs if p.before.dtype != p.after.dtype})
    if kinds:
        doubts.append(f"stored as {kinds[0][0]} and as {kinds[0][1]}: the rounding counts as change")
    noisy = [report for report in reports if report.noise]
    if noisy:
        stored = next(p.after.dtype for p in pairs if p.after.dtype in STORED)
        real = max(report.rank - report.noise for report in reports)
        doubts.append(
            f"TUNED is stored as {stored}, and in {len(noisy)} of {len(reports)} modules some of the rank found is that"
            f" of its rounding ({max(r.noise for r in noisy)} of {max(r.rank for r in noisy)} at most): "
            + (
                f"a rank of {real} holds all that can be told from it (rank={real}, --rank {real}); "
                if real
                else "nothing of the change can be told from it; "
            )
            + "for more, extract from a merge in float32 (lorakit merge --dtype fp32)"
        )
    return doubts


def _factors(
    module: str,
    delta: Tensor,
    shapes: FactorShapes,
    rank: int | None,
    keep: float | None,
    seed: int,
    norm: float,
    size: float,
    edge: float | None,
) -> tuple[Factors, ModuleExtract]:
    """Truncate one module's ΔW to low-rank factors. `delta`: as stored; `norm`: ‖ΔW‖_F; `size`: ‖W‖_F."""
    W = delta.T if shapes.weight_transposed else delta  # [out, in·k]
    svd = matrix_svd(W, rank, keep, seed=seed)
    made = compose(shapes, [svd], max(1, min(len(svd.S), svd.rank)))
    error = math.sqrt(distance(W, made.B.flatten(1) * made.scale, made.A.flatten(1))) / norm
    shape = (W.shape[1], W.shape[0]) if shapes.weight_transposed else (W.shape[0], *shapes.inner)
    noise = 0 if edge is None else int((svd.S[: made.rank] <= edge).sum())
    return made, ModuleExtract(module, shape, norm / size if size else math.inf, norm, made.rank, error, noise)


def _read(slot: Slot) -> Tensor:
    return torch.cat([block for _, block in slot.rows()]).reshape(slot.shape)


def _heads(layout: Layout, factors: dict[str, Factors]) -> dict[str, Factors]:
    """Build factors for heads that are tied to a changed embedding and stored with it: the same ΔW [vocab, dim] = Aᵀ
    Bᵀ.
    """
    embeddings = [m for m, f in factors.items() if f.kind == "embedding"]
    if not embeddings:
        return {}
    base = layout.base
    ties = find_ties(base, declared(base), layout.rename)
    heads = {}
    for user, holder in ties.items():
        module = layout.own(holder).removesuffix(".weight")
        if (
            user not in base.tensors
            and layout.own(user).removesuffix(".weight") not in factors
            and module in embeddings
            and user.endswith(".weight")
        ):
            f = factors[module]
            heads[layout.own(user).removesuffix(".weight")] = Factors(f.B.T.contiguous(), f.A.T.contiguous(), f.alpha)
    return heads


def _config(base: str, factors: dict[str, Factors], saved: dict[str, Tensor], others: dict[str, Dense]) -> LoraConfig:
    biases = [n for n in saved if n.endswith(".bias") and f"{n.removesuffix('bias')}weight" not in saved]
    modules = sorted({n.rpartition(".")[0] for n in saved if n not in biases})
    config = LoraConfig(rank=1, alpha=1, base=base, bias="all" if biases else "none", save_modules=modules)
    return describing(config, factors, [*factors, *others])
