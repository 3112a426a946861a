"""A LoRA out of a fine-tuned checkpoint and its base: the first singular values of each ΔW = W_tuned - W_base.

Both are folders of safetensors; one tensor is in memory at a time, as float32, with its singular vectors. Large ones are decomposed at
random (Halko et al. 2011, `lorakit.adapter.svd`), and how far the factors are from ΔW is measured on ΔW itself. What has no
low-rank factors, biases and norms, is left out or saved whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.decompose import Form, compose
from ..adapter.factors import Factors
from ..adapter.reform import describing
from ..adapter.svd import distance, matrix_svd, norm_squared
from ..config import LoraConfig, matches
from ..errors import ConfigError, LorakitError, TargetError, listing
from ..formats.stream import MERGEABLE, Slot
from .base import Base, open_base
from .modules import Layout, layout_of
from .ties import declared, find_ties


@dataclass(frozen=True)
class ModuleExtract:
    """One changed weight: ‖ΔW‖ / ‖W‖, the rank it got, and ‖ΔW - ΔW'‖ / ‖ΔW‖ as measured."""

    module: str
    shape: tuple[int, ...]
    change: float
    norm: float
    rank: int
    error: float

    @property
    def captured(self) -> float:
        """The share of ‖ΔW‖² that the factors hold."""
        return max(0.0, 1 - self.error**2)


@dataclass(frozen=True)
class Extracted:
    """`rest`: what changed and has no factors, with ‖change‖; it is in `adapter.saved` if that was asked for."""

    adapter: Adapter
    modules: tuple[ModuleExtract, ...]
    rest: dict[str, float]
    unchanged: int

    @property
    def captured(self) -> float:
        """The share of the squared change of all weights that the adapter holds."""
        left_out = {} if self.adapter.saved else self.rest
        whole = sum(m.norm**2 for m in self.modules) + sum(n**2 for n in self.rest.values())
        return max(0.0, 1 - (sum((m.error * m.norm) ** 2 for m in self.modules) + sum(n**2 for n in left_out.values())) / whole)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        modules = [{**asdict(m), "captured": m.captured} for m in self.modules]
        return {
            "captured": self.captured,
            "unchanged": self.unchanged,
            "rest": self.rest,
            "saved": list(self.adapter.saved),
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
    """The adapter that makes BASE (nearly) TUNED. `rank`: of each module, at most; `keep`: the share of each ‖ΔW‖² to hold.

    targets: only these modules (name endings, or a regular expression) get factors. save_rest: keep all else that changed
    whole. Raises LorakitError where the two have other tensors or shapes, or nothing changed.
    """
    if (rank is None and keep is None) or (rank is not None and rank < 1) or (keep is not None and not 0 < keep <= 1):
        raise ConfigError(
            f"extract needs a rank of at least 1, or keep, the share of the change to hold, up to 1 (got rank {rank}, keep {keep})\n"
            "  for example rank=16 (--rank 16) or keep=0.95 (--keep 0.95)"
        )
    before, after = open_base(Path(base).expanduser()), open_base(Path(tuned).expanduser())
    names = _common(before, after)
    layout = layout_of(before)
    factors: dict[str, Factors] = {}
    saved: dict[str, Tensor] = {}
    reports, rest, unchanged = [], {}, 0
    for done, name in enumerate(names, start=1):
        delta, size = _change(name, before.tensors[name], after.tensors[name])
        norm = math.sqrt(norm_squared(delta))
        own = layout.own(name)
        module, _, last = own.rpartition(".")
        form = layout.form(own, tuple(before.tensors[name].shape)) if last == "weight" else None
        if norm == 0:
            unchanged += 1
        elif form is not None and (targets is None or matches(module, targets)):
            factors[module], report = _factors(module, delta, form, rank, keep, seed, norm, size)
            reports.append(report)
        else:
            rest[own] = norm
            if save_rest:
                saved[own] = _whole(after.tensors[name])
        del delta
        if on_tensor is not None:
            on_tensor(name, done, len(names))
    if not factors and not rest:
        raise LorakitError(f"nothing differs between {base} and {tuned}: there is no change to extract")
    if not factors and not saved:
        asked = f"the targets {targets}" if targets else "a matrix"
        raise TargetError(f"no weight of {asked} changed; what did: {listing(rest)}\n  save_rest=True (--save-rest) keeps that whole")
    factors |= _heads(before, layout, factors)
    adapter = Adapter(
        _config(str(base), factors, saved), factors, saved, {"fingerprint": print_} if (print_ := layout.fingerprint()) else {}
    )
    return Extracted(adapter.check(), tuple(reports), rest, unchanged)


def _common(before: Base, after: Base) -> list[str]:
    """The tensors of both. LorakitError if one has what the other lacks, tied weights stored once and twice apart."""
    lone = {n: b for b, other in ((before, after), (after, before)) for n in b.tensors if n not in other.tensors}
    if lone:
        pairs = declared(before)
        twins = {a: b for user, holder in pairs.items() for a, b in ((user, holder), (holder, user))}
        lone = {n: b for n, b in lone.items() if twins.get(n) not in before.tensors}
    if lone:
        told = [f"'{n}' is only in {b.folder}" for n, b in lone.items()]
        raise LorakitError(
            f"the two checkpoints hold other tensors, {len(lone)} in all: {listing(told, 3)}\n  is one of them the base of the other?"
        )
    names = [n for n in before.tensors if n in after.tensors]
    for n in names:
        a, b = before.tensors[n], after.tensors[n]
        if a.shape != b.shape:
            raise LorakitError(
                f"'{n}' has shape {list(a.shape)} in {before.folder} and {list(b.shape)} in {after.folder}\n"
                "  was a vocabulary resized? resize the base alike (model.resize_token_embeddings) and save it first"
            )
        if (a.dtype not in MERGEABLE or b.dtype not in MERGEABLE) and (a.dtype != b.dtype or not _same(a, b)):
            raise LorakitError(
                f"'{n}' is stored as {a.dtype} and as {b.dtype}, and differs: no change of a weight\n  expected float tensors"
            )
    return names


def _same(a: Slot, b: Slot) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.copied(), b.copied(), strict=True))


def _change(name: str, before: Slot, after: Slot) -> tuple[Tensor, float]:
    """(ΔW [first axis, -1], ‖W‖), in float32 (float64 stays). Zero for what is not a float."""
    if before.dtype not in MERGEABLE:
        return torch.zeros(1, 1), 0.0
    wide = torch.float64 if "F64" in (before.dtype, after.dtype) else torch.float32
    rows = before.shape[0] if before.shape else 1
    delta = torch.empty(rows, math.prod(before.shape) // max(rows, 1), dtype=wide)
    size = 0.0
    for (at, old), (_, new) in zip(before.rows(), after.rows(), strict=True):
        torch.sub(new.to(wide), old.to(wide), out=delta[at])
        size += norm_squared(old)
    if not torch.isfinite(delta).all():
        raise LorakitError(f"'{name}' holds values that are not finite (NaN or infinity) in {before.path.parent} or {after.path.parent}")
    return delta, math.sqrt(size)


def _factors(
    module: str, delta: Tensor, form: Form, rank: int | None, keep: float | None, seed: int, norm: float, size: float
) -> tuple[Factors, ModuleExtract]:
    W = delta.T if form.across else delta  # [out, in·k]
    svd = matrix_svd(W, rank, keep, seed=seed)
    made = compose(form, [svd], max(1, min(len(svd.S), svd.rank)))
    error = math.sqrt(distance(W, made.B.flatten(1) * made.scale, made.A.flatten(1))) / norm
    shape = (W.shape[1], W.shape[0]) if form.across else (W.shape[0], *form.inner)
    return made, ModuleExtract(module, shape, norm / size if size else math.inf, norm, made.rank, error)


def _whole(slot: Slot) -> Tensor:
    return torch.cat([block for _, block in slot.rows()]).reshape(slot.shape)


def _heads(base: Base, layout: Layout, factors: dict[str, Factors]) -> dict[str, Factors]:
    """The same change for a head that is tied to a changed embedding and stored with it: ΔW [vocab, dim] = Aᵀ Bᵀ."""
    embeddings = [m for m, f in factors.items() if f.kind == "embedding"]
    if not embeddings:
        return {}
    ties = find_ties(base, declared(base), layout.rename)
    heads = {}
    for user, holder in ties.items():
        module = layout.own(holder).removesuffix(".weight")
        if user not in base.tensors and module in embeddings and user.endswith(".weight"):
            f = factors[module]
            heads[layout.own(user).removesuffix(".weight")] = Factors(f.B.T.contiguous(), f.A.T.contiguous(), f.alpha)
    return heads


def _config(base: str, factors: dict[str, Factors], saved: dict[str, Tensor]) -> LoraConfig:
    biases = [n for n in saved if n.endswith(".bias") and f"{n.removesuffix('bias')}weight" not in saved]
    modules = sorted({n.rpartition(".")[0] for n in saved if n not in biases})
    config = LoraConfig(rank=1, alpha=1, base=base, bias="all" if biases else "none", save_modules=modules)
    return describing(config, factors, list(factors))
