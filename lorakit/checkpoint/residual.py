"""Adapters that PEFT initialized from the base's weights, converted to a plain LoRA of that base.

    PiSSA (Meng et al. 2024)          s · B₀ A₀ = the r largest singular values of W
    MiLoRA (Wang et al. 2024)         s · B₀ A₀ = the r smallest ones
    OLoRA (Büyükakyüz 2024)           B₀ A₀ = the first r columns of Q and rows of R, W = Q R

Training started from W - s · B₀ A₀, so the adapter adds s · B A - s · B₀ A₀ to W, of rank 2r. B₀ A₀ are recomputed from
W, which must be the same base; for PiSSA and MiLoRA up to the accuracy with which an SVD in float32 separates the r-th
singular vector from the next. Initializations that used data, random projections or several quantizations (CorDA,
LoRA-GA, `pissa_niter_*`, LoftQ of several iterations) cannot be recomputed. lorakit's own adapters need none of this:
their start is subtracted already (`layers.init`).
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

EXACT = ("pissa", "milora", "olora")


def load_on(
    source: str | Path,
    base: Path | None,
    alpha: float | None = None,
    force_base: bool = False,
    model_type: str | None = None,
) -> Adapter:
    """Read an adapter that may need its base: a GGUF of a Llama, or one that was initialized from the base's weights.

    alpha: for formats that do not hold it; model_type: for files of diffusion models. Both are ignored for others, so
    that one value can be given for adapters of several formats. Raises AdapterError as `formats.load` and `plain` do.
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
    """Return PEFT's initialization from the base's weights, "pissa", "olora"...; None for other adapters."""
    path = find(source)
    return peft.start_of(path) if peft.is_peft(path) else None


def plain(path: Path, base: Path, force_base: bool = False) -> Adapter:
    """Convert a PiSSA, MiLoRA or OLoRA folder of PEFT to a plain LoRA of `base`.

    The folder does not identify its base. But a trained adapter is still close to its initialization, so if subtracting
    the initialization computed from `base` makes every module larger, it was another base: AdapterError, unless
    `force_base`. Raises AdapterError for other initializations too.
    """
    start = str(peft.start_of(path))
    if start not in EXACT:
        raise AdapterError(
            f"{path}: it was initialized as {start!r}, which cannot be recomputed from the base's weights\n"
            "  save it again with PEFT as a plain LoRA: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    adapter = peft.read(path, started=True)
    # On Conv1D PEFT's OLoRA decomposes the transposed matrix, if that is possible at all.
    unsupported = [
        m
        for m, u in adapter.updates.items()
        if (f := u.factors) is None
        or u.needs_base
        or f.kind != "linear"
        or f.parts
        or (f.transposed and start == "olora")
    ]
    if unsupported:
        raise AdapterError(
            f"{path}: '{unsupported[0]}' is not a plain linear, the only module that {start!r} is defined for"
        )
    weights = open_weights(base, adapter.factors, quantized=False)  # the start was computed from unrounded weights
    made, grown = {}, 0
    for module, f in adapter.factors.items():
        W = weights.read(module)
        first = _start(start, W, f)
        made[module] = exact_sum(module, [(1.0, f), (-1.0, first)])
        grown += norm(made[module]) > norm(f)
    if grown == len(made) and not force_base:
        raise AdapterError(
            f"{path}: it was initialized as {start!r} from other weights than those of {base}: no module is close to "
            "the initialization that this base would give\n"
            "  give the base that it was trained on; force_base=True (--force-base of merge and export) if you know "
            "better"
        )
    return with_updates(adapter, made).check()


def _start(start: str, W: Tensor, f: Factors) -> Factors:
    """Return s · B₀ A₀ of W [out, in], as factors with the rank, alpha and kind of `f`."""
    r = f.rank
    if start == "olora":
        Q, R = torch.linalg.qr(W)
        return Factors(R[:r].contiguous(), Q[:, :r].contiguous(), f.alpha, f.kind, f.rslora, f.transposed)
    W = W.double()
    if W.shape[0] <= W.shape[1]:
        U = _left(W, r, start)
        B, A = U, U.T @ W
    else:
        V = _left(W.T, r, start)
        B, A = W @ V, V.T
    return Factors((A / f.scale).float().contiguous(), B.float().contiguous(), f.alpha, f.kind, f.rslora, f.transposed)


def _left(W: Tensor, r: int, start: str) -> Tensor:
    """Return r left singular vectors of W [m, n], m <= n: the last for MiLoRA, else the first. From the eigenvectors of
    W Wᵀ [m, m] in float64, which is several times as fast as an SVD.
    """
    vectors = torch.linalg.eigh(W @ W.T)[1]  # of ascending eigenvalues
    return vectors[:, :r] if start == "milora" else vectors[:, -r:]
