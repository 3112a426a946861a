"""Adapters that PEFT started from the base's own weights, as plain LoRA of that base.

    PiSSA (Meng et al. 2024)          s · B₀ A₀ = the r largest singular values of W
    OLoRA (Büyükakyüz 2024)           B₀ A₀ = the first r columns of Q and rows of R, W = Q R

Training went on from W - s · B₀ A₀, so what the adapter adds to W is s · B A - s · B₀ A₀, of rank 2r. B₀ A₀ are made
again from W, which must be the very base; of PiSSA as well as an SVD in float32 tells the r-th singular vector from the
next. Starts that took data, random projections or rounded weights (CorDA, LoRA-GA, `pissa_niter_*`, LoftQ) cannot be
made again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.algebra.concatenate import exact_sum
from ..adapter.algebra.product import norm
from ..adapter.algebra.reform import with_updates
from ..adapter.lora import Factors
from ..errors import AdapterError
from ..formats import TAKES_ALPHA, TELLS_MODEL, find, format_of, load, peft
from .weights import open_weights

EXACT = ("pissa", "olora")


def load_on(
    source: str | Path,
    base: Path | None,
    alpha: float | None = None,
    force_base: bool = False,
    model_type: str | None = None,
) -> Adapter:
    """Read an adapter that may need its base: a GGUF of a Llama, or one that was started from the base's weights.

    alpha: for formats that do not hold it, model_type: for those that tell a diffusion model; others pass over them, so
    that adapters of several formats may be named together.
    """
    if base is not None and started_as(source):
        return plain(find(source), base, force_base)
    format = format_of(source)
    return load(
        source,
        alpha=alpha if format in TAKES_ALPHA else None,
        base=base,
        model_type=model_type if format in TELLS_MODEL else None,
    )


def started_as(source: str | Path) -> str | None:
    """ "pissa", "olora"... of one that PEFT started from the base's weights."""
    path = find(source)
    return peft.start_of(path) if peft.is_peft(path) else None


def plain(path: Path, base: Path, force_base: bool = False) -> Adapter:
    """PEFT's folder of a PiSSA or an OLoRA as a plain LoRA of `base`. AdapterError for another start, and for what
    looks like another base.

    Nothing in the folder tells its base for sure. What training started from is still most of what it ended with: where
    taking the start of `base` away makes all modules larger, it was another start (`force_base`: take it all the same).
    """
    start = str(peft.start_of(path))
    if start not in EXACT:
        raise AdapterError(
            f"{path}: it was started as {start!r}, which cannot be made again from the base's weights\n"
            "  save it again with PEFT as a plain LoRA: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    adapter = peft.read(path, started=True)
    # On Conv1D PEFT's OLoRA decomposes the matrix the wrong way round, where that is possible at all.
    strange = [
        m
        for m, u in adapter.updates.items()
        if (f := u.factors) is None
        or u.needs_base
        or f.kind != "linear"
        or f.parts
        or (f.transposed and start == "olora")
    ]
    if strange:
        raise AdapterError(f"{path}: '{strange[0]}' is no plain linear, as a start of {start!r} has it")
    weights = open_weights(base, adapter.factors)
    made, strangers = {}, 0
    for module, f in adapter.factors.items():
        W = weights.read(module, f)
        first = _start(start, W, f)
        made[module] = exact_sum(module, [(1.0, f), (-1.0, first)])
        strangers += norm(made[module]) > norm(f)
    if strangers == len(made) and not force_base:
        raise AdapterError(
            f"{path}: it was started as {start!r}, but from other weights than {base} has, as no module is like what "
            "it would have started from\n"
            "  give the base that it was trained on; force_base=True (--force-base of merge and export) if you know "
            "better"
        )
    return with_updates(adapter, made).check()


def _start(start: str, W: Tensor, f: Factors) -> Factors:
    """s · B₀ A₀ of W [out, in], as factors of the form and strength of `f`."""
    r = f.rank
    if start == "olora":
        Q, R = torch.linalg.qr(W)
        return Factors(R[:r].contiguous(), Q[:, :r].contiguous(), f.alpha, f.kind, f.rslora, f.transposed)
    U = _largest(W.double(), r) if W.shape[0] <= W.shape[1] else None
    if U is not None:
        B, A = U, U.T @ W.double()
    else:
        V = _largest(W.double().T, r)
        B, A = W.double() @ V, V.T
    return Factors((A / f.scale).float().contiguous(), B.float().contiguous(), f.alpha, f.kind, f.rslora, f.transposed)


def _largest(W: Tensor, r: int) -> Tensor:
    """The first r left singular vectors of W [m, n], m <= n, from W Wᵀ in float64: m x m, where an SVD takes several
    times as long.
    """
    return torch.linalg.eigh(W @ W.T)[1][:, -r:]
