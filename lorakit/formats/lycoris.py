"""Convert one module's tensors in a kohya file, by suffix, to an update and back (LyCORIS, Yeh et al. 2024).

    LoRA, LoCon   lora_down.weight [r, in, *k]   lora_up.weight [out, r, 1...]   ΔW = alpha / r · up down
                  no alpha: alpha = r
                  lora_mid.weight [r, r, *k] (Tucker; down is then [r, in, 1...])   ΔW = alpha / r · up (mid ×₂ down)
                  dora_scale [out, 1...] or [1, in, 1...]: DoRA's magnitude
    LoHa          hada_w1_a [out, r]   hada_w1_b [r, in·k]   hada_w2_a   hada_w2_b
                  (Tucker: hada_t1, hada_t2 [r, r, *k])
    LoKr          lokr_w1, or lokr_w1_a and lokr_w1_b;   lokr_w2, or lokr_w2_a and lokr_w2_b (and lokr_t2)
    dense         diff, diff_b (of a norm also w_norm, b_norm): ΔW and the bias's change

alpha is a scalar tensor. A Tucker LoCon is read as the equal plain one: A = mid ×₂ down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import singledispatch

import torch
from torch import Tensor

from ..adapter.biased import Biased
from ..adapter.dense import Dense
from ..adapter.dora import Dora
from ..adapter.loha import Loha
from ..adapter.lokr import Lokr
from ..adapter.lora import Factors, Kind
from ..adapter.update import Update
from ..errors import AdapterError, did_you_mean
from .scale import with_alpha_as_rank

LORA = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "dora_scale": "magnitude"}
LOHA = {
    "hada_w1_a": "w1a",
    "hada_w1_b": "w1b",
    "hada_w2_a": "w2a",
    "hada_w2_b": "w2b",
    "hada_t1": "t1",
    "hada_t2": "t2",
}
LOKR = {
    "lokr_w1": "w1",
    "lokr_w1_a": "w1a",
    "lokr_w1_b": "w1b",
    "lokr_w2": "w2",
    "lokr_w2_a": "w2a",
    "lokr_w2_b": "w2b",
    "lokr_t2": "t2",
}
DENSE = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
SUFFIXES = (*LORA, *LOHA, *LOKR, *DENSE, "alpha", "scalar")
_INSTEAD = "\n  merge it into its base with the program that made it; lorakit extract makes a LoRA of the change"
# Suffixes of other methods that LyCORIS' and ComfyUI's files can hold -> what they are.
_FOREIGN = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "rescale"), "LyCORIS' OFT or BOFT, which rotates the weight"),
    "oft_R.weight": "PEFT's OFT, which rotates the weight",
    **dict.fromkeys(
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm1.weight", "bm2.weight", "a1", "a2", "b1", "b2"),
        "GLoRA, whose change depends on the base's weight",
    ),
    "on_input": "LyCORIS' (IA)³, which rescales activations",
    "rs_lora": "an rs_lora flag, of which it does not say whether alpha holds the root of the rank already",
    **dict.fromkeys(("set_weight", "reshape_weight"), "ComfyUI's new weight or new shape in place of the base's"),
    "lora_E": "AdaLoRA, which PEFT's folder with its config tells",
}


def foreign(suffix: str) -> str | None:
    """What another method's suffix means, and what to do; None if it is none of those known."""
    what = _FOREIGN.get(suffix)
    return None if what is None else f"'{suffix}' is {what}: not supported{_INSTEAD}"


_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def update(key: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Update:
    """The update of a key's tensors, by suffix. `shape`: the weight's in the real model, for its kernel and as a bound
    for ΔW. AdapterError for unknown, missing or malformed tensors.
    """
    unknown = next((s for s in tensors if s not in SUFFIXES), None)
    if unknown is not None and (what := foreign(unknown)) is not None:
        raise AdapterError(f"key '{key}.{unknown}': {what}")
    if unknown is not None:
        raise AdapterError(
            f"key '{key}.{unknown}': lorakit reads no update with a '{unknown}'{did_you_mean(unknown, SUFFIXES)}\n"
            f"  it reads {', '.join(SUFFIXES)}"
        )
    # 8-bit floats are converted to fp16, which represents all of them.
    parts = {s: t.to(torch.float16) if t.dtype in _FLOAT8 else t for s, t in tensors.items() if s != "alpha"}
    scalar_ = parts.pop("scalar", None)
    if scalar_ is not None:
        rest = {s: t for s, t in tensors.items() if s != "scalar"}
        return update(key, rest, shape).times(_alpha(key, scalar_, "scalar"), key)
    kinds = [kind for kind in (LORA, LOHA, LOKR, DENSE) if any(s in kind for s in parts)]
    if "diff_b" in parts and kinds != [DENSE]:
        return _with_bias(key, tensors, shape)
    if "dora_scale" in parts and LORA in kinds and {s for s in parts if s in LORA} == {"dora_scale"}:
        return _decomposed(key, tensors, shape)
    if len(kinds) != 1:
        found = ", ".join(tensors)
        raise AdapterError(
            f"key '{key}': its {found} are {'no' if not kinds else 'more than one'} kind of update; expected one"
        )
    named = {kinds[0][s]: t for s, t in parts.items()}
    alpha = _alpha(key, tensors["alpha"]) if "alpha" in tensors else None
    if kinds[0] is LORA:
        return _low_rank(key, named, alpha, shape)
    if kinds[0] is LOHA:
        return _loha(key, named, alpha, shape)
    if kinds[0] is LOKR:
        return _lokr(key, named, alpha, shape)
    if len(named) < len(parts):
        raise AdapterError(f"key '{key}': its {', '.join(parts)} are the same tensor twice")
    return _dense(key, named, shape)


def own_update(key: str, tensors: Mapping[str, Tensor]) -> Update:
    """The same of a module that nothing is known of: the weight has the shape that its tensors tell. Checked."""
    down, up, mid = (tensors.get(f"lora_{which}.weight") for which in ("down", "up", "mid"))
    whole = next((tensors[s] for s, name in DENSE.items() if name == "weight" and s in tensors), None)
    shape: tuple[int, ...] = (0, 0)  # LyCORIS' kinds may not tell the kernel
    if down is not None and up is not None and down.dim() > 1 and up.dim() > 1:
        shape = (up.shape[0], down.shape[1], *(down if mid is None else mid).shape[2:])
    elif whole is not None:
        shape = tuple(whole.shape)
    found = update(key, tensors, shape)
    found.check(key)
    return found


def tensors_of(key: str, update: Update, shape: tuple[int, ...], bake_alpha: bool = False) -> dict[str, Tensor]:
    """An update's tensors by full key, the inverse of `update`. `shape`: the weight's in the real model. AdapterError
    for a kind that kohya's files cannot hold.

    bake_alpha: multiply a low-rank update's scale into its up (in float32 if its dtype would round it) and leave out
    alpha. Every reader takes a missing alpha for the rank; diffusers 0.42 gives alphas to the wrong modules if they
    differ.
    """
    return {f"{key}.{suffix}": t for suffix, t in _by_suffix(update, shape, bake_alpha).items()}


@singledispatch
def _by_suffix(update: Update, shape: tuple[int, ...], bake_alpha: bool) -> dict[str, Tensor]:
    """An update's tensors by suffix, a function for each kind. AdapterError for a kind that the format has no suffix
    for.
    """
    raise AdapterError(f"kohya's files have no update of the kind '{update.variant}'")


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A scalar tensor in `dtype`, or in the first wider one that holds the value exactly."""
    candidates = [torch.tensor(value, dtype=d) for d in (dtype, torch.float32, torch.float64)]
    return next((c for c in candidates if c.item() == value), candidates[-1])


@_by_suffix.register
def _(f: Factors, shape: tuple[int, ...], bake_alpha: bool) -> dict[str, Tensor]:
    f = with_alpha_as_rank(f) if bake_alpha else f
    A, B, rank = f.A, f.B, f.A.shape[0]
    alpha = f.alpha if not (f.rslora or f.parts) else f.scale * rank  # the alpha of a scale alpha / r
    # a 1x1 convolution whose factors are matrices
    if A.dim() == 2 and len(shape) > 2 and math.prod(shape[2:]) == 1:
        A = A.reshape(*A.shape, *shape[2:])
    ones = (1,) * (A.dim() - 2)
    return {"lora_down.weight": A, "lora_up.weight": B.reshape(*B.shape[:2], *ones)} | (
        {} if bake_alpha else {"alpha": scalar(alpha, B.dtype)}
    )


@_by_suffix.register
def _(dora: Dora, shape: tuple[int, ...], bake_alpha: bool) -> dict[str, Tensor]:
    inner, m = _by_suffix(dora.inner, shape, bake_alpha), dora.magnitude
    axes = max(len(shape), *(t.dim() for t in inner.values()))
    return inner | {"dora_scale": m.reshape(*m.shape, *(1,) * (axes - 2))}


@_by_suffix.register
def _(loha: Loha, shape: tuple[int, ...], bake_alpha: bool) -> dict[str, Tensor]:
    return _named(loha.tensors(), LOHA, loha.alpha)


@_by_suffix.register
def _(lokr: Lokr, shape: tuple[int, ...], bake_alpha: bool) -> dict[str, Tensor]:
    return _named(lokr.tensors(), LOKR, lokr.alpha)


@_by_suffix.register
def _(dense: Dense, shape: tuple[int, ...], bake_alpha: bool) -> dict[str, Tensor]:
    of_norm = dense.weight is not None and dense.weight.dim() == 1
    suffixes = {"weight": "w_norm", "bias": "b_norm"} if of_norm else {"weight": "diff", "bias": "diff_b"}
    return {suffixes[name]: t for name, t in dense.tensors().items()}


def _named(tensors: Mapping[str, Tensor], suffixes: Mapping[str, str], alpha: float) -> dict[str, Tensor]:
    """Tensors by suffix instead of by field, and alpha in the dtype of the first of them."""
    suffix_of = {name: suffix for suffix, name in suffixes.items()}
    dtype = next(iter(tensors.values())).dtype
    return {suffix_of[name]: t for name, t in tensors.items()} | {"alpha": scalar(alpha, dtype)}


def _alpha(key: str, tensor: Tensor, suffix: str = "alpha") -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        raise AdapterError(
            f"key '{key}.{suffix}' has shape {list(tensor.shape)} and dtype {tensor.dtype}; expected one number"
        )
    return float(tensor)


def _kernel(key: str, columns: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape [in, *k] of a weight's row of `columns` elements. AdapterError if the kernel does not divide it."""
    kernel = shape[2:]
    if columns % math.prod(kernel):
        raise AdapterError(f"key '{key}': rows of {columns} elements; the module is a convolution of {list(kernel)}")
    return (columns // math.prod(kernel), *kernel)


def _require(key: str, named: Mapping[str, Tensor], suffixes: Mapping[str, str], *needed: str) -> None:
    for name in needed:
        if name not in named:
            missing = next(suffix for suffix, n in suffixes.items() if n == name)
            have = ", ".join(suffix for suffix, n in suffixes.items() if n in named)
            raise AdapterError(f"key '{key}.{missing}' is missing; the file has its {have}")
    for name, tensor in named.items():
        suffix = next(s for s, n in suffixes.items() if n == name)
        if (
            tensor.dim() > 5
            or 0 in tensor.shape
            or not tensor.is_floating_point()
            or (tensor.dim() < 2 and name != "magnitude")
        ):
            raise AdapterError(
                f"key '{key}.{suffix}' has shape {list(tensor.shape)} and dtype {tensor.dtype}; expected "
                "floating-point factors"
            )


def _low_rank(key: str, named: dict[str, Tensor], alpha: float | None, shape: tuple[int, ...]) -> Update:
    """A LoRA, or a DoRA where there is a dora_scale."""
    _require(key, named, LORA, "down", "up")
    down, up, mid = named["down"], named["up"], named.get("mid")
    out, rank = up.shape[:2]
    if math.prod(up.shape[2:]) != 1 or (mid is None and down.shape[0] != rank):
        raise AdapterError(
            f"key '{key}': lora_up {list(up.shape)} and lora_down {list(down.shape)} do not fit together"
        )
    if len(shape) < 2:
        raise AdapterError(f"key '{key}.lora_down.weight': a low-rank update of a norm, whose weight has one axis")
    up = up.reshape(out, rank)
    if mid is not None:
        down = _folded(key, mid, down, rank)
    kind: Kind
    if len(shape) == 2:
        if math.prod(down.shape[2:]) != 1:
            raise AdapterError(
                f"key '{key}.lora_down.weight' has shape {list(down.shape)}; the module is linear, not a convolution"
            )
        down, kind = down.flatten(1), "linear"
    else:
        down, kind = (
            (down.reshape(down.shape[0], *_kernel(key, down.shape[1], shape)) if down.dim() == 2 else down),
            "conv",
        )
        up = up.reshape(out, rank, *(1,) * (down.dim() - 2))
    factors = Factors(down, up, float(down.shape[0]) if alpha is None else alpha, kind)
    if "magnitude" not in named:
        return factors
    return Dora(factors, _magnitude(key, named["magnitude"], out, down))


def _folded(key: str, mid: Tensor, down: Tensor, rank: int) -> Tensor:
    """A'[i, y, *k] = Σ_j mid[i, j, *k] · down[j, y], in double precision, rounded once."""
    if mid.dim() < 3 or mid.shape[0] != rank or mid.shape[1] != down.shape[0] or math.prod(down.shape[2:]) != 1:
        raise AdapterError(
            f"key '{key}.lora_mid.weight' has shape {list(mid.shape)}, which does not fit a lora_down of "
            f"{list(down.shape)} and rank {rank}"
        )
    folded = torch.einsum("ij...,jy->iy...", mid.double(), down.flatten(1).double())
    return folded.to(torch.promote_types(torch.promote_types(mid.dtype, down.dtype), torch.float32))


def _magnitude(key: str, tensor: Tensor, out: int, down: Tensor) -> Tensor:
    """dora_scale as a magnitude [out, 1] or [1, in], depending on its shape. AdapterError for another shape."""
    inputs = down.shape[1]
    if tensor.numel() == out and (tensor.dim() < 2 or tensor.shape[0] == out):
        return tensor.reshape(out, 1)
    if tensor.dim() >= 2 and tensor.shape[0] == 1 and tensor.numel() == inputs and math.prod(down.shape[2:]) == 1:
        return tensor.reshape(1, inputs)
    if tensor.dim() >= 2 and tensor.shape[0] == 1 and tensor.numel() == inputs:
        raise AdapterError(
            f"key '{key}.dora_scale': a magnitude for each input of a convolution with a kernel; lorakit reads one per "
            "output"
        )
    raise AdapterError(f"key '{key}.dora_scale' has shape {list(tensor.shape)}; expected [{out}, 1] or [1, {inputs}]")


def _loha(key: str, named: dict[str, Tensor], alpha: float | None, shape: tuple[int, ...]) -> Loha:
    tucker = "t1" in named or "t2" in named
    _require(key, named, LOHA, "w1a", "w1b", "w2a", "w2b", *(("t1", "t2") if tucker else ()))
    named = _one_precision(key, named, LOHA, flat=("w1a", "w1b", "w2a", "w2b"))
    halves = [(_outer(named, side, tucker), named[f"t{side[1]}"].shape[2:] if tucker else ()) for side in ("w1", "w2")]
    if halves[0] != halves[1]:
        raise AdapterError(
            f"key '{key}.hada_w2_a': the two factors are of {list(halves[0][0])} and {list(halves[1][0])}; expected "
            "the same"
        )
    rank, full = named["w1b"].shape[0], None
    if len(shape) > 2 and "t1" not in named:
        full = (named["w1a"].shape[0], *_kernel(key, named["w1b"].shape[1], shape))
    return Loha(**named, alpha=float(rank) if alpha is None else alpha, shape=full)


def _lokr(key: str, named: dict[str, Tensor], alpha: float | None, shape: tuple[int, ...]) -> Lokr:
    _require(key, named, LOKR, *(side for side in ("w1", "w2") if side + "a" not in named and side + "b" not in named))
    for side in ("w1", "w2"):
        if side not in named:
            _require(key, named, LOKR, side + "a", side + "b")
    named = _one_precision(key, named, LOKR, flat=("w1", "w1a", "w1b", "w2a", *(("w2b",) if "t2" in named else ())))
    half = named.get("w1b", named.get("w2b"))
    if half is None and (alpha is None or not (alpha > 0 and math.isfinite(alpha))):
        alpha = 1.0  # with two full matrices the scale is always 1; trainers write any alpha
    w2 = named.get("w2", named.get("w2b"))
    full = None
    # Without a kernel of its own the second factor has part of the axis [in·k]; the product still has its elements in
    # the weight's order.
    if len(shape) > 2 and w2 is not None and w2.dim() == 2 and "t2" not in named:
        first, second = _outer(named, "w1"), _outer(named, "w2")
        full = (first[0] * second[0], *_kernel(key, first[1] * second[1], shape))
    return Lokr(
        **named, alpha=alpha if alpha is not None else float(half.shape[0] if half is not None else 1), shape=full
    )


def _outer(named: Mapping[str, Tensor], side: str, tucker: bool = False) -> tuple[int, int]:
    """(out, in) of one of the two factors."""
    if side in named:
        return named[side].shape[0], named[side].shape[1]
    return named[side + "a"].shape[1 if tucker else 0], named[side + "b"].shape[1]


def _one_precision(
    key: str, named: Mapping[str, Tensor], suffixes: Mapping[str, str], flat: tuple[str, ...]
) -> dict[str, Tensor]:
    """The tensors, all in float64 if one is. AdapterError unless those in `flat` are matrices."""
    for suffix, name in suffixes.items():
        if name in named and name in flat and named[name].dim() != 2:
            raise AdapterError(f"key '{key}.{suffix}' has shape {list(named[name].shape)}; expected a matrix")
    double = any(t.dtype == torch.float64 for t in named.values())
    return {name: t.double() if double else t for name, t in named.items()}


def _dense(key: str, named: Mapping[str, Tensor], shape: tuple[int, ...]) -> Dense:
    weight, bias = named.get("weight"), named.get("bias")
    if weight is not None and weight.dim() != len(shape):
        # unless one of them is the matrix of a 1x1 convolution
        if {weight.dim(), len(shape)} != {2, 4} or math.prod((*weight.shape[2:], *shape[2:])) != 1:
            raise AdapterError(
                f"key '{key}.diff' has shape {list(weight.shape)}; the module's weight has {len(shape)} axes"
            )
        weight = weight.reshape(*weight.shape[:2], *(1,) * (len(shape) - 2))
    if bias is not None and (bias.dim() != 1 or (weight is not None and weight.shape[0] != bias.shape[0])):
        raise AdapterError(f"key '{key}.diff_b' has shape {list(bias.shape)}; expected one number for each output")
    return Dense(weight, bias)


def _with_bias(key: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Biased:
    """Factors with a change of the bias, as programs that extract them write."""
    bias = tensors["diff_b"]
    inner = update(key, {s: t for s, t in tensors.items() if s != "diff_b"}, shape)
    inner.check(key)
    claimed, most = math.prod(inner.weight_shape()), math.prod(shape)
    if claimed > most > 0:
        raise AdapterError(
            f"key '{key}': its factors are for a weight of {claimed:,} elements; the module has {most:,}"
        )
    return Biased(inner, bias.to(torch.float16) if bias.dtype in _FLOAT8 else bias)


def _decomposed(key: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Dora:
    """A LoHa or a LoKr with DoRA's magnitude: W' = m (W + ΔW) / ‖W + ΔW‖, as LyCORIS has it for all its kinds."""
    inner = update(key, {s: t for s, t in tensors.items() if s != "dora_scale"}, shape)
    inner.check(key)
    out, *rest = inner.weight_shape()
    return Dora(inner, _magnitude(key, tensors["dora_scale"], out, torch.empty(0, *rest, device="meta")))


@_by_suffix.register
def _(biased: Biased, shape: tuple[int, ...], bake_alpha: bool) -> dict[str, Tensor]:
    return _by_suffix(biased.inner, shape, bake_alpha) | {"diff_b": biased.bias}
