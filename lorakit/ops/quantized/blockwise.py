"""NF4 and FP4: four bits per weight, in blocks with a scale of their own, as bitsandbytes stores them.

    W ≈ code[index] · absmax[block]          16 codes in [-1, 1]; two indices in a byte, the first in the high half;
                                             blocks of 64 along the flattened weight
    double quantization (Dettmers et al. 2023, section 3):
    absmax ≈ code₂[index₂] · absmax₂[block₂] + offset          256 codes, blocks of 256; offset: the mean of absmax

A weight is quantized to the nearest code. Tensors of a module [out, in], n = out·in:

    weight                   uint8 [n/2, 1]      the indices
    weight.absmax            float32 [n/64]; with double quantization uint8, index₂
    weight.quant_map         float32 [16]        code
    weight.nested_absmax     float32 [n/64/256]  absmax₂
    weight.nested_quant_map  float32 [256]       code₂
    weight.quant_state.bitsandbytes__nf4         the bytes of a JSON object: quant_type, blocksize, dtype, shape, and
                                                 nested_blocksize, nested_dtype, nested_offset
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import LorakitError

TITLE = "bitsandbytes, 4 bits"  # what a base with such weights is said to be
STATE = "weight.quant_state.bitsandbytes__"
NESTED_BLOCK = 256
# Appendix E of the paper: quantiles of the normal distribution, a zero among them.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# A sign, two bits of exponent and one of mantissa, in the order of these bits; divided by the largest.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True)
class Blockwise:
    """kind: "nf4" or "fp4"; double: quantize the blocks' scales too; dtype: the weight's before quantization."""

    kind: str = "nf4"
    double: bool = False
    blocksize: int = 64
    dtype: torch.dtype = torch.bfloat16


@cache
def codes(kind: str) -> Tensor:
    """Return the 16 values of "nf4" or "fp4", by index: [16], float32."""
    if kind == "nf4":
        return torch.tensor(_NF4)
    values = torch.tensor(_FP4)
    return torch.cat([values, -values]) / values.max()


@cache
def dynamic_codes() -> Tensor:
    """Return the 256 sorted values that scales are quantized to: [256], float32.

    They are ±m · 10^(e-6) for e = 0..6, m the 2^e midpoints of equal steps from 0.1 to 1, and 0 and 1 (Dettmers et al.
    2022, "8-bit optimizers via block-wise quantization", section 1.3).
    """
    values = [0.0, 1.0]
    for e in range(7):
        steps = torch.linspace(0.1, 1, 2**e + 1)
        m = 10.0 ** (e - 6) * ((steps[:-1] + steps[1:]) / 2)
        values += [*m.tolist(), *(-m).tolist()]
    return torch.tensor(sorted(values))


def state_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the object in a module's `weight.quant_state...`. Raises LorakitError if it is missing or damaged."""
    name = next((n for n in tensors if n.startswith(STATE)), None)
    try:
        state = json.loads(bytes(tensors[name or ""].tolist()))
        sound = state["quant_type"] in ("nf4", "fp4") and state["blocksize"] > 0 and len(state["shape"]) == 2
    except (KeyError, TypeError, ValueError) as error:
        raise LorakitError(f"the quantization state '{name or STATE + 'nf4'}' is missing or damaged") from error
    if not sound:
        raise LorakitError(f"the quantization state '{name}' is not one of nf4 or fp4: {state}")
    return state


def dequantized(tensors: Mapping[str, Tensor], settings: Blockwise | None = None) -> Tensor:
    """Return W [out, in] in float32. All that is needed is in `tensors`; `settings` are not read.

    Raises LorakitError for a damaged quantization state and tensors of other sizes than it says.
    """
    state = state_of(tensors)
    out, inner = state["shape"]
    packed = tensors["weight"].reshape(-1).view(torch.uint8)
    absmax = scales(tensors, state)
    blocks = -(-out * inner // state["blocksize"])
    if packed.numel() != -(-out * inner // 2) or absmax.numel() != blocks:
        raise LorakitError(
            f"a weight of {[out, inner]} has {packed.numel():,} bytes and {absmax.numel():,} scales; expected "
            f"{-(-out * inner // 2):,} and {blocks:,}"
        )
    code = tensors["weight.quant_map"].float()
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)  # of each byte
    values = pairs.index_select(0, packed.int()).flatten()[: out * inner]
    return _in_blocks(values, state["blocksize"]).mul_(absmax.unsqueeze(1)).flatten()[: out * inner].view(out, inner)


def quantized(W: Tensor, settings: Blockwise | None = None) -> dict[str, Tensor]:
    """Quantize W [out, in] (it is read in float32). Raises LorakitError for a weight that is not finite."""
    how = settings or Blockwise()
    indices, absmax = indexed(W, how)
    return packed_tensors(indices, absmax, (W.shape[0], W.shape[1]), how)


def indexed(W: Tensor, settings: Blockwise) -> tuple[Tensor, Tensor]:
    """Return (the indices packed into bytes [n/2, 1], absmax [n/blocksize]), of complete blocks or the last rows.

    Raises LorakitError for a weight that is not finite.
    """
    flat = W.detach().reshape(-1).float()
    n, blocks = flat.numel(), _in_blocks(flat, settings.blocksize)
    absmax = blocks.abs().amax(1)
    if not math.isfinite(float(absmax.sum())):
        raise LorakitError("the weight has NaN or infinite elements, which cannot be quantized")
    full = n // settings.blocksize
    scaled = blocks * absmax.clamp_min(1e-38).reciprocal().unsqueeze(1)
    scaled[full:] = blocks[full:] / absmax[full:].clamp_min(1e-38).unsqueeze(1)  # of a last, shorter block
    flat = scaled.flatten()[:n]
    order, bounds = _order(settings.kind)
    index = flat.new_zeros(n + n % 2, dtype=torch.uint8)  # an odd number is filled up with a zero
    for bound in bounds.tolist():  # 15 passes take a quarter of the time of `bucketize`
        index[:n] += flat > bound
        index[n:] += bound < 0
    if settings.kind != "nf4":
        index = order.to(index).index_select(0, index.int())
    halves = index.view(-1, 2)
    return (halves[:, 0] << 4 | halves[:, 1]).unsqueeze(1), absmax


def packed_tensors(
    indices: Tensor, absmax: Tensor, shape: tuple[int, int], settings: Blockwise, length: int | None = None
) -> dict[str, Tensor]:
    """Return a module's tensors from its weight's indices and scales (`indexed`).

    length: pad the bytes of the quantization state with spaces, which JSON ignores, so that their number is known
    beforehand.
    """
    state: dict[str, Any] = {
        "quant_type": settings.kind,
        "blocksize": settings.blocksize,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    tensors = {
        "weight": indices,
        "weight.absmax": absmax,
        "weight.quant_map": codes(settings.kind).to(absmax, copy=True),
    }
    if settings.double:
        offset = absmax.mean()
        index, absmax2 = _dynamic(absmax - offset)
        tensors |= {
            "weight.absmax": index,
            "weight.nested_absmax": absmax2,
            "weight.nested_quant_map": dynamic_codes().to(absmax, copy=True),
        }
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
    text = json.dumps(state).encode()
    tensors[STATE + settings.kind] = torch.tensor(list(text.ljust(length or 0)), dtype=torch.uint8)  # on the CPU
    return tensors


def scales(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """Return a module's absmax in float32 [n/blocksize], also where it is quantized. `state`: `state_of(tensors)`."""
    absmax = tensors["weight.absmax"]
    if "nested_offset" not in state:
        return absmax.float()
    code, outer = tensors["weight.nested_quant_map"].float(), tensors["weight.nested_absmax"].float()
    values = _in_blocks(code[absmax.long()], state["nested_blocksize"]).mul_(outer.unsqueeze(1))
    return values.flatten()[: absmax.numel()] + torch.tensor(float(state["nested_offset"]))


def rounding(values: Tensor, absmax: Tensor, code: Tensor, scale_errors: Tensor | None = None) -> Tensor:
    """Return how far quantization may have moved elements: half the distance to the next code.

    values, absmax: dequantized elements and the scales of their blocks, of one shape; code [16]; scale_errors: what
    double quantization may have moved the scales by (`scale_rounding`).
    """
    ordered = code.float().sort().values
    gaps = ordered.diff()
    half = torch.maximum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]])) / 2
    nearest = torch.bucketize(values.float() / absmax.clamp_min(1e-30), (ordered[:-1] + ordered[1:]) / 2)
    errors = half[nearest] * absmax
    return errors if scale_errors is None else errors + scale_errors


def scale_rounding(outer: Tensor, code: Tensor, size: int, count: int) -> Tensor:
    """Return how far double quantization may have moved each scale: half the largest distance of two codes. [count].

    outer: absmax₂, the scales' own scales; code [256]: code₂; size: scales that share one of `outer`.
    """
    half = code.float().sort().values.diff().max() / 2
    return (outer.float() * half).repeat_interleave(size)[:count]


def _dynamic(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize scales [n] to the nearest of 256 codes in blocks of 256: (uint8 [n], absmax [n/256])."""
    blocks = _in_blocks(values, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax.clamp_min(1e-38).unsqueeze(1)).clamp_(-1, 1).flatten()[: values.numel()]
    code = dynamic_codes().to(scaled)
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8), absmax


@cache
def _order(kind: str) -> tuple[Tensor, Tensor]:
    """Return (the indices sorted by their codes, the midpoints between the sorted codes)."""
    code = codes(kind)
    order = torch.argsort(code, stable=True)
    return order, (code[order[:-1]] + code[order[1:]]) / 2


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    """Return [blocks, size]; the last block is filled up with zeros."""
    missing = -flat.numel() % size
    return (torch.cat([flat, flat.new_zeros(missing)]) if missing else flat).view(-1, size)
